"""Which tiles a packed batch has and which rows each of them meets, built on the device by one kernel a side: nothing waits.

A *group* is the rows of one segment, or of neighbouring segments that see (or are seen by) the same rows without a causal cell,
so a table that is full everywhere cuts a sample at its ends only. Tiles are cut from groups. The last group of a sample reaches
to the next sample: rows that belong to nobody are written by its tiles.

A *run* is a range of rows of the other stream that a group meets, bounded by a line: query ``i`` sees key ``j`` when ``j <= i +
slope`` in rows of the packed tensors, or when ``j`` (for the runs of a key group: ``i``) lies on the free side of ``fixed``. A
causal segment and the full ones before it (for keys: after it) make one run, so a row of prefix-LM is a single range.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlkernels.core import triton_runtime
from vlkernels.core.kept import kept
from vlkernels.core.triton_runtime import Launch

# Columns of Side.tiles; every tile of ``block`` rows starts at ``first``, its group's rows are [begin, end), and it answers for
# rows up to ``stop``; a tile without rows has stop = first.
TILE_FIELDS = ("first", "begin", "end", "stop", "run", "last_run", "origin", "identity")
# Columns of Side.runs; a run without rows has end = begin. Runs that no tile names are not written.
RUN_FIELDS = ("begin", "end", "fixed", "slope", "origin", "identity")
# Both name the first row of their sample (``origin``) and the sample id of the random draw (``identity``, queries only).

WIDTHS = {"TILE_WIDTH": len(TILE_FIELDS), "RUN_WIDTH": len(RUN_FIELDS)}
# Groups of a program, groups it measures at once, warps.
GROUPS, OTHERS, WARPS = 32, 128, 8


class Side(NamedTuple):
    """The tiles of one stream, longest first, and the runs they meet; int32 on the device."""

    tiles: Tensor
    runs: Tensor


class Streams(NamedTuple):
    """The tensors that say where the rows of both streams lie; see the schema of the raw op."""

    starts: Tensor
    lengths: Tensor
    kv_starts: Tensor | None
    kv_lengths: Tensor | None
    kv_index: Tensor | None
    table: Tensor
    sample_ids: Tensor | None


def query_side(streams: Streams, tokens: int, block: int) -> Side:
    """Tiles of ``block`` queries and the runs of keys each of them sees."""
    return kept(("queries", tokens, block), streams, lambda: _filled(*query_launches(streams, tokens, block)))


def key_side(streams: Streams, tokens: int, block: int, multiple: int = 1) -> Side:
    """Tiles of ``block`` keys and the runs of queries that see them, reader after reader.

    Tiles start at a multiple of ``multiple`` rows of their sample, before the group's first row if need be.
    """
    return kept(("keys", tokens, block, multiple), streams, lambda: _filled(*key_launches(streams, tokens, block, multiple)))


def query_launches(streams: Streams, tokens: int, block: int) -> tuple[Side, list[Launch]]:
    """A side without values, and what gives it values."""
    starts, lengths, kv_starts, kv_lengths = _both(streams)
    (samples, segments), key_segments = starts.shape, kv_starts.shape[1]
    side = _room(starts, starts, kv_starts, tokens, block, 1)
    arguments = (
        *side, starts, lengths, kv_starts, kv_lengths, streams.kv_index, streams.table, streams.sample_ids,
        samples, segments, key_segments, tokens, len(side.tiles), block,
    )  # fmt: skip
    return side, [_launch(_kernels().query_side_kernel, samples * segments, arguments, WIDTHS)]


def key_launches(streams: Streams, tokens: int, block: int, multiple: int) -> tuple[Side, list[Launch]]:
    """A side without values, and what gives it values."""
    starts, lengths, kv_starts, kv_lengths = _both(streams)
    (samples, segments), (key_samples, key_segments) = starts.shape, kv_starts.shape
    side = _room(kv_starts, starts, kv_starts, tokens, block, multiple)
    launches, readers = [], (None, None, lengths)
    if streams.kv_index is not None:
        readers = tuple(starts.new_empty(shape) for shape in ((samples,), (key_samples + 1,), (key_samples, segments)))
        arguments = (*readers, streams.kv_index, lengths, samples, key_samples, segments)
        launches.append(_launch(_kernels().readers_kernel, max(samples, key_samples + 1) * segments, arguments, {}))
    arguments = (
        *side, starts, lengths, kv_starts, kv_lengths, streams.kv_index, streams.table, streams.sample_ids, *readers,
        samples, key_samples, segments, key_segments, tokens, len(side.tiles), block, multiple,
    )  # fmt: skip
    launches.append(_launch(_kernels().key_side_kernel, max(samples, key_samples) * key_segments, arguments, WIDTHS))
    return side, launches


def work_list_launches(architecture: int) -> dict[str, Launch]:
    """The kernels of both sides for the static report, the same on every architecture: with sample ids, keys and an index."""
    like = torch.empty((2, 2), dtype=torch.int32)
    streams = Streams(like, like, like, like, like[0], like, like[0])
    launches = query_launches(streams, 64, 64)[1] + key_launches(streams, 64, 64, 16)[1]
    return {launch.kernel.fn.__name__.removesuffix("_kernel"): launch for launch in launches}


def _both(streams: Streams) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert all(t is None or t.is_contiguous() for t in streams), "the kernels read these tensors without strides"
    if streams.kv_starts is None or streams.kv_lengths is None:
        return streams.starts, streams.lengths, streams.starts, streams.lengths
    return streams.starts, streams.lengths, streams.kv_starts, streams.kv_lengths


def _room(own: Tensor, starts: Tensor, kv_starts: Tensor, tokens: int, block: int, multiple: int) -> Side:
    """As many tiles as there can be, which the host knows: tiles past the real ones have no rows."""
    groups = own.numel()
    tiles = (tokens + groups * (multiple - 1)) // block + groups
    return Side(own.new_empty((tiles, len(TILE_FIELDS))), own.new_empty((starts.numel() * kv_starts.shape[1], len(RUN_FIELDS))))


def _launch(kernel: Any, groups: int, arguments: tuple[Any, ...], widths: dict[str, int]) -> Launch:
    return Launch(kernel, (-(-groups // GROUPS),), arguments, {"GROUPS": GROUPS, "OTHERS": OTHERS, **widths}, WARPS, 1)


def _filled(side: Side, launches: list[Launch]) -> Side:
    """Where no kernel runs a list has no tiles: a launch that takes it can be compiled, for a card that is not there."""
    device = side.tiles.device.type
    if device == "meta" or triton_runtime.missing(device):
        return Side(side.tiles.zero_(), side.runs.zero_())
    for launch in launches:
        launch.run()
    return side


def _kernels() -> Any:
    from vlkernels.ops.attention.gpu import work_list_kernels

    return work_list_kernels
