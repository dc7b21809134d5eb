"""``F.linear_cross_entropy`` and the drop-in for it: equal values and gradients over its options."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import vlkernels as vk
from vlkernels.integrations import torch_functional

pytestmark = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch >= 2.13 has it")

ROWS, WIDTH, CLASSES = 13, 6, 21


def problem(rows=ROWS):
    torch.manual_seed(0)
    shape = (WIDTH,) if rows is None else (rows, WIDTH)
    tensors = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in (shape, (CLASSES, WIDTH), (CLASSES,))]
    return tensors, torch.randint(0, CLASSES, shape[:-1])


def compare(tensors, target, served, bias=True, **options):
    results = []
    for function in (torch_functional.linear_cross_entropy, F.linear_cross_entropy):
        leaves = [t.detach().requires_grad_() for t in tensors[: 3 if bias else 2]]
        with vk.recorded() as calls:
            loss = function(*leaves[:2], target, linear_bias=leaves[2] if bias else None, **options)
        if function is torch_functional.linear_cross_entropy:
            assert bool(calls) == served
        results.append((loss, *torch.autograd.grad(loss.sin().sum(), leaves)))
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("rows", (ROWS, None))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("label_smoothing", (0.0, 0.2))
def test_over_reductions_rows_bias_and_smoothing(reduction, rows, bias, label_smoothing):
    tensors, target = problem(rows)
    compare(tensors, target, True, bias, reduction=reduction, label_smoothing=label_smoothing)


@pytest.mark.parametrize("ignore_index", (None, -100, 3, -1))
def test_over_ignored_targets(ignore_index):
    tensors, target = problem()
    target[::3] = -100 if ignore_index is None else ignore_index
    compare(tensors, target, True, ignore_index=ignore_index)


def test_options_of_torch_change_nothing():
    tensors, target = problem()
    compare(tensors, target, True, options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4, chunking_method=None))


def test_what_torch_serves_itself():
    tensors, target = problem()
    compare(tensors, target, False, weight=torch.rand(CLASSES, dtype=torch.float64))
    compare(tensors, target, False, label_smoothing=1.0)
    compare(tensors, torch.rand(ROWS, CLASSES, dtype=torch.float64).softmax(1), False)
    several = [tensors[0], torch.randn(5, 2, WIDTH, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)]
    compare(several, torch.randint(0, 5, (ROWS, 2)), False)


def test_the_loss_of_half_types_is_of_their_dtype():
    hidden, weight, target = torch.randn(9, 8).bfloat16(), torch.randn(30, 8).bfloat16(), torch.randint(0, 30, (9,))
    mine, theirs = (f(hidden, weight, target) for f in (torch_functional.linear_cross_entropy, F.linear_cross_entropy))
    assert mine.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(mine, theirs)


def test_a_mean_over_nothing_is_nothing():
    tensors, target = problem()
    loss = torch_functional.linear_cross_entropy(*tensors[:2], torch.full_like(target, -100))
    assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, tensors[:2]))


def test_its_arguments_are_torchs():
    ours, theirs = (inspect.signature(f).parameters for f in (torch_functional.linear_cross_entropy, F.linear_cross_entropy))
    assert list(ours)[:-1] == list(theirs) and list(ours)[-1] == "impl"
    assert all(ours[name].default == theirs[name].default and ours[name].kind == theirs[name].kind for name in theirs)
