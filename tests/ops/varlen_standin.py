"""A library for impl="flash" in plain PyTorch: what flash-attn promises, and NaN where it promises nothing."""

import torch

from vlkernels.ops.attention.flash.libraries import Library


class Standin:
    """Sample by sample: ends aligned, grouped heads, lse without a gradient; what nobody owns or blind queries get is NaN."""

    def __init__(self):
        self.calls = []
        self.library = Library("stand-in", self.attend)

    def attend(self, q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, deterministic, lse):
        self.calls.append((q, k, causal, deterministic))
        assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
        assert int(cu_q.diff().max()) <= max_q and int(cu_k.diff().max()) <= max_k
        out, logarithms = _Varlen.apply(q, k, v, cu_q.tolist(), cu_k.tolist(), causal, scale)
        return out, logarithms if lse else None


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, causal, scale):
        ctx.save_for_backward(q, k, v)
        ctx.rest = cu_q, cu_k, causal, scale
        out, lse = _varlen(q, k, v, *ctx.rest)
        ctx.blind = (lse == torch.inf).any(0)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        cu_q, cu_k = ctx.rest[:2]
        with torch.enable_grad():
            out = _varlen(*inputs, *ctx.rest)[0][: cu_q[-1]]
        grads = torch.autograd.grad(out, inputs, grad[: cu_q[-1]])
        for given, end in zip(grads, (cu_q[-1], cu_k[-1], cu_k[-1])):
            given[end:] = torch.nan
        grads[0][ctx.blind] = torch.nan
        return (*grads, None, None, None, None)


def _varlen(q, k, v, cu_q, cu_k, causal, scale):
    folded = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for (start, stop), (first, last) in zip(zip(cu_q, cu_q[1:]), zip(cu_k, cu_k[1:])):
        keys, values = (x[first:last].repeat_interleave(folded, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], keys) * scale
        behind = (last - first) - (stop - start)
        hidden = torch.ones(stop - start, last - first, dtype=torch.bool).triu(behind + 1) & causal
        scores = scores.masked_fill(hidden, -torch.inf)
        lse = scores.logsumexp(-1)
        probabilities = (scores - lse.masked_fill(lse.isinf(), 0).unsqueeze(-1)).exp()
        outs.append(torch.einsum("hqk,khd->qhd", probabilities, values))
        lses.append(lse.masked_fill(lse.isinf(), torch.inf))
    spare = len(q) - cu_q[-1]
    out = torch.cat([*outs, q.new_full((spare, *q.shape[1:]), torch.nan)])
    return out, torch.cat([*lses, q.new_full((q.shape[1], spare), torch.nan)], 1).detach()


def rounding(standin: Standin) -> Library:
    """The stand-in as a kernel for half types: computed in float32, rounded once."""

    def attend(q, k, v, *rest):
        out, lse = standin.attend(q.float(), k.float(), v.float(), *rest)
        return out.to(q.dtype), lse

    return Library("stand-in", attend)
