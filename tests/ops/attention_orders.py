"""A sample has the same bits wherever it lies in its batch and when computed twice, and the same draws on any rank."""

import torch
from torch.utils.checkpoint import checkpoint

import vlkernels as vk

LENGTHS = ([70, 9], [5, 3], [33, 0], [64, 66], [1, 1])
ROWS = [sum(pair) for pair in LENGTHS]
FIRST = [sum(ROWS[:b]) for b in range(len(ROWS))]
NAMES = ("out", "lse", "dq", "dk", "dv")


def _rows(order):
    return torch.cat([torch.arange(FIRST[b], FIRST[b] + ROWS[b]) for b in order])


def _call(order, impl, dtype, recomputed):
    """out, lse, dq, dk, dv of the samples of ``order``, by their rows in the batch of all."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, cotangent = torch.randn(4, sum(ROWS), 1, 16, generator=generator).to(dtype)
    rows = _rows(order)
    inputs = [x[rows].requires_grad_() for x in (q, k, v)]
    layout = vk.SegmentLayout([LENGTHS[b] for b in order], sample_ids=[40 + b for b in order])

    def attend(*qkv):
        options = {"layout": layout, "mask": vk.SegmentMask.prefix_lm(), "dropout_p": 0.2, "rng": vk.Rng(3), "stream": 7}
        return vk.attention(*qkv, **options, return_lse=True, impl=impl)

    out, lse = checkpoint(attend, *inputs, use_reentrant=False) if recomputed else attend(*inputs)
    grads = torch.autograd.grad((out, lse), inputs, (cotangent[rows], cotangent[rows, :, 0].T.float().contiguous()))
    found = [x.new_full((sum(ROWS), *x.shape[1:]), torch.nan) for x in (out, lse.T, *grads)]
    for whole, part in zip(found, (out, lse.T, *grads)):
        whole[rows] = part.detach()
    return found


def verify(impl, dtype):
    expected = _call(range(len(ROWS)), impl, dtype, False)
    assert all(x.isfinite().all() for x in expected)
    for ranks in ([(4, 2, 0, 3, 1)], [(0, 2), (3, 1, 4)]):
        for order in ranks:
            rows, first = _rows(order), _call(order, impl, dtype, False)
            for name, mine, again, true in zip(NAMES, first, _call(order, impl, dtype, True), expected):
                assert torch.equal(mine[rows], again[rows]), f"{name} of samples {order} when recomputed"
                if len(ranks) == 1:
                    assert torch.equal(mine[rows], true[rows]), f"{name} of samples {order}"
                else:  # the longest sample of a batch chooses the kernels; other draws would be far off
                    torch.testing.assert_close(mine[rows], true[rows], rtol=2e-2, atol=2e-2, msg=lambda m: f"{name}: {m}")
