"""impl "triton" on the host: outputs, work lists and the launches of both directions. Triton is imported by the first call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlkernels.core import triton_runtime
from vlkernels.core.kept import kept
from vlkernels.core.layout import MAX_SEGMENTS
from vlkernels.core.mask import CAUSAL, FULL
from vlkernels.core.random import COLUMNS_PER_CALL, dropout_scale
from vlkernels.core.triton_runtime import LOG2_E, Launch
from vlkernels.ops.attention.call import Call, split, strides
from vlkernels.ops.attention.gpu import resident, work_list
from vlkernels.ops.attention.gpu.tile_sizes import MOST_HEAD_DIM, TileSizes, padded_head_dim, tile_sizes
from vlkernels.ops.attention.gpu.work_list import Side, Streams

# Enough programs of a kernel to keep the multiprocessors of a large card busy.
BUSY_PROGRAMS = 1024
# Gradients by distance are counted in replicas, so that fewer programs meet at an entry: at most so many, of so many entries.
MOST_REPLICAS, REPLICA_ENTRIES = 32, 2**20

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(facts: Mapping[str, Any]) -> str | None:
    """Why these kernels cannot serve a call; ``None`` when they can."""
    if facts["dtype"] not in DTYPES:
        return f"it computes in float32, the inputs are {str(facts['dtype']).removeprefix('torch.')}"
    if facts["head_dim"] > MOST_HEAD_DIM:
        return f"it serves heads up to K = {MOST_HEAD_DIM}, got {facts['head_dim']}"
    if not facts["softmax_scale"] > 0:
        return f"it needs a positive softmax_scale, got {facts['softmax_scale']}"
    return None


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    call = _with_rows(Call(*inputs))
    q, _, _ = call.heads
    out, lse = q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    if _nothing(call):
        return out.zero_(), lse.fill_(-torch.inf)
    architecture = _architecture(call)
    launch = resident.forward_launch if resident.serves(call, architecture) else forward_launch
    with torch.cuda.device_of(q):
        launch(call, out, lse, architecture).run()
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool, *inputs: Any
) -> list[Tensor]:
    """The gradients in the form of ``qkv``, then that of the bias if ``bias_grad``."""
    call = _with_rows(Call(*inputs))
    grads = [x.new_empty(x.shape) for x in call.qkv]
    grad_bias = _empty_bias_gradient(call) if bias_grad else None
    if _nothing(call):
        return [grad.zero_() for grad in (*grads, grad_bias) if grad is not None]
    grad_out = _rows(grad_out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    architecture = _architecture(call)
    if resident.serves(call, architecture):
        with torch.cuda.device_of(lse):
            resident.backward_launch(call, grad_out, lse, grad_lse, split(grads), architecture).run()
        return grads
    delta = torch.empty_like(lse)
    stored = grad_bias.zero_() if grad_bias is not None and _own_bias(call) else None
    dq, dk, dv = split(grads)
    with torch.cuda.device_of(delta):
        query_gradient_launch(call, out, grad_out, lse, grad_lse, delta, dq, stored, architecture).run()
        key_gradient_launch(call, grad_out, lse, delta, dk, dv, architecture).run()
        if grad_bias is not None and stored is None:
            if grad_bias.numel() == 0 or call.heads[1].shape[0] == 0:
                grad_bias.zero_()
            elif call.bias is None:
                _differentiate_distances(call, grad_out, lse, delta, grad_bias, architecture)
            else:
                _differentiate_shared_bias(call, grad_out, lse, delta, grad_bias, architecture)
    return grads if grad_bias is None else [*grads, grad_bias]


def _with_rows(call: Call) -> Call:
    """A compiled graph may lay what it makes out in another way than the tensors that it was traced with."""
    return call._replace(qkv=[_rows(x) for x in call.qkv])


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def forward_launch(call: Call, out: Tensor, lse: Tensor, architecture: int) -> Launch:
    q, k, v = call.heads
    bias, sizes = Bias.of(call), _sizes("forward", call, architecture)
    side = work_list.query_side(_streams(call), q.shape[0], sizes.queries)
    arguments = (
        q, k, v, out, lse, *side, call.rng_state, *bias.tensors, *strides(q, k, v, out), lse.stride(0), q.shape[1] // k.shape[1],
        *bias.numbers, *_scales(call), *call.drawn,
    )  # fmt: skip
    return _launch(_kernels().forward_kernel, side, q.shape[1], arguments, call, bias, sizes)


def query_gradient_launch(
    call: Call, out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor | None, delta: Tensor, dq: Tensor,
    grad_bias: Tensor | None, architecture: int,
) -> Launch:  # fmt: skip
    """``grad_bias``: zeros, for the gradient of a bias that no two samples or heads share."""
    q, k, v = call.heads
    bias, sizes = Bias.of(call), _sizes("query_gradient", call, architecture)
    side = work_list.query_side(_streams(call), q.shape[0], sizes.queries)
    grad_strides = (0, 0, 0) if grad_bias is None else grad_bias.stride()[:3]
    arguments = (
        q, k, v, out, grad_out, lse, grad_lse, delta, dq, *side, call.rng_state, *bias.tensors, grad_bias,
        *strides(q, k, v, out, grad_out, dq), lse.stride(0), q.shape[1] // k.shape[1], *bias.numbers, *grad_strides,
        *_scales(call), *call.drawn,
    )  # fmt: skip
    flags = {"GRAD_LSE": grad_lse is not None, "GRAD_BIAS": grad_bias is not None}
    return _launch(_kernels().query_gradient_kernel, side, q.shape[1], arguments, call, bias, sizes, **flags)


def key_gradient_launch(
    call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, architecture: int
) -> Launch:
    q, k, v = call.heads
    bias, sizes = Bias.of(call), _sizes("key_gradient", call, architecture)
    multiple = 1 if call.rng_state is None else COLUMNS_PER_CALL
    side = work_list.key_side(_streams(call), k.shape[0], sizes.keys, multiple)
    arguments = (
        q, k, v, grad_out, lse, delta, dk, dv, *side, call.rng_state, *bias.tensors, *strides(q, k, v, grad_out, dk, dv),
        lse.stride(0), q.shape[1] // k.shape[1], *bias.numbers, *_scales(call), *call.drawn,
    )  # fmt: skip
    return _launch(_kernels().key_gradient_kernel, side, k.shape[1], arguments, call, bias, sizes)


def _differentiate_shared_bias(
    call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor, grad_bias: Tensor, architecture: int
) -> None:
    sizes = _sizes("shared_gradient", call, architecture)
    parts = _parts(call, sizes)
    sums = grad_bias[None] if parts == 1 else torch.empty((parts, *grad_bias.shape), dtype=torch.float32, device=lse.device)
    shared_gradient_launch(call, grad_out, lse, delta, sums, architecture).run()
    if parts > 1:
        grad_bias.copy_(sums.sum(0))


def shared_gradient_launch(
    call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor, sums: Tensor, architecture: int
) -> Launch:
    """``sums``: ``[parts, ...]`` of the shape of the bias; every part takes some of the samples."""
    q, k, v = call.heads
    bias, sizes = Bias.of(call), _sizes("shared_gradient", call, architecture)
    samples, heads = call.starts.shape[0] // call.bias.shape[0], q.shape[1] // call.bias.shape[1]
    own = call.starts, call.lengths
    others = own if call.kv_starts is None else (call.kv_starts, call.kv_lengths)
    arguments = (
        q, k, v, grad_out, lse, delta, bias.tensors[0], sums, *own, *others, call.kv_index, *row_marks(call),
        call.sample_ids, call.rng_state, *strides(q, k, v, grad_out), lse.stride(0), q.shape[1] // k.shape[1],
        *bias.numbers[:3], call.bias.shape[1], samples, heads, -(-samples // sums.shape[0]), own[0].shape[1], others[0].shape[1],
        *call.bias.shape[2:], call.softmax_scale, *call.drawn,
    )  # fmt: skip
    grid = _plane_tiles(call, sizes), sums.shape[0]
    return Launch(_bias_kernels().shared_gradient_kernel, grid, arguments, _constants(call, sizes), sizes.warps, sizes.stages)


def _plane_tiles(call: Call, sizes: TileSizes) -> int:
    planes, heads, queries, keys = call.bias.shape
    return planes * heads * -(-queries // sizes.queries) * -(-keys // sizes.keys)


def _parts(call: Call, sizes: TileSizes) -> int:
    """Into how many sums the samples that share a bias are cut, so that a card is busy."""
    sharing = call.starts.shape[0] // call.bias.shape[0]
    at_once = -(-sharing * _plane_tiles(call, sizes) // BUSY_PROGRAMS)
    return -(-sharing // at_once)


def _differentiate_distances(
    call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor, grad_bias: Tensor, architecture: int
) -> None:
    replicas = max(1, min(MOST_REPLICAS, REPLICA_ENTRIES // grad_bias.numel()))
    counts = torch.zeros((replicas, *grad_bias.shape), dtype=torch.int64, device=lse.device)
    fixed, unit = _fixed_point(call, grad_out, delta)
    distance_gradient_launch(call, grad_out, lse, delta, counts, fixed, architecture).run()
    torch.mul(counts.sum(0), unit, out=grad_bias)


def distance_gradient_launch(
    call: Call, grad_out: Tensor, lse: Tensor, delta: Tensor, counts: Tensor, fixed: Tensor, architecture: int
) -> Launch:
    q, k, v = call.heads
    bias, sizes = Bias.of(call), _sizes("distance_gradient", call, architecture)
    side = work_list.query_side(_streams(call), q.shape[0], sizes.queries)
    arguments = (
        q, k, v, grad_out, lse, delta, counts, fixed, *side, call.rng_state, *bias.tensors, *strides(q, k, v, grad_out),
        lse.stride(0), q.shape[1] // k.shape[1], counts.shape[0], *bias.numbers, call.softmax_scale, *call.drawn,
    )  # fmt: skip
    constants = {**_constants(call, sizes), "COORDINATES": bias.coordinates}
    grid = side.tiles.shape[0], q.shape[1]
    return Launch(_bias_kernels().distance_gradient_kernel, grid, arguments, constants, sizes.warps, sizes.stages)


def _fixed_point(call: Call, grad_out: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(what ds is multiplied by, the value of one) in float32: powers of two by which no sum of ds passes 2**62.

    A row's ``sum_j |ds_ij|`` is at most ``keep_scale max_j |g_i . v_j| + |delta_i|``, because its probabilities add up to 1. The
    unit is NaN where the bound is not finite: counts hold no NaN, the gradient shall.
    """
    nobody, no_key = (marks.select(1, 1) <= 0 for marks in row_marks(call))
    product = grad_out.shape[2] * _largest(grad_out, nobody) * _largest(call.heads[2], no_key)
    of_row = dropout_scale(call.dropout_p) * product + torch.where(nobody, 0.0, delta.abs()).amax()
    bound = of_row * grad_out.shape[0]
    exponent = torch.frexp(bound).exponent.clamp(min=-64)
    unit = torch.where(bound.isfinite(), _power_of_two(exponent - 61), torch.nan)
    return _power_of_two(61 - exponent), unit


def _largest(rows: Tensor, nobody: Tensor) -> Tensor:
    """The largest absolute value of a row that belongs to a sample. No squares, which would overflow long before it does."""
    of_rows = torch.linalg.vector_norm(rows, torch.inf, dim=(1, 2), dtype=torch.float32)
    return torch.where(nobody, 0.0, of_rows).amax()


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


class Bias(NamedTuple):
    """A bias as the kernels read it; see ``tile_functions``."""

    kind: str | None
    coordinates: int
    tensors: tuple[Tensor | None, ...]  # the bias, the sample of every query row, coordinates of queries and of keys
    numbers: tuple[int, int, int, int]  # strides of a sample, a head and a row; radius

    @classmethod
    def of(cls, call: Call) -> Bias:
        if call.bias is not None:
            bias = _rows(call.bias)
            shared = [0 if bias.shape[i] == 1 else bias.stride(i) for i in (0, 1)]
            samples = samples_of_rows(call.starts, call.heads[0].shape[0])
            return cls("tensor", 0, (bias, samples, None, None), (*shared, bias.stride(2), 0))
        if call.distance_bias is not None:
            table, coordinates = call.distance_bias.contiguous(), call.coordinates.contiguous()
            others = coordinates if call.kv_coordinates is None else call.kv_coordinates.contiguous()
            return cls("relative", coordinates.shape[1], (table, None, coordinates, others), (0, table.stride(0), 0, call.radius))
        return cls(None, 0, (None, None, None, None), (0, 0, 0, 0))


def samples_of_rows(starts: Tensor, tokens: int) -> Tensor:
    """int32 ``[tokens]``: the sample that each row stands in or behind."""
    return kept(("samples of rows", tokens), (starts,), lambda: _segments_of_rows(starts, tokens) // starts.shape[1])


def row_marks(call: Call) -> tuple[Tensor, Tensor]:
    """What the rows of both streams see, int32 ``[T, 2]``.

    Of a query: a word with a bit for every key segment it sees in full and one, sixteen places higher, for every key segment it
    sees causally; the rows from it to the end of its segment. Of a key: its segment; the rows to the end of that.
    """
    streams = _streams(call)._replace(sample_ids=None)
    tokens = call.heads[0].shape[0], call.heads[1].shape[0]
    return kept(("row marks", *tokens), streams, lambda: _row_marks(streams, *tokens))


def _row_marks(streams: Streams, tokens: int, key_tokens: int) -> tuple[Tensor, Tensor]:
    segment, left = _places(streams.starts, streams.lengths, tokens)
    keys = (streams.starts, streams.lengths) if streams.kv_starts is None else (streams.kv_starts, streams.kv_lengths)
    key_marks = torch.stack(_places(*keys, key_tokens), dim=1)
    codes = streams.table.view(streams.starts.shape[1], -1)
    bits = torch.ones_like(codes, dtype=torch.int64) << torch.arange(codes.shape[1], device=codes.device)
    words = torch.where(codes == FULL, bits, 0) + torch.where(codes == CAUSAL, bits << MAX_SEGMENTS, 0)
    word = torch.where(left > 0, words.sum(1).to(torch.int32)[segment.long()], 0)
    return torch.stack((word, left), dim=1), key_marks


def _places(starts: Tensor, lengths: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """int32 (the segment of every row, the rows from it to the end of the segment: none for a row that belongs to nobody)."""
    flat = _segments_of_rows(starts, tokens)
    ends = (starts + lengths).flatten()[flat.long()]
    rows = torch.arange(tokens, dtype=torch.int32, device=starts.device)
    return flat % starts.shape[1], (ends - rows).to(torch.int32)


def _segments_of_rows(starts: Tensor, tokens: int) -> Tensor:
    """int32 ``[tokens]``: among the segments of all samples, the one that each row stands in or behind."""
    rows = torch.arange(tokens, dtype=starts.dtype, device=starts.device)
    return (torch.searchsorted(starts.flatten(), rows, right=True, out_int32=True) - 1).clamp(min=0)


def _own_bias(call: Call) -> bool:
    """Every sample and head has a plane of the bias of its own."""
    return call.bias is not None and call.bias.shape[:2] == (call.starts.shape[0], call.heads[0].shape[1])


def _empty_bias_gradient(call: Call) -> Tensor:
    bias = call.distance_bias if call.bias is None else call.bias
    return bias.new_empty(bias.shape)


def _streams(call: Call) -> Streams:
    sample_ids = None if call.rng_state is None else call.sample_ids
    return Streams(call.starts, call.lengths, call.kv_starts, call.kv_lengths, call.kv_index, call.table, sample_ids)


def _scales(call: Call) -> tuple[float, float]:
    """(of the products, or of a biased score, in powers of two; of the products)."""
    return call.softmax_scale * LOG2_E if _plain(call) else LOG2_E, call.softmax_scale


def _plain(call: Call) -> bool:
    return call.bias is None and call.distance_bias is None


def _launch(
    kernel: Any, side: Side, heads: int, arguments: tuple[Any, ...], call: Call, bias: Bias, sizes: TileSizes, **flags: bool
) -> Launch:
    constants = {**_constants(call, sizes), "BIAS": bias.kind, "COORDINATES": bias.coordinates, **flags}
    return Launch(kernel, (side.tiles.shape[0], heads), arguments, constants, sizes.warps, sizes.stages)


def _constants(call: Call, sizes: TileSizes) -> dict[str, Any]:
    width = call.heads[0].shape[2]
    return {
        "QUERIES": sizes.queries,
        "KEYS": sizes.keys,
        "HEAD_DIM": width,
        "WIDTH": padded_head_dim(width),
        "DROPOUT": call.rng_state is not None,
    }


def _sizes(kernel: str, call: Call, architecture: int) -> TileSizes:
    q, _, _ = call.heads
    bias = None if _plain(call) else 0 if call.coordinates is None else call.coordinates.shape[1]
    return tile_sizes(kernel, q.dtype, q.shape[2], call.rng_state is not None, architecture, bias)


def _architecture(call: Call) -> int:
    return triton_runtime.architecture(call.starts.device)


def _nothing(call: Call) -> bool:
    """No samples, no rows or no heads: there is no tile to write the rows that belong to nobody."""
    return call.heads[0].numel() == 0 or call.starts.numel() == 0


def _bias_kernels() -> Any:
    from vlkernels.ops.attention.gpu import bias_kernels

    return bias_kernels


def _kernels() -> Any:
    from vlkernels.ops.attention.gpu import kernels

    return kernels
