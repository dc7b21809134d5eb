"""The work list of attention by its definition, in plain Python: what the kernels of work_list_kernels.py must build."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch

import vlkernels as vk
from vlkernels.core.mask import CAUSAL, FULL, NONE
from vlkernels.ops.attention.gpu.work_list import Streams

CELLS = ("none", "full", "causal")


class Run(NamedTuple):
    begin: int
    end: int
    fixed: int
    slope: int
    origin: int
    identity: int


class Tile(NamedTuple):
    first: int
    begin: int
    end: int
    stop: int
    origin: int
    identity: int
    runs: tuple[Run, ...]


def query_side(streams, tokens, block):
    queries, keys = _spans(streams)
    codes = streams.table.view(len(queries[0]), -1).tolist()

    def runs(sample, segment):
        read = sample if streams.kv_index is None else int(streams.kv_index[sample])
        found = _query_runs(codes[segment], keys[read], queries[sample][segment][1])
        return [Run(*run, keys[read][0][0], 0) for run in found]

    return _tiles(queries, codes, runs, _identities(streams), tokens, block, 1)


def key_side(streams, tokens, block, multiple=1):
    queries, keys = _spans(streams)
    columns = streams.table.view(len(queries[0]), -1).T.tolist()
    identities = _identities(streams)

    def runs(sample, segment):
        readers = [b for b in range(len(queries)) if sample == (b if streams.kv_index is None else int(streams.kv_index[b]))]
        found = [(b, _key_runs(columns[segment], queries[b], keys[sample][segment][1])) for b in readers]
        return [Run(*run, queries[b][0][0], identities[b]) for b, its in found for run in its]

    return _tiles(keys, columns, runs, [0] * len(keys), tokens, block, multiple)


def _query_runs(row, keys, query_end):
    """A run ends with a causal segment, or before one that is hidden."""
    runs, opened = [], None
    for segment, code in enumerate(row):
        if code == NONE:
            continue
        opened = segment if opened is None else opened
        if code == CAUSAL or segment + 1 == len(row) or row[segment + 1] == NONE:
            begin, end = keys[opened][0], keys[segment][1]
            runs.append((begin, end, keys[segment][0] if code == CAUSAL else end, end - query_end))
            opened = None
    return [run for run in runs if run[0] < run[1]]


def _key_runs(column, queries, key_end):
    """A run begins with a causal segment, or with a full one that follows none."""
    runs, is_open = [], False
    for (begin, end), code in zip(queries, column):
        if code == CAUSAL or (code == FULL and not is_open):
            runs.append([begin, end, end if code == CAUSAL else begin, key_end - end])
        elif code == FULL:
            runs[-1][1] = end
        is_open = code != NONE
    return [run for run in runs if run[0] < run[1]]


def _tiles(spans, codes, runs_of, identities, tokens, block, multiple):
    groups = []
    for sample, segments in enumerate(spans):
        origin = segments[0][0]
        behind = spans[sample + 1][0][0] if sample + 1 < len(spans) else tokens
        for first, last in _groups(codes):
            begin, end = segments[first][0], segments[last][1]
            stop = behind if last + 1 == len(segments) else end
            start = origin + (begin - origin) // multiple * multiple
            runs = tuple(runs_of(sample, first))
            places = range(start, stop, block)[::-1]  # the last tile of a group has most to do below a diagonal
            tiles = [Tile(place, begin, end, stop, origin, identities[sample], runs) for place in places]
            groups.append((sum(run.end - run.begin for run in runs), tiles))
    return [tile for _, tiles in sorted(groups, key=lambda group: -group[0]) for tile in tiles]


def _groups(codes):
    """(first, last) segment of each group: neighbours that see the same without a causal cell."""
    groups = []
    for segment, row in enumerate(codes):
        if segment and row == codes[segment - 1] and CAUSAL not in row:
            groups[-1] = (groups[-1][0], segment)
        else:
            groups.append((segment, segment))
    return groups


def _spans(streams):
    """[(begin, end) of every segment] of every sample, of the queries and of the keys."""

    def spans(starts, lengths):
        return [[(s, s + n) for s, n in zip(*rows)] for rows in zip(starts.tolist(), lengths.tolist())]

    queries = spans(streams.starts, streams.lengths)
    return queries, queries if streams.kv_starts is None else spans(streams.kv_starts, streams.kv_lengths)


def _identities(streams):
    return [0] * len(streams.starts) if streams.sample_ids is None else streams.sample_ids.tolist()


def listed(side):
    """The tiles with rows of a work list that was built, in its order."""
    runs = [Run(*row) for row in side.runs.tolist()]
    tiles = []
    for first, begin, end, stop, run, last_run, origin, identity in side.tiles.tolist():
        if first < stop:
            met = tuple(r for r in runs[run:last_run] if r.begin < r.end)
            tiles.append(Tile(first, begin, end, stop, origin, identity, met))
    return tiles


def streams_of(layout, mask, keys=None, index=None, with_ids=True):
    other = (None, None) if keys is None else (keys.starts, keys.lengths)
    return Streams(layout.starts, layout.lengths, *other, index, mask.table("cpu"), layout.sample_ids if with_ids else None)


def draw_streams(seed):
    """Random layouts and table, as the raw op takes them, with the layouts and the mask."""
    draw = random.Random(seed)
    samples, segments, longest = draw.choice((1, 2, 5, 40)), draw.choice((1, 2, 2, 3, 4)), draw.choice((1, 3, 20, 70))

    def lengths(count, width):
        return [[draw.choice((0, 1, draw.randint(0, longest))) for _ in range(width)] for _ in range(count)]

    rows = lengths(samples, segments)
    layout = vk.SegmentLayout(rows, capacity=sum(map(sum, rows)) + draw.choice((0, 1, 50)))
    keys, index = layout, None
    if draw.random() < 0.5:
        keys = vk.SegmentLayout(lengths(draw.choice((samples, 3, 33)), draw.choice((1, 2, 3))))
    elif segments == 1:
        layout = keys = vk.SegmentLayout.padded(layout.lengths[:, 0], longest)
    elif draw.random() < 0.5:
        layout = keys = layout.take(torch.tensor([draw.randrange(samples) for _ in range(samples)]))
    if keys.num_samples != samples or draw.random() < 0.4:
        index = torch.tensor([draw.randrange(keys.num_samples) for _ in range(samples)])
        index = index.to(draw.choice((torch.int32, torch.int64)))
    columns = range(keys.num_segments)
    cells = [[draw.choice(CELLS if keys is not layout or q == k else CELLS[:2]) for k in columns] for q in range(segments)]
    mask = draw.choice((vk.SegmentMask(cells), vk.SegmentMask([["full"] * keys.num_segments] * segments)))
    streams = streams_of(layout, mask, None if keys is layout else keys, index, draw.random() < 0.7)
    return streams, layout, keys, mask
