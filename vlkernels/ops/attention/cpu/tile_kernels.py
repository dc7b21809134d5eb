"""Attention of one tile, ``[n, H, L, K]``, forward and backward from lse: PyTorch's fused CPU kernel, or matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vlkernels.core.random import dropout_scale, keep_columns
from vlkernels.ops.attention.call import Call
from vlkernels.ops.attention.cpu.tiles import Tile

# Scores that the matrix products hold at a time: rows of a longer sample are computed in turn.
STEP_SCORES = 2**19

Gradients = tuple[Tensor, Tensor, Tensor]
_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass
class Fused:
    """PyTorch's blocked CPU kernel: no bias, no dropout, no gradient of lse; as many key heads as query heads."""

    scale: float

    def forward(self, tile: Tile, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _fused_forward(q, k, v, 0.0, tile.causal, attn_mask=_mask_like(tile, q), scale=self.scale)

    def backward(self, tile: Tile, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        mask = _mask_like(tile, q)
        return _fused_backward(grad_out, q, k, v, out, lse, 0.0, tile.causal, attn_mask=mask, scale=self.scale)


@dataclass
class TensorBias:
    """``values [B|1, H|1, Lq, Lk]`` by position in the samples."""

    values: Tensor
    grad: Tensor | None

    def add_to(self, scores: Tensor, tile: Tile, rows: slice) -> None:
        for window, part in _windows(self.values, scores, tile, rows):
            part += window

    def collect(self, grad_scores: Tensor, tile: Tile, rows: slice) -> None:
        for window, part in _windows(self.grad, grad_scores, tile, rows):
            window += part.sum_to_size(window.shape)


@dataclass
class DistanceBias:
    """``values [H, C, 2 radius + 1]`` by the clamped distances of ``kv_coordinates`` from ``coordinates``."""

    values: Tensor
    coordinates: Tensor
    kv_coordinates: Tensor
    radius: int
    grad: Tensor | None  # float64: a bucket may be the sum over most pairs of the batch

    def add_to(self, scores: Tensor, tile: Tile, rows: slice) -> None:
        count, heads, *shape = scores.shape
        for c, index in self._indices(tile, rows):
            found = self.values[:, c].index_select(1, index)
            scores += found.view(heads, count, *shape).transpose(0, 1)

    def collect(self, grad_scores: Tensor, tile: Tile, rows: slice) -> None:
        by_head = grad_scores.transpose(0, 1).flatten(1)
        for c, index in self._indices(tile, rows):
            part = by_head.new_zeros(len(by_head), self.values.shape[2])
            self.grad[:, c] += part.scatter_add_(1, index.expand_as(by_head), by_head)

    def _indices(self, tile: Tile, rows: slice) -> Iterator[tuple[int, Tensor]]:
        """For every coordinate, where the pairs of a step ``[n, rows, keys]`` read the values of any head."""
        queries = self.coordinates[tile.query_rows].unflatten(0, (-1, tile.queries))[:, rows]
        keys = self.kv_coordinates[tile.key_rows].unflatten(0, (-1, tile.keys))
        for c in range(self.values.shape[1]):
            distance = keys[:, None, :, c] - queries[:, :, None, c]
            yield c, distance.clamp_(-self.radius, self.radius).add_(self.radius).flatten().long()


def bias_of(call: Call, wants_grad: bool = False) -> TensorBias | DistanceBias | None:
    """The bias of a call, with zeros to collect its gradient in if one is wanted."""
    if call.bias is not None:
        dtype = torch.promote_types(call.bias.dtype, torch.float32)
        return TensorBias(call.bias, torch.zeros_like(call.bias, dtype=dtype) if wants_grad else None)
    if call.distance_bias is None:
        return None
    keys = call.coordinates if call.kv_coordinates is None else call.kv_coordinates
    grad = torch.zeros_like(call.distance_bias, dtype=torch.float64) if wants_grad else None
    return DistanceBias(call.distance_bias, call.coordinates, keys, call.radius, grad)


@dataclass
class Products:
    """Every option, by batched matrix products over ``STEP_SCORES`` scores at a time."""

    scale: float
    bias: TensorBias | DistanceBias | None = None
    sample_ids: Tensor | None = None
    rng_state: Tensor | None = None
    dropout_p: float = 0.0
    stream: int = 0

    @classmethod
    def of(cls, call: Call, bias_grad: bool = False) -> Products:
        return cls(call.softmax_scale, bias_of(call, bias_grad), call.sample_ids, call.rng_state, call.dropout_p, call.stream)

    def forward(self, tile: Tile, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous() * self.scale, _repeated(k, q), _repeated(v, q)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
        for rows in _steps(tile, q.shape[1]):
            scores = self._scores(tile, rows, q, k)
            largest = scores.amax(-1, keepdim=True)
            # A row that a bias of -inf hides altogether has no largest score: any finite one gives it sum 0 and output 0.
            probabilities = scores.sub_(largest.masked_fill(largest == -torch.inf, 0)).exp_()
            total = probabilities.sum(-1, keepdim=True)
            lse[:, :, rows] = (largest + total.log()).squeeze(-1)
            if self.rng_state is not None:
                probabilities *= self._kept(tile, rows, q.shape[1])
            out[:, :, rows] = (probabilities @ v).mul_(dropout_scale(self.dropout_p) / total.masked_fill_(total == 0, 1))
        return out, lse

    def backward(
        self,
        tile: Tile,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_lse: Tensor | None = None,
    ) -> Gradients:
        groups = q.shape[1] // k.shape[1]
        q, k, v, grad_out = q.contiguous() * self.scale, _repeated(k, q), _repeated(v, q), grad_out.contiguous()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (grad_out * out).sum(-1)
        delta = delta if grad_lse is None else delta - grad_lse
        for rows in _steps(tile, q.shape[1]):
            grad_rows, q_rows = grad_out[:, :, rows], q[:, :, rows]
            probabilities = self._scores(tile, rows, q, k).sub_(lse[:, :, rows, None]).exp_()
            grad_scores = grad_rows @ v.transpose(-1, -2)
            if self.rng_state is None:
                grad_v += probabilities.transpose(-1, -2) @ grad_rows
            else:
                kept = self._kept(tile, rows, q.shape[1]).to(q.dtype).mul_(dropout_scale(self.dropout_p))
                grad_v += (probabilities * kept).transpose(-1, -2) @ grad_rows
                grad_scores *= kept
            grad_scores = grad_scores.sub_(delta[:, :, rows, None]).mul_(probabilities)
            if self.bias is not None and self.bias.grad is not None:
                self.bias.collect(grad_scores, tile, rows)
            grad_q[:, :, rows] = grad_scores @ k
            grad_k += grad_scores.transpose(-1, -2) @ q_rows
        return grad_q.mul_(self.scale), _summed(grad_k, groups), _summed(grad_v, groups)

    def _scores(self, tile: Tile, rows: slice, q: Tensor, k: Tensor) -> Tensor:
        scores = q[:, :, rows] @ k.transpose(-1, -2)
        if tile.causal:
            visible = torch.ones(tile.queries, tile.keys, dtype=torch.bool, device=q.device).tril_()[rows]
            scores.masked_fill_(~visible, -torch.inf)
        elif tile.mask is not None:
            scores += tile.mask[:, :, rows] if tile.mask.shape[2] > 1 else tile.mask
        if self.bias is not None:
            self.bias.add_to(scores, tile, rows)
        return scores

    def _kept(self, tile: Tile, rows: slice, heads: int) -> Tensor:
        """What dropout keeps of ``[n, heads, rows, keys]``: 1 or 0, drawn again in each direction."""
        device = self.rng_state.device
        origins = torch.tensor([(i.block.query, i.block.key, i.sample) for i in tile.instances], device=device)
        first_query, first_key, sample = origins.T
        query = first_query[:, None, None] + torch.arange(rows.start, rows.stop, device=device)
        head = torch.arange(heads, device=device)[:, None]
        columns = int(first_key.max()) + tile.keys
        sample_id = self.sample_ids[sample][:, None, None]
        kept = keep_columns(self.rng_state, self.stream, sample_id, query, columns, self.dropout_p, head)
        if bool((first_key == first_key[0]).all()):
            return kept[..., int(first_key[0]) :]
        window = first_key[:, None, None, None] + torch.arange(tile.keys, device=device)
        return kept.gather(-1, window.expand(*kept.shape[:-1], -1))


def _mask_like(tile: Tile, q: Tensor) -> Tensor | None:
    """The fused kernel reads a mask in the dtype of q: a float32 mask beside float64 gives wrong numbers without an error."""
    return None if tile.mask is None else tile.mask.to(q.dtype)


def _steps(tile: Tile, heads: int) -> Iterator[slice]:
    height = max(1, STEP_SCORES // (len(tile.instances) * heads * tile.keys))
    return (slice(start, min(start + height, tile.queries)) for start in range(0, tile.queries, height))


def _windows(bias: Tensor, scores: Tensor, tile: Tile, rows: slice) -> Iterator[tuple[Tensor, Tensor]]:
    """For every block the views of ``bias`` and of ``scores [n, H, rows, keys]`` that belong together."""
    for instance, own in zip(tile.instances, scores):
        block = instance.block
        stop = min(rows.stop, block.queries)
        queries = slice(block.query + rows.start, block.query + max(stop, rows.start))
        window = bias[instance.sample if bias.shape[0] > 1 else 0, :, queries, block.key : block.key + block.keys]
        yield window, own[:, : window.shape[1], : block.keys]


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """Contiguous key heads, one for each query head that reads them."""
    return x.contiguous() if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _summed(grad: Tensor, groups: int) -> Tensor:
    return grad if groups == 1 else grad.unflatten(1, (-1, groups)).sum(2)
