"""What the contract tests and the benchmarks know about ``attention`` and ``attention_qkvpacked``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.mask import SegmentMask
from vlkernels.core.spec import Arguments, Case, InputMaker, OpSpec
from vlkernels.ops.attention import benchmarks, functional, reference
from vlkernels.ops.attention.bias import RelativeBias
from vlkernels.ops.attention.gpu import variants

RAGGED = [[3, 5], [0, 4], [7, 0], [0, 0], [2, 2]]


def _streams(fill: InputMaker, queries: SegmentLayout, keys: SegmentLayout, heads: tuple[int, int], width: int) -> Arguments:
    rows = (queries.num_tokens, heads[0]), (keys.num_tokens, heads[1]), (keys.num_tokens, heads[1])
    q, k, v = (fill.normal(*shape, width) for shape in rows)
    return {"q": q, "k": k, "v": v, "layout": queries}


def _self(
    lengths: Sequence[Sequence[int]] = RAGGED,
    heads: tuple[int, int] = (2, 2),
    width: int = 8,
    mask: SegmentMask | None = None,
    capacity: int | None = None,
    **options: Any,
) -> Callable[[InputMaker], Arguments]:
    def make(fill: InputMaker) -> Arguments:
        layout = fill.layout(lengths, capacity=capacity, sample_ids=range(7, 7 + len(lengths)))
        return {**_streams(fill, layout, layout, heads, width), "mask": mask, **options}

    return make


def _empty(fill: InputMaker) -> Arguments:
    layout = fill.layout(torch.zeros(0, 2, dtype=torch.int64), capacity=3)
    return _streams(fill, layout, layout, (2, 2), 8)


def _cross(fill: InputMaker) -> Arguments:
    layout, keys = fill.layout(RAGGED), fill.layout([[4], [0], [9], [1], [3]])
    return {**_streams(fill, layout, keys, (2, 2), 8), "kv_layout": keys, "mask": SegmentMask([["full"], ["causal"]])}


def _ends_aligned(fill: InputMaker) -> Arguments:
    """Causal across streams, over more keys than a tile of any kernel holds."""
    layout, keys = fill.layout([[66], [135], [3]]), fill.layout([[128], [70], [65]])
    return {**_streams(fill, layout, keys, (1, 1), 16), "kv_layout": keys, "mask": SegmentMask.causal()}


def _negatives(fill: InputMaker) -> Arguments:
    layout, keys = fill.layout([[4], [2], [5], [3], [1], [6]]), fill.layout([[4, 3], [2, 6], [17, 0]])
    index = fill.integers(0, 3, (6,), dtype=torch.int32)
    return {**_streams(fill, layout, keys, (4, 2), 8), "kv_layout": keys, "kv_index": index, "return_lse": True}


def _dropped(fill: InputMaker) -> Arguments:
    return {**_self(mask=SegmentMask.prefix_lm(), capacity=25)(fill), "dropout_p": 0.3, "rng": fill.rng(), "stream": 5}


def _dropped_negatives(fill: InputMaker) -> Arguments:
    arguments = {**_negatives(fill), "return_lse": False}
    table = SegmentMask([["none", "full"]])
    return {**arguments, "mask": table, "dropout_p": 0.1, "rng": fill.rng(), "stream": 9}


def _biased(batch: int, heads: int, of: tuple[int, int] = (2, 2)) -> Callable[[InputMaker], Arguments]:
    def make(fill: InputMaker) -> Arguments:
        return {**_self(heads=of, mask=SegmentMask.prefix_lm())(fill), "bias": fill.normal(batch, heads, 8, 9)}

    return make


def _hidden_by_bias(fill: InputMaker) -> Arguments:
    arguments = _biased(1, 2)(fill)
    hidden = fill.integers(0, 4, (1, 2, 8, 9)) == 0
    hidden[:, :, 1] = True  # this query sees nothing
    return {**arguments, "bias": arguments["bias"].detach().masked_fill(hidden, -torch.inf).requires_grad_()}


# LayoutLMv2's coordinates, (position, x, y), and LayoutLMv3's scale of them.
LAYOUTLM = {"num_buckets": (32, 64, 64), "max_distance": (128, 256, 256), "scale": 0.125}


def _tables(fill: InputMaker, heads: int, *sizes: int) -> list[torch.Tensor]:
    return [fill.normal(size, heads) for size in sizes]


def _by_position(fill: InputMaker) -> Arguments:
    """T5's encoder, over more than ``max_distance`` tokens either way."""
    arguments = _self([[70, 130], [1, 64]], heads=(2, 2), width=16)(fill)
    position = arguments["layout"].token_position("sample").unsqueeze(1)
    return {**arguments, "bias": RelativeBias(position, _tables(fill, 2, 32), num_buckets=32, max_distance=128)}


def _by_past_position(fill: InputMaker) -> Arguments:
    """T5's decoder, with grouped heads."""
    arguments = _self([[41], [1], [0], [30]], heads=(4, 2), mask=SegmentMask.causal())(fill)
    position = arguments["layout"].token_position("sample").unsqueeze(1)
    options = {"num_buckets": 8, "max_distance": 20, "bidirectional": False}
    return {**arguments, "bias": RelativeBias(position, _tables(fill, 4, 8), **options)}


def _by_place(fill: InputMaker) -> Arguments:
    """Three coordinates whose differences are mostly of one sign, so that a wrong sign shows."""
    arguments = _self(mask=SegmentMask.prefix_lm(), capacity=26)(fill)
    place = fill.integers(0, 60, (26, 3)).cumsum(0)
    return {**arguments, "bias": RelativeBias(place, _tables(fill, 2, 32, 64, 64), **LAYOUTLM)}


def _by_place_of_negatives(fill: InputMaker) -> Arguments:
    arguments = {**_negatives(fill), "dropout_p": 0.3, "rng": fill.rng(), "stream": 2}
    place, kv_place = fill.integers(0, 200, (21, 2)), fill.integers(100, 500, (32, 2))
    options = {"num_buckets": 64, "max_distance": (256, 90), "bidirectional": (True, False), "kv_coordinates": kv_place}
    return {**arguments, "bias": RelativeBias(place, _tables(fill, 4, 64, 64), **options)}


def _packed_by_place(fill: InputMaker) -> Arguments:
    place = fill.integers(0, 60, (25, 3)).cumsum(0)
    bias = RelativeBias(place, _tables(fill, 2, 32, 64, 64), **LAYOUTLM)
    return {**_packed(None, dropout_p=0.2, rng=fill.rng())(fill), "bias": bias}


def _packed(mask: SegmentMask | None, **options: Any) -> Callable[[InputMaker], Arguments]:
    def make(fill: InputMaker) -> Arguments:
        layout = fill.layout(RAGGED, capacity=25)
        return {"qkv": fill.normal(layout.num_tokens, 3, 2, 8), "layout": layout, "mask": mask, **options}

    return make


def _packed_fixed(fill: InputMaker) -> Arguments:
    return {"qkv": fill.normal(15, 3, 2, 8), "layout": fill.layout([[5]] * 3)}


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HOLES = SegmentMask([["full", "none", "full"], ["none", "causal", "none"], ["full", "full", "causal"]])

SPECS = (
    OpSpec(
        name="attention",
        functional=functional.attention,
        reference=reference.attention,
        implementations=functional.IMPLEMENTATIONS,
        cases=(
            Case("full", _self(return_lse=True)),
            Case("prefix_lm", _self(mask=SegmentMask.prefix_lm(), capacity=26)),
            Case("causal", _self(mask=SegmentMask.causal(2), softmax_scale=0.5)),
            Case("holes", _self([[3, 4, 5], [0, 20, 1], [6, 0, 2]], mask=HOLES)),
            Case("grouped_heads", _self(heads=(6, 2), width=5, mask=SegmentMask.causal(2))),
            Case("longer_than_a_tile", _self([[70, 130], [1, 64]], heads=(1, 1), width=16, mask=SegmentMask.prefix_lm())),
            Case("cross", _cross),
            Case("ends_aligned", _ends_aligned),
            Case("negatives", _negatives),
            Case("dropout", _dropped),
            Case("dropout_negatives", _dropped_negatives),
            Case("bias", _biased(5, 2)),
            Case("shared_bias", _biased(1, 1)),
            Case("bias_of_grouped_heads", _biased(1, 4, of=(4, 2))),
            Case("hidden_by_bias", _hidden_by_bias),
            Case("bias_by_position", _by_position),
            Case("bias_by_past_position", _by_past_position),
            Case("bias_by_place", _by_place),
            Case("bias_by_place_of_negatives", _by_place_of_negatives),
            Case("empty_batch", _empty),
        ),
        dtypes=DTYPES,
        benchmarks=benchmarks.across_streams(),
        cost=benchmarks.cost,
        variants=variants.variants,
    ),
    OpSpec(
        name="attention_qkvpacked",
        functional=functional.attention_qkvpacked,
        reference=reference.attention_qkvpacked,
        implementations=functional.IMPLEMENTATIONS,
        cases=(
            Case("fixed_length", _packed_fixed),
            Case("full", _packed(None)),
            Case("prefix_lm", _packed(SegmentMask.prefix_lm(), return_lse=False)),
            Case("bias_by_place", _packed_by_place),
        ),
        dtypes=DTYPES,
        benchmarks=benchmarks.packed(),
        cost=benchmarks.cost,
    ),
)
