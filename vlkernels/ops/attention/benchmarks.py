"""What attention is timed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.mask import CAUSAL, FULL, SegmentMask
from vlkernels.core.spec import Arguments, Benchmark, Cost, InputMaker, Peer
from vlkernels.ops.attention import functional, peers
from vlkernels.ops.attention.bias import RelativeBias
from vlkernels.ops.attention.flash import calls as flash, libraries

Lengths = Sequence[Sequence[int]]

CPU_DTYPES = (torch.float32, torch.bfloat16)
CARD_DTYPES = (torch.bfloat16,)


def _rows(
    lengths: Lengths, heads: int, width: int, mask: SegmentMask | None = None, **options: Any
) -> Callable[[InputMaker], Arguments]:
    def make(fill: InputMaker) -> Arguments:
        layout = fill.layout(lengths)
        qkv = fill.drawn(layout.num_tokens, 3, heads, width)
        return {"qkv": qkv, "layout": layout, "mask": mask, **options}

    return make


def _draw_lengths(samples: int, low: int, high: int, prefix: int = 0) -> Lengths:
    """``samples`` of ``prefix`` tokens, if any, and then ``low .. high`` of another segment, evenly drawn."""
    drawn = torch.randint(low, high + 1, (samples,), generator=torch.Generator().manual_seed(0)).tolist()
    return [[prefix, n] if prefix else [n] for n in drawn]


def lengths_with_padding(samples: int, longest: int, share: float) -> Lengths:
    """Lengths up to ``longest`` of which padding makes exactly ``share`` of all tokens: evenly spread at 0.5."""
    wanted = round((1 - share) * samples * longest)
    quantiles = (torch.arange(samples) + 0.5) / samples
    lengths = (longest * quantiles ** (share / (1 - share))).round().long().clamp(min=1)
    lengths[-1] = longest
    for i in range(samples * longest):
        missing = wanted - int(lengths.sum())
        if not missing:
            break
        step = 1 if missing > 0 else -1
        lengths[i % (samples - 1)] = (lengths[i % (samples - 1)] + step).clamp(1, longest)
    assert int(lengths.sum()) == wanted, f"no lengths of {samples} samples up to {longest} hold {wanted} tokens"
    return lengths[torch.randperm(samples, generator=torch.Generator().manual_seed(0))][:, None].tolist()


def cost(
    layout: SegmentLayout,
    qkv: Tensor | None = None,
    q: Tensor | None = None,
    k: Tensor | None = None,
    mask: SegmentMask | None = None,
    kv_layout: SegmentLayout | None = None,
    **_: Any,
) -> Cost:
    q, k = (q, k) if qkv is None else qkv.unbind(1)[:2]
    products = 2 * visible_pairs(layout, kv_layout, mask) * q.shape[1] * q.shape[2]
    unit = (q.numel() + k.numel()) * q.element_size()
    return Cost(forward_bytes=2 * unit, backward_bytes=4 * unit, forward_flops=2 * products, backward_flops=5 * products)


def visible_pairs(layout: SegmentLayout, kv_layout: SegmentLayout | None, mask: SegmentMask | None) -> int:
    keys = layout if kv_layout is None else kv_layout
    table = flash.full_table(layout, keys) if mask is None else mask.codes
    queries, seen = layout.lengths.long(), keys.lengths.long()
    pairs = 0
    for r, row in enumerate(table):
        for c, code in enumerate(row):
            n, m = queries[:, r], seen[:, c]
            both = torch.minimum(n, m)
            if code == FULL:
                pairs += int((n * m).sum())
            elif code == CAUSAL:  # the ends align: a triangle, and what lies before it
                pairs += int((both * (both + 1) // 2 + n * (m - n).clamp(min=0)).sum())
    return pairs


REFERENCE = peers.same_call(lambda given: {**given, "impl": "reference"}, functional.attention_qkvpacked)
SDPA = {
    "padded SDPA": peers.rival(partial(peers.padded, 1)),
    "length-sorted SDPA": peers.rival(partial(peers.padded, 4)),
}
VARLEN = {
    "varlen_attn": peers.rival(partial(peers.varlen, libraries.torch_varlen)),
    "flash-attn 2": peers.rival(partial(peers.varlen, libraries.flash_attn_2)),
    "flash-attn 3": peers.rival(partial(peers.varlen, libraries.flash_attn_3)),
    "flash-attn 4": peers.rival(partial(peers.varlen, libraries.flash_attn_4)),
}
FLEX = {"FlexAttention": peers.rival(peers.flex)}
CARD_SDPA = {
    "padded SDPA": SDPA["padded SDPA"],
    "cuDNN SDPA": peers.rival(partial(peers.padded, 1, backend=SDPBackend.CUDNN_ATTENTION)),
}
PER_BATCH = {
    "new layout": peers.same_call(peers.fresh_layout, functional.attention_qkvpacked),
    "BlockMask alone": Peer(peers.block_mask, rival=False),
}


def _on_cpu(make: Callable[..., Arguments], beside: Mapping[str, Peer] = SDPA) -> Benchmark:
    return Benchmark(make, ("cpu",), CPU_DTYPES, beside)


def on_a_cpu() -> dict[str, Benchmark]:
    prefix = _draw_lengths(128, 5, 15, prefix=16)
    rows = {
        "16 x 1..256, H12 K64": _on_cpu(_rows(_draw_lengths(16, 1, 256), 12, 64)),
        "128 x 5..15, H4 K32": _on_cpu(_rows(_draw_lengths(128, 5, 15), 4, 32)),
        "128 x 16 + 5..15, H4 K32, prefix-LM": _on_cpu(_rows(prefix, 4, 32, SegmentMask.prefix_lm())),
    }
    beside = {**SDPA, "jagged SDPA": peers.rival(peers.jagged)}
    for share in (0.25, 0.5, 0.75):
        name = f"32 x 1..128, {share:.0%} padding, H12 K64"
        rows[name] = _on_cpu(_rows(lengths_with_padding(32, 128, share), 12, 64), beside)
    return rows


def on_a_card(shrink: int = 1) -> dict[str, Benchmark]:
    """The rows for a GPU, most telling first; ``shrink`` makes them small, for a trial of the code."""

    def row(
        samples: int, lengths: Sequence[int], heads: int, width: int, mask: SegmentMask | None, beside: Mapping[str, Peer]
    ) -> Benchmark:
        return Benchmark(_rows(_equal(samples, lengths, shrink), heads, width, mask), ("cuda",), CARD_DTYPES, beside)

    def drawn(samples: int, low: int, high: int) -> Benchmark:
        lengths = _draw_lengths(samples, low, high) if shrink == 1 else _draw_lengths(4, 1, 9)
        return Benchmark(_rows(lengths, 8, 64), ("cuda",), CARD_DTYPES, {**VARLEN, **CARD_SDPA})

    prefix_lm, every = SegmentMask.prefix_lm(), {**VARLEN, **FLEX, **CARD_SDPA}
    fixed = {**VARLEN, **CARD_SDPA}
    return {
        "332 x 197, H12 K64": row(332, [197], 12, 64, None, {**every, **PER_BATCH, "reference": REFERENCE}),
        "256 x 256, H12 K64": row(256, [256], 12, 64, None, fixed),
        "106 x 577 + 40, H12 K64, prefix-LM": row(106, [577, 40], 12, 64, prefix_lm, {**every, **PER_BATCH}),
        "332 x 197, H12 K64, dropout 0.1": _dropout(332, [197], None, shrink),
        "106 x 577 + 40, H12 K64, prefix-LM, dropout 0.1": _dropout(106, [577, 40], prefix_lm, shrink),
        "92 x 709, H12 K64, bias of three tables": _biased(92, 709, shrink),
        "2 x 8192, H16 K128": row(2, [8192], 16, 128, None, every),
        "4 x 4096, H16 K128": row(4, [4096], 16, 128, None, fixed),
        "1 x 16384, H16 K128": row(1, [16384], 16, 128, None, fixed),
        "2 x 8192, H16 K128, causal": row(2, [8192], 16, 128, SegmentMask.causal(), fixed),
        "16 x 2048, H12 K64": row(16, [2048], 12, 64, None, every),
        "4 x 8192, H12 K64": row(4, [8192], 12, 64, None, fixed),
        "1024 x 40..77, H8 K64": drawn(1024, 40, 77),
        "1024 x 32 + 32, H12 K64, prefix-LM": row(1024, [32, 32], 12, 64, prefix_lm, fixed),
        "8 x 16, H4 K64, host time": row(8, [16], 4, 64, None, fixed),
    }


def _equal(samples: int, lengths: Sequence[int], shrink: int) -> Lengths:
    if shrink == 1:
        return [list(lengths)] * samples
    return [[max(4 + n % 5, n // shrink) for n in lengths]] * min(samples, 3)


def _dropout(samples: int, lengths: Sequence[int], mask: SegmentMask | None, shrink: int) -> Benchmark:
    own = _equal(samples, lengths, shrink)
    without = peers.same_call(lambda given: {**given, "dropout_p": 0.0}, functional.attention_qkvpacked)
    return Benchmark(_rows(own, 12, 64, mask, dropout_p=0.1), ("cuda",), CARD_DTYPES, {"without dropout": without})


# LayoutLMv3's bias: distances in the sequence, and of both axes of the page.
BUCKETS = {"num_buckets": (32, 64, 64), "max_distance": (128, 256, 256), "scale": 0.125}
PAGE = 1000


def _biased(samples: int, length: int, shrink: int) -> Benchmark:
    plain = _rows(_equal(samples, [length], shrink), 12, 64)

    def make(fill: InputMaker) -> Arguments:
        arguments = plain(fill)
        tokens = arguments["layout"].num_tokens
        position = arguments["layout"].token_position("sample")[:, None]
        coordinates = torch.cat([position, fill.integers(0, PAGE, (tokens, 2), torch.int32)], 1)
        tables = [fill.normal(count, 12, scale=0.5) for count in BUCKETS["num_buckets"]]
        return {**arguments, "coordinates": coordinates, "tables": tables}

    without = peers.same_call(lambda given: {name: given[name] for name in ("qkv", "layout")}, functional.attention_qkvpacked)
    beside = {"without bias": without, "padded SDPA, dense bias": peers.rival(_dense_bias, _biased_call)}
    return Benchmark(make, ("cuda",), CARD_DTYPES, beside, _biased_call)


def _dense_bias(q: Tensor, k: Tensor, v: Tensor, mask: None = None, **options: Any) -> peers.Prepared:
    return peers.dense_bias(q, k, v, **options, **BUCKETS)


def _biased_call(*qkv: Tensor, coordinates: Tensor, tables: Sequence[Tensor], **options: Any) -> Tensor:
    """The bias is made in every call, as a model's forward does."""
    options["bias"] = RelativeBias(coordinates, tables, **BUCKETS)
    return functional.attention(*qkv, **options) if qkv else functional.attention_qkvpacked(**options)


def across_streams(shrink: int = 1) -> dict[str, Benchmark]:
    """Query tokens read an image, as in Q-Former's cross-attention."""

    def make(fill: InputMaker) -> Arguments:
        layout, keys = (fill.layout(_equal(1024, [length], shrink)) for length in (32, 257))
        q, k, v = (fill.drawn(stream.num_tokens, 12, 64) for stream in (layout, keys, keys))
        return {"q": q, "k": k, "v": v, "layout": layout, "kv_layout": keys}

    return {"1024 x 32 over 257, H12 K64": Benchmark(make, ("cuda",), CARD_DTYPES, {**VARLEN, **CARD_SDPA})}


def packed() -> dict[str, Benchmark]:
    return {**on_a_cpu(), **on_a_card()}
