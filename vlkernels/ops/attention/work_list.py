"""Which tiles a packed batch has and which rows each of them meets, built on the device by small operators: nothing waits.

A *group* is the rows of one segment, or of neighbouring segments that see (or are seen by) the same rows without a causal cell,
so a table that is full everywhere cuts a sample at its ends only. Tiles are cut from groups. The last group of a sample reaches
to the next sample: rows that belong to nobody are written by its tiles.

A *run* is a range of rows of the other stream that a group meets, bounded by a line: query ``i`` sees key ``j`` when ``j <= i +
slope`` in rows of the packed tensors, or when ``j`` (for the runs of a key group: ``i``) lies on the free side of ``fixed``. A
causal segment and the full ones before it (for keys: after it) make one run, so a row of prefix-LM is a single range.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from vlkernels.core.layout import lasting
from vlkernels.core.mask import CAUSAL, FULL, NONE

# Columns of Side.tiles; every tile of ``block`` rows starts at ``first``, its group's rows are [begin, end), and it answers for
# rows up to ``stop``; a tile without rows has stop = first.
TILE_FIELDS = ("first", "begin", "end", "stop", "run", "last_run", "origin", "identity")
# Columns of Side.runs; a run without rows has end = begin.
RUN_FIELDS = ("begin", "end", "fixed", "slope", "origin", "identity")
# Both name the first row of their sample (``origin``) and the sample id of the random draw (``identity``, queries only).

Made = TypeVar("Made")


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


class Table(NamedTuple):
    """What a mask table says of one side by itself, for groups of its segments [G] and the segments of the other side [C].

    A run opens at (g, c) where ``opens``, and reaches to segment ``last``; ``causal``: its causal segment is there (the last one
    of a run of keys, the first one of a run of queries). A group opens at segment g where ``leads``, and reaches to ``members``.
    """

    opens: Tensor
    last: Tensor
    causal: Tensor
    leads: Tensor
    members: Tensor


def query_side(streams: Streams, tokens: int, block: int) -> Side:
    """Tiles of ``block`` queries and the runs of keys each of them sees."""
    return _kept(("queries", tokens, block), streams, lambda: _query_side(streams, tokens, block))


def key_side(streams: Streams, tokens: int, block: int, multiple: int = 1) -> Side:
    """Tiles of ``block`` keys and the runs of queries that see them, reader after reader.

    Tiles start at a multiple of ``multiple`` rows of their sample, before the group's first row if need be.
    """
    return _kept(("keys", tokens, block, multiple), streams, lambda: _key_side(streams, tokens, block, multiple))


_made: collections.OrderedDict[tuple[Any, ...], tuple[tuple[weakref.ref[Tensor] | None, ...], Any]] = collections.OrderedDict()
MOST_KEPT = 64


def _kept(name: tuple[Any, ...], tensors: Sequence[Tensor | None], make: Callable[[], Made]) -> Made:
    """``make()``, kept while the tensors it was made from live unchanged: the layers of a model share a work list."""
    present = [t for t in tensors if t is not None]
    if any(_must_not_keep(t) for t in present):
        return make()
    key = (*name, *(None if t is None else (id(t), t._version) for t in tensors), _stream(present[0]))
    found = _made.get(key)
    if found is not None and all(t is None or r() is t for r, t in zip(found[0], tensors)):
        _made.move_to_end(key)
        return found[1]
    made = lasting(make)
    _made[key] = tuple(None if t is None else weakref.ref(t) for t in tensors), made
    if len(_made) > MOST_KEPT:
        _made.popitem(last=False)
    return made


def _must_not_keep(tensor: Tensor) -> bool:
    """A captured graph is replayed with other lengths in the same tensors; inference tensors do not count their changes."""
    return tensor.is_inference() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _query_side(streams: Streams, tokens: int, block: int) -> Side:
    starts, ends, kv_starts, kv_ends = _bounds(streams)
    segments, key_segments = starts.shape[1], kv_starts.shape[1]
    table = _kept(("query table", segments), (streams.table,), lambda: _query_table(streams.table.view(segments, -1)))
    read = None if streams.kv_index is None else streams.kv_index.long()
    key_starts, key_ends = (kv_starts, kv_ends) if read is None else (kv_starts[read], kv_ends[read])

    last_end = key_ends[:, table.last]
    run_begin = torch.where(table.opens, key_starts[:, None], 0)
    run_end = torch.where(table.opens, last_end, 0)
    fixed = torch.where(table.causal, key_starts[:, table.last], run_end)
    runs = _columns(run_begin, run_end, fixed, last_end - ends[:, :, None], key_starts[:, :1, None], 0)

    first_run = torch.arange(0, starts.numel() * key_segments, key_segments, dtype=torch.int32, device=starts.device)
    first_run = first_run.view(starts.shape)
    identity = 0 if streams.sample_ids is None else streams.sample_ids[:, None]
    met = (run_end - run_begin).sum(2)
    tiles = _tiles(starts, ends, table, met, tokens, block, 1, first_run, first_run + key_segments, identity)
    return Side(tiles, runs.view(-1, len(RUN_FIELDS)))


def _query_table(codes: Tensor) -> Table:
    opens = (codes != NONE) & (_before(codes) != FULL)
    last = _first_after((codes == CAUSAL) | ((codes != NONE) & (_after(codes) == NONE)))
    return Table(opens, last, codes.gather(1, last) == CAUSAL, *_groups(codes))


def _key_side(streams: Streams, tokens: int, block: int, multiple: int) -> Side:
    starts, ends, kv_starts, kv_ends = _bounds(streams)
    (samples, segments), (key_samples, key_segments) = starts.shape, kv_starts.shape
    table = _kept(("key table", segments), (streams.table,), lambda: _key_table(streams.table.view(segments, -1).T))
    bounds = torch.arange(key_samples + 1, dtype=torch.int32, device=starts.device)
    key_ends, identity = kv_ends, streams.sample_ids
    if streams.kv_index is not None:
        read, readers = streams.kv_index.sort(stable=True)  # the readers of a key sample follow each other, in their order
        bounds = torch.searchsorted(read, bounds.to(read.dtype), out_int32=True)
        starts, ends, key_ends = starts[readers], ends[readers], kv_ends[read.long()]
        identity = None if identity is None else identity[readers]

    # [key segment, reader, query segment]: the runs of a key group are one range.
    run_begin = torch.where(table.opens[:, None], starts, 0)
    run_end = torch.where(table.opens[:, None], ends[:, table.last].transpose(0, 1), 0)
    fixed = torch.where(table.causal[:, None], ends, run_begin)
    slope = key_ends.T[:, :, None] - ends
    runs = _columns(run_begin, run_end, fixed, slope, starts[:, :1], 0 if identity is None else identity[:, None])

    met = torch.nn.functional.pad((run_end - run_begin).sum(2).cumsum(1), (1, 0))[:, bounds.long()].diff().T
    column = torch.arange(key_segments, dtype=torch.int32, device=starts.device) * (samples * segments)
    border = column + segments * bounds[:, None]
    tiles = _tiles(kv_starts, kv_ends, table, met, tokens, block, multiple, border[:-1], border[1:], 0)
    return Side(tiles, runs.view(-1, len(RUN_FIELDS)))


def _key_table(columns: Tensor) -> Table:
    opens = (columns == CAUSAL) | ((columns == FULL) & (_before(columns) == NONE))
    last = _first_after((columns != NONE) & (_after(columns) != FULL))
    return Table(opens, last, columns == CAUSAL, *_groups(columns))


def _groups(codes: Tensor) -> tuple[Tensor, Tensor]:
    """(bool: a group opens at the segment, int64: the last segment of its group): equal rows without causal cells are one."""
    cuts = (codes[1:] != codes[:-1]).any(1) | (codes[1:] == CAUSAL).any(1)
    leads = torch.nn.functional.pad(cuts, (1, 0), value=True)
    return leads, _first_after(torch.nn.functional.pad(cuts, (0, 1), value=True)[None])[0]


def _bounds(streams: Streams) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    starts, lengths = streams.starts, streams.lengths
    kv_starts = starts if streams.kv_starts is None else streams.kv_starts
    kv_lengths = lengths if streams.kv_lengths is None else streams.kv_lengths
    return starts, starts + lengths, kv_starts, kv_starts + kv_lengths


def _tiles(
    starts: Tensor,
    ends: Tensor,
    table: Table,
    met: Tensor,
    tokens: int,
    block: int,
    multiple: int,
    first_run: Tensor,
    last_run: Tensor,
    identity: Tensor | int,
) -> Tensor:
    """``[N, TILE_FIELDS]`` from the groups of ``[B, S]`` segments; ``met``: how many rows each meets.

    N is a bound that the host knows: tiles past the real ones have no rows.
    """
    origin = starts[:, :1].expand_as(starts)
    end = ends[:, table.members]
    next_sample = torch.nn.functional.pad(starts[1:, 0], (0, 1), value=tokens)[:, None]
    stop = torch.where(table.members == starts.shape[1] - 1, next_sample, end)
    begin = starts if multiple == 1 else origin + (starts - origin) // multiple * multiple
    count = torch.where(table.leads, (stop - begin + (block - 1)).clamp(min=0) // block, 0).flatten()

    order = met.flatten().argsort(descending=True, stable=True)
    fields = _columns(begin, starts, end, stop, first_run, last_run, origin, identity).view(-1, len(TILE_FIELDS))[order]
    past = count[order].cumsum(0, dtype=torch.int32)
    most = (tokens + starts.numel() * (multiple - 1)) // block + starts.numel()
    number = torch.arange(most, dtype=torch.int32, device=starts.device)
    group = torch.searchsorted(past, number, right=True)
    real = group < past.numel()
    group = group.clamp(max=past.numel() - 1)
    tiles = fields[group]
    # The last tile of a group comes first: below a diagonal it has most to do.
    tiles.select(1, 0).add_((past[group] - 1 - number) * block)
    return torch.where(real[:, None], tiles, 0)


def _columns(*columns: Tensor | int) -> Tensor:
    """int32 ``[..., len(columns)]`` of columns that broadcast."""
    device = next(c.device for c in columns if isinstance(c, Tensor))
    tensors = [c if isinstance(c, Tensor) else torch.full((), c, dtype=torch.int32, device=device) for c in columns]
    return torch.stack([t.to(torch.int32) for t in torch.broadcast_tensors(*tensors)], dim=-1)


def _before(codes: Tensor) -> Tensor:
    return torch.nn.functional.pad(codes[:, :-1], (1, 0), value=NONE)


def _after(codes: Tensor) -> Tensor:
    return torch.nn.functional.pad(codes[:, 1:], (0, 1), value=NONE)


def _first_after(marks: Tensor) -> Tensor:
    """int64, for every place of a row the first marked place from it on (the last place where there is none)."""
    places = torch.arange(marks.shape[1], device=marks.device)
    return torch.where(marks, places, marks.shape[1] - 1).flip(1).cummin(1).values.flip(1)
