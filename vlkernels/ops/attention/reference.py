"""The definition of packed attention: plain PyTorch over padded samples, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.mask import CAUSAL, FULL, SegmentMask
from vlkernels.core.random import Rng, dropout_scale, keep_mask, resolve_rng
from vlkernels.ops.attention.bias import RelativeBias


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SegmentLayout,
    mask: SegmentMask | None = None,
    kv_layout: SegmentLayout | None = None,
    kv_index: Tensor | None = None,
    bias: Tensor | RelativeBias | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Rng | None = None,
    stream: int = 0,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + bias) v over the pairs that the table lets see each other; see the functional."""
    keys = layout if kv_layout is None else kv_layout
    samples = torch.arange(layout.num_samples, device=q.device) if kv_index is None else kv_index.long()
    exact = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    queries = _pad(q.to(exact), layout)
    keyed, valued = (_pad(x.to(exact), keys).index_select(0, samples).repeat_interleave(groups, dim=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keyed) * scale
    if isinstance(bias, RelativeBias):
        scores = scores + _relative_bias(bias, layout, keys, samples, exact)
    elif bias is not None:
        scores = scores + bias.narrow(2, 0, scores.shape[2]).narrow(3, 0, scores.shape[3]).to(exact)
    scores = scores.masked_fill(_visible(layout, keys, samples, mask).logical_not().unsqueeze(1), -torch.inf)

    # A row that sees nothing has no softmax: it is computed on zeros and then set to its definition.
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    safe = scores.masked_fill(blind, 0.0)
    probabilities = safe.softmax(-1).masked_fill(blind, 0.0)
    lse = torch.logsumexp(safe, -1).masked_fill(blind.squeeze(-1), -torch.inf)
    if dropout_p > 0:
        probabilities = probabilities * _keep(layout, scores, resolve_rng(rng, q.device), stream, dropout_p)
        probabilities = probabilities * dropout_scale(dropout_p)
    out = _unpad(torch.einsum("bhqk,bkhd->bqhd", probabilities, valued), layout, 0.0).to(q.dtype)
    return (out, _unpad(lse.transpose(1, 2), layout, -torch.inf).T) if return_lse else out


def attention_qkvpacked(qkv: Tensor, **options) -> Tensor | tuple[Tensor, Tensor]:
    return attention(*qkv.unbind(1), **options)


def _pad(x: Tensor, layout: SegmentLayout) -> Tensor:
    """``[T, ...]`` -> ``[B, max_seqlen, ...]``, zeros past the end of a sample."""
    position = torch.arange(layout.max_seqlen, device=x.device)
    outside = position >= layout.lengths.sum(1, keepdim=True)
    rows = (layout.starts.select(1, 0).unsqueeze(1) + position).masked_fill(outside, 0)
    padded = x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:])
    return padded.masked_fill(outside.view(*rows.shape, *[1] * (x.dim() - 1)), 0.0)


def _unpad(x: Tensor, layout: SegmentLayout, nobody: float) -> Tensor:
    """``[B, max_seqlen, ...]`` -> ``[T, ...]``, ``nobody`` in the rows that belong to no sample."""
    if x.numel() == 0:
        return x.new_full((layout.num_tokens, *x.shape[2:]), nobody) + x.sum()
    sample, position = layout.token_sample().long(), layout.token_position("sample").long()
    rows = (sample * x.shape[1] + position).clamp(min=0)
    return x.flatten(0, 1).index_select(0, rows).masked_fill((sample < 0).view(-1, *[1] * (x.dim() - 2)), nobody)


def _visible(layout: SegmentLayout, keys: SegmentLayout, samples: Tensor, mask: SegmentMask | None) -> Tensor:
    """bool ``[B, Lq, Lk]``: the table spread over the padded positions of each sample."""
    q_segment, q_left = _segments(layout)
    q_segment, q_left = q_segment.unsqueeze(2), q_left.unsqueeze(2)
    k_segment, k_left = (x.index_select(0, samples).unsqueeze(1) for x in _segments(keys))
    both = (q_segment >= 0) & (k_segment >= 0)
    if mask is None:
        return both
    cell = q_segment.clamp(min=0) * keys.num_segments + k_segment.clamp(min=0)
    code = mask.table(cell.device).index_select(0, cell.flatten()).view(cell.shape)
    return both & ((code == FULL) | ((code == CAUSAL) & (k_left >= q_left)))


def _relative_bias(
    bias: RelativeBias, layout: SegmentLayout, keys: SegmentLayout, samples: Tensor, dtype: torch.dtype
) -> Tensor:
    """``[B, H, Lq, Lk]``: for every pair the rows of the tables that its distances fall into."""
    of_keys = bias.coordinates if bias.kv_coordinates is None else bias.kv_coordinates
    queried, met = _pad(bias.coordinates.long(), layout), _pad(of_keys.long(), keys).index_select(0, samples)
    distance = met.unsqueeze(1) - queried.unsqueeze(2)
    rows = zip(bias.buckets, distance.unbind(-1), bias.tables)
    return (bias.scale * sum(embedding(own.of(d), table.to(dtype)) for own, d, table in rows)).permute(0, 3, 1, 2)


def _segments(layout: SegmentLayout) -> tuple[Tensor, Tensor]:
    """int64 ``[B, max_seqlen]``: the segment of each position (-1 past the end) and the tokens from it to the segment's end."""
    ends = layout.lengths.long().cumsum(1)
    position = torch.arange(layout.max_seqlen, device=ends.device).repeat(layout.num_samples, 1)
    segment = torch.searchsorted(ends, position, right=True)
    outside = segment >= layout.num_segments
    segment = segment.clamp(max=layout.num_segments - 1)
    return segment.masked_fill(outside, -1), ends.gather(1, segment) - position


def _keep(layout: SegmentLayout, scores: Tensor, state: Tensor, stream: int, dropout_p: float) -> Tensor:
    batch, heads, queries, keys = scores.shape
    position, column, head = (torch.arange(n, device=scores.device) for n in (queries, keys, heads))
    sample = layout.sample_ids.view(batch, 1, 1, 1)
    return keep_mask(state, stream, sample, position.view(-1, 1), column, dropout_p, head.view(-1, 1, 1))
