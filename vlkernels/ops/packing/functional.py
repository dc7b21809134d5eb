"""Moving rows between padded, packed and per-segment tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from vlkernels.core import checks, dispatch, native
from vlkernels.core.dispatch import Facts, Implementation
from vlkernels.core.layout import MAX_TOKENS, SegmentLayout
from vlkernels.ops.packing import raw_ops, reference
from vlkernels.ops.packing.reference import Segments, streams_of

ADDED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _adds_in_float32(facts: Facts) -> str | None:
    if facts["adds_rows"] and facts["dtype"] not in ADDED_DTYPES:
        return f"it adds rows in float32, the rows are {facts['dtype']}"
    return None


IMPLEMENTATIONS = (
    Implementation(
        "cuda",
        devices=("cuda",),
        available=functools.partial(native.missing, "join_segments", "CUDA"),
        supports=_adds_in_float32,
    ),
    Implementation(
        "cpp",
        devices=("cpu",),
        available=functools.partial(native.missing, "join_segments", "CPU"),
        supports=_adds_in_float32,
    ),
    Implementation("reference"),
)


def pack(tensors: Sequence[Tensor], layout: SegmentLayout, *, impl: str = "auto") -> Tensor:
    """``out[starts[b, s] + t] = tensors[s][b, t]`` for ``t < lengths[b, s]``: padded segments, packed.

    Rows of ``out`` that belong to nobody (past the last sample, under a ``capacity``) are zero.

    Example:
        >>> import torch, vlkernels as vk
        >>> text, image = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
        >>> layout = vk.SegmentLayout([[3, 2], [1, 4]])
        >>> expected = torch.cat([text[0, :3], image[0, :2], text[1, :1], image[1, :4]])
        >>> torch.equal(vk.pack((text, image), layout), expected)
        True

    Args:
        tensors: one ``[B, T_s, ...]`` per segment, all of one dtype (any: features, ids, masks, boxes) and
            one ``...``; ``T_s`` at least ``layout.max_segment_lengths[s]``. The padding is never read.
        layout: on the device of the tensors.
        impl: ``"auto"``, ``"cuda"``, ``"cpp"`` or ``"reference"``.

    Returns:
        ``[num_tokens, ...]``, every row written once. A tensor that is not contiguous is copied first.

    Gradients: to every tensor that wants one, zeros in its padding; one pass.
    Numerics: bits are copied.
    Memory: the result; nothing is kept for the backward but the layout.
    Errors: ``ValueError`` where shapes, dtypes, devices or lengths disagree.
    Source: the unpadding of effective_transformer and of flash-attn's ``bert_padding``, without concatenation
        or index.
    """
    _check_padded(tensors, layout)
    if _resolve("pack", impl, tensors[0]) == "reference":
        return reference.pack(tensors, layout)
    parts = [tensor.contiguous() for tensor in tensors]
    part_of = list(range(layout.num_segments))
    return raw_ops.join_segments(parts, part_of, None, layout.starts, layout.lengths, layout.num_tokens)


def unpack(
    x: Tensor, layout: SegmentLayout, max_lengths: Sequence[int] | None = None, *, impl: str = "auto"
) -> tuple[Tensor, ...]:
    """``out[s][b, t] = x[starts[b, s] + t]`` for ``t < lengths[b, s]``, else 0: the inverse of :func:`pack`.

    Example:
        >>> import torch, vlkernels as vk
        >>> layout = vk.SegmentLayout([[3, 2], [1, 4]])
        >>> x = torch.randn(10, 8)
        >>> text, image = vk.unpack(x, layout)
        >>> expected = torch.nn.utils.rnn.pad_sequence([x[0:3], x[5:6]], batch_first=True)
        >>> torch.equal(text, expected), image.shape
        (True, torch.Size([2, 4, 8]))

    Args:
        x: ``[num_tokens, ...]``, any dtype.
        layout: on the device of ``x``.
        max_lengths: padded length of each segment, at least (and by default) ``layout.max_segment_lengths``.
        impl: ``"auto"``, ``"cuda"``, ``"cpp"`` or ``"reference"``.

    Returns:
        One ``[B, max_lengths[s], ...]`` per segment; every row, padding too, is written once.

    Gradients: to ``x``, zero in rows that belong to nobody; an output nobody used costs nothing.
    Numerics: bits are copied.
    Memory: the results; nothing is kept for the backward but the layout.
    Errors: ``ValueError`` where shapes, devices or lengths disagree.
    Source: ``pad_input`` of flash-attn's ``bert_padding``, into several tensors at once.
    """
    _check_packed(x, layout)
    widths = _checked_widths(layout, max_lengths)
    if _resolve("unpack", impl, x) == "reference":
        return reference.unpack(x, layout, widths)
    part_of = list(range(layout.num_segments))
    return tuple(raw_ops.split_segments(x.contiguous(), part_of, None, layout.starts, layout.lengths, widths))


def take_segments(
    x: Tensor, layout: SegmentLayout, segments: Segments, *, impl: str = "auto"
) -> Tensor | tuple[Tensor, ...]:
    """The rows of some segments, packed as ``layout.select(segments)`` says; several streams at once.

    ``segments=(1, 2)`` gives one tensor; ``segments=((0,), (1, 2))`` gives one per group, whose gradients
    come back in a single pass (per-segment feed-forward layers, heads).

    Example:
        >>> import torch, vlkernels as vk
        >>> layout = vk.SegmentLayout([[3, 2], [1, 4]])
        >>> x = torch.randn(10, 8)
        >>> text, image = vk.take_segments(x, layout, ((0,), (1,)))
        >>> torch.equal(image, torch.cat([x[3:5], x[6:10]]))
        True
        >>> torch.equal(vk.put_segments((text, image), layout, ((0,), (1,))), x)
        True

    Args:
        x: ``[num_tokens, ...]``, any dtype.
        layout: on the device of ``x``; may have gaps (``SegmentLayout.padded``).
        segments: segment indices in the order wanted, or groups of them; no segment twice.
        impl: ``"auto"``, ``"cuda"``, ``"cpp"`` or ``"reference"``.

    Returns:
        ``[layout.select(segments).num_tokens, ...]``, or a tuple of these. Where lengths are known on the
        device only, that is an upper bound and the rows past the last sample are zero.

    Gradients: to ``x``, zero in the rows of other segments; one pass for all groups.
    Numerics: bits are copied.
    Memory: the results; nothing is kept for the backward but the layout.
    Errors: ``ValueError`` for a wrong shape or device, unknown segments and segments named twice.
    Source: the modality experts of VLMo and BEiT-3, which split and concatenate padded tensors.
    """
    _check_packed(x, layout)
    streams, is_one = _checked_streams(layout, segments)
    if _resolve("take_segments", impl, x) == "reference":
        return reference.take_segments(x, layout, segments)
    rows = [layout.select(stream).num_tokens for stream in streams]
    part_of, part_starts = _parts(layout, streams)
    taken = raw_ops.split_segments(x.contiguous(), part_of, part_starts, layout.starts, layout.lengths, rows)
    return taken[0] if is_one else tuple(taken)


def put_segments(
    rows: Tensor | Sequence[Tensor], layout: SegmentLayout, segments: Segments, *, impl: str = "auto"
) -> Tensor:
    """The inverse of :func:`take_segments`: rows of some segments back to their places, zeros in all others.

    ``put_segments((a, b), layout, ((0,), (1, 2)))`` joins several streams in one pass, without an add.

    Example:
        >>> import torch, vlkernels as vk
        >>> layout = vk.SegmentLayout([[3, 2], [1, 4]])
        >>> image = torch.randn(6, 8)
        >>> expected = torch.zeros(10, 8)
        >>> expected[3:5], expected[6:10] = image[:2], image[2:]
        >>> torch.equal(vk.put_segments(image, layout, (1,)), expected)
        True

    Args:
        rows: ``[layout.select(segments).num_tokens, ...]``, any dtype; with groups, one such per group.
        layout: on the device of the rows.
        segments: as in :func:`take_segments`.
        impl: ``"auto"``, ``"cuda"``, ``"cpp"`` or ``"reference"``.

    Returns:
        ``[num_tokens, ...]``; every row is written once.

    Gradients: to the rows that want one.
    Numerics: bits are copied.
    Memory: the result; nothing is kept for the backward but the layout.
    Errors: ``ValueError`` for a wrong shape, dtype or device, unknown segments and segments named twice.
    Source: as :func:`take_segments`.
    """
    streams, is_one = _checked_streams(layout, segments)
    parts = [rows] if is_one or isinstance(rows, Tensor) else list(rows)
    _check_parts(parts, layout, streams)
    if _resolve("put_segments", impl, parts[0]) == "reference":
        return reference.put_segments(rows, layout, segments)
    part_of, part_starts = _parts(layout, streams)
    parts = [part.contiguous() for part in parts]
    starts, lengths, num_tokens = layout.starts, layout.lengths, layout.num_tokens
    return raw_ops.join_segments(parts, part_of, part_starts, starts, lengths, num_tokens)


def take_rows(x: Tensor, positions: Tensor, capacity: int | None = None, *, impl: str = "auto") -> Tensor:
    """``out[m] = x[positions[m]]``, 0 where the position is -1: masked tokens, [CLS], another sample order.

    Example:
        >>> import torch, vlkernels as vk
        >>> x = torch.randn(10, 8)
        >>> y = vk.take_rows(x, torch.tensor([4, 4, -1]), capacity=5)
        >>> torch.equal(y, torch.cat([x[[4, 4]], torch.zeros(3, 8)]))
        True

    Args:
        x: ``[N, ...]``, any dtype.
        positions: int32 or int64 ``[M]`` in ``[-1, N)``, on the device of ``x``; duplicates allowed.
        capacity: rows of the result, at least (and by default) ``M``; those past ``M`` are zero.
        impl: ``"auto"``, ``"cuda"``, ``"cpp"`` or ``"reference"``.

    Returns:
        ``[capacity, ...]``.

    Gradients: to ``x``, the sum over duplicates in the order of the positions: two runs agree bit for bit.
    Numerics: bits are copied; the backward adds in float32 (float64 for float64) and rounds once.
    Memory: the result; positions are kept for the backward, which sorts them on a CUDA device.
    Errors: ``ValueError`` for a wrong shape, dtype, device or capacity, and for positions out of range (on
        the CPU; elsewhere a device-side assertion).
    Source: ``index_select``, with rows that stay empty.
    """
    _check_tensor("x", x)
    checks.check_integer("positions", positions)
    checks.check_shape("positions", positions, "[M]", (None,))
    checks.check_same_device(x=x, positions=positions)
    if x.dim() == 0:
        raise ValueError("x must be [N, ...], got a tensor without dimensions")
    if capacity is not None:
        _check_count("capacity", capacity)
    if capacity is not None and capacity < positions.shape[0]:
        raise ValueError(f"capacity must be at least M = {positions.shape[0]}, got {capacity}")
    checks.check_values_between("positions", positions, -1, x.shape[0])
    if _resolve("take_rows", impl, x, adds_rows=x.requires_grad) == "reference":
        return reference.take_rows(x, positions, capacity)
    num_rows = positions.shape[0] if capacity is None else capacity
    return raw_ops.take_rows(x.contiguous(), positions.contiguous(), num_rows)


def segment_mean(x: Tensor, layout: SegmentLayout, segment: int, *, impl: str = "auto") -> Tensor:
    """``out[b]`` = mean of ``x[start : start + length]`` of the segment of sample b; 0 where it is empty.

    Example:
        >>> import torch, vlkernels as vk
        >>> layout = vk.SegmentLayout([[3, 2], [1, 4]])
        >>> x = torch.randn(10, 8)
        >>> expected = torch.stack([x[3:5].mean(0), x[6:10].mean(0)])
        >>> torch.allclose(vk.segment_mean(x, layout, 1), expected)
        True

    Args:
        x: ``[num_tokens, ...]``, floating.
        layout: on the device of ``x``.
        segment: which one.
        impl: ``"auto"``, ``"cuda"``, ``"cpp"`` or ``"reference"``.

    Returns:
        ``[B, ...]`` in the dtype of ``x``.

    Gradients: to ``x``: the sample's gradient over its length, zero in the rows of other segments.
    Numerics: added in float32 (float64 for float64), divided, rounded once.
    Memory: the result; nothing is kept for the backward but the layout.
    Errors: ``ValueError`` for a wrong shape, dtype or device, and for an unknown segment.
    Source: mean pooling over patches or tokens, as in SigLIP-style and sentence encoders.
    """
    checks.check_floating("x", x)
    _check_packed(x, layout)
    if not isinstance(segment, int) or not 0 <= segment < layout.num_segments:
        raise ValueError(f"segment must be an index below {layout.num_segments}, got {segment!r}")
    if _resolve("segment_mean", impl, x, adds_rows=True) == "reference":
        return reference.segment_mean(x, layout, segment)
    return raw_ops.mean_segment(x.contiguous(), layout.starts, layout.lengths, segment)


def _resolve(op: str, impl: str, x: Tensor, adds_rows: bool = False) -> str:
    return dispatch.resolve(op, impl, IMPLEMENTATIONS, x.device, {"dtype": x.dtype, "adds_rows": adds_rows})


def _parts(layout: SegmentLayout, streams: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
    """Which stream holds each segment (-1: none), and int32 ``[B, S]``: the row where it begins there."""
    part_of = [-1] * layout.num_segments
    columns = list(layout.starts.unbind(1))
    for part, stream in enumerate(streams):
        starts = layout.select(stream).starts
        for column, s in enumerate(stream):
            part_of[s], columns[s] = part, starts[:, column]
    return part_of, torch.stack(columns, dim=1)


def _check_padded(tensors: Sequence[Tensor], layout: SegmentLayout) -> None:
    _check_layout(layout)
    if not isinstance(tensors, (tuple, list)) or len(tensors) != layout.num_segments:
        got = len(tensors) if isinstance(tensors, (tuple, list)) else f"a {type(tensors).__name__}"
        raise ValueError(f"tensors must be one per segment = {layout.num_segments}, got {got}")
    for s, tensor in enumerate(tensors):
        _check_tensor(f"tensors[{s}]", tensor)
    trailing = tensors[0].shape[2:]
    for s, (tensor, longest) in enumerate(zip(tensors, layout.max_segment_lengths)):
        name = f"tensors[{s}]"
        checks.check_shape(name, tensor, "[B, T, ...]", (layout.num_samples, None, *trailing))
        checks.check_dtype(name, tensor, (tensors[0].dtype,))
        checks.check_same_device(**{name: tensor}, layout=layout.starts)
        if tensor.shape[1] < longest:
            raise ValueError(
                f"{name} must be [B, T, ...] with T >= its longest segment = {longest}, "
                f"got T = {tensor.shape[1]}"
            )


def _check_packed(x: Tensor, layout: SegmentLayout) -> None:
    _check_layout(layout)
    _check_tensor("x", x)
    checks.check_shape("x", x, "[num_tokens, ...]", (layout.num_tokens, *x.shape[1:]))
    checks.check_same_device(x=x, layout=layout.starts)


def _check_parts(parts: Sequence[Tensor], layout: SegmentLayout, streams: Sequence[Sequence[int]]) -> None:
    if len(parts) != len(streams):
        raise ValueError(f"rows must be one tensor per group of segments = {len(streams)}, got {len(parts)}")
    for number, (part, stream) in enumerate(zip(parts, streams)):
        name = f"rows[{number}]" if len(parts) > 1 else "rows"
        _check_tensor(name, part)
        num_rows = layout.select(stream).num_tokens
        checks.check_shape(name, part, "[rows of its segments, ...]", (num_rows, *parts[0].shape[1:]))
        checks.check_dtype(name, part, (parts[0].dtype,))
        checks.check_same_device(**{name: part}, layout=layout.starts)


def _checked_widths(layout: SegmentLayout, max_lengths: Sequence[int] | None) -> list[int]:
    if max_lengths is None:
        return list(layout.max_segment_lengths)
    widths = list(max_lengths) if isinstance(max_lengths, (tuple, list)) else [max_lengths]
    for width in widths:
        _check_count("max_lengths", width)
    if len(widths) != layout.num_segments:
        raise ValueError(f"max_lengths must be one per segment = {layout.num_segments}, got {len(widths)}")
    if any(width < longest for width, longest in zip(widths, layout.max_segment_lengths)):
        raise ValueError(f"max_lengths must be at least {list(layout.max_segment_lengths)}, got {widths}")
    return widths


def _checked_streams(layout: SegmentLayout, segments: Segments) -> tuple[tuple[tuple[int, ...], ...], bool]:
    _check_layout(layout)
    is_sequence = isinstance(segments, (tuple, list, range))
    are_alike = is_sequence and len({isinstance(s, (tuple, list)) for s in segments}) == 1
    streams, is_one = streams_of(segments) if are_alike else (((),), True)
    named = [s for stream in streams for s in stream]
    are_known = all(isinstance(s, int) and 0 <= s < layout.num_segments for s in named)
    if not are_known or len(set(named)) != len(named) or not all(streams):
        raise ValueError(
            f"segments must be indices below {layout.num_segments}, or groups of them, none twice and no empty group, "
            f"got {segments}"
        )
    return streams, is_one


def _check_layout(layout: SegmentLayout) -> None:
    if not isinstance(layout, SegmentLayout):
        raise ValueError(f"layout must be a SegmentLayout, got a {type(layout).__name__}")


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a Tensor, got a {type(tensor).__name__}")


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, (int, torch.SymInt)) or value > MAX_TOKENS:
        raise ValueError(f"{name} must be an integer below 2**31, got {value!r}")
