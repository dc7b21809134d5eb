"""Which attention calls a packed batch needs: blocks of visible pairs, batched into tiles of like shape.

Host integers in, index tensors out; no data is touched. A plan depends on the lengths and the table alone, so the layers of
a model and both directions share one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlkernels.core.mask import CAUSAL, FULL, NONE

# Padded scores that cost no more than the host time of one more tile.
WASTED_SCORES = 2**14
# Shorter rows of keys are rounded up to whole vectors: softmax is several times slower on the tails.
KEY_MULTIPLE, ROUNDED_KEYS = 16, 64
NEVER = 2**30

Ints = tuple[int, ...]


class Block(NamedTuple):
    """Queries ``[query, query + queries)`` of a sample against its keys ``[key, key + keys)``, as positions in the sample.

    ``cells`` is ``None`` when every query sees every key, else the (code, length) of the key segments.
    """

    query: int
    queries: int
    key: int
    keys: int
    cells: tuple[tuple[int, int], ...] | None

    def release(self) -> Tensor:
        """int32 ``[keys]``: query ``i`` of the block sees key ``j`` when ``i >= release[j]``."""
        if self.cells is None:
            return torch.zeros(self.keys, dtype=torch.int32)
        parts = []
        for code, length in self.cells:
            if code == CAUSAL:
                parts.append(torch.arange(self.queries - length, self.queries, dtype=torch.int32))
            else:
                parts.append(torch.full((length,), 0 if code == FULL else NEVER, dtype=torch.int32))
        return torch.cat(parts)


class Instance(NamedTuple):
    """A block in a batch: its sample, and the packed rows of its first query and first key."""

    block: Block
    sample: int
    query_row: int
    key_row: int


@dataclass(frozen=True)
class Tile:
    """Blocks of like shape, each padded to ``queries`` x ``keys`` by repeating its last row.

    ``query_rows`` and ``key_rows`` name the packed rows, a slice where they follow each other. ``statistic_rows`` are the
    query rows with one past the end for padding. ``mask`` is added to the scores and broadcasts to
    ``[n, H, queries, keys]``: 0 where a query sees a key, -inf elsewhere; ``None`` when all is seen, or what the plain
    ``causal`` triangle shows.
    """

    instances: tuple[Instance, ...]
    queries: int
    keys: int
    query_rows: Tensor | slice
    key_rows: Tensor | slice
    statistic_rows: Tensor | slice
    mask: Tensor | None
    causal: bool


@dataclass(frozen=True)
class Side:
    """Where the rows of the tiles, laid end to end, come from and go to.

    ``rows`` is the packed row of each. ``places`` is where each packed row stands, one past the end if nowhere; ``None`` when
    one stands in several places. ``identity`` says that the tiles hold the packed rows in their order.
    """

    tokens: int
    rows: Tensor
    places: Tensor | None
    identity: bool


@dataclass(frozen=True)
class Plan:
    queries: Side
    keys: Side
    tiles: tuple[Tile, ...]


def visible_blocks(q_lengths: Sequence[int], k_lengths: Sequence[int], table: Sequence[int]) -> list[Block]:
    """The blocks of one sample; every query that sees anything stands in exactly one."""
    blocks: list[Block] = []
    start = 0
    for segment, length in enumerate(q_lengths):
        codes = table[segment * len(k_lengths) : (segment + 1) * len(k_lengths)]
        block = _segment_block(start, length, k_lengths, codes) if length else None
        if block is not None:
            last = blocks[-1] if blocks else None
            if last is not None and _continues(last, block):
                blocks[-1] = last._replace(queries=last.queries + block.queries)
            else:
                blocks.append(block)
        start += length
    return blocks


def _segment_block(start: int, length: int, k_lengths: Sequence[int], codes: Sequence[int]) -> Block | None:
    cells, first, position = [], None, 0
    for code, keys in zip(codes, k_lengths):
        if keys and (code != NONE or cells):
            # The last query of a segment sees all keys of a causal cell.
            cells.append((FULL if code == CAUSAL and length == 1 else code, keys))
            first = position if first is None else first
        position += keys
    while cells and cells[-1][0] == NONE:
        cells.pop()
    if not cells:
        return None
    blind = 0 if any(code == FULL for code, _ in cells) else length - max(keys for code, keys in cells if code == CAUSAL)
    blind = max(blind, 0)
    full = all(code == FULL for code, _ in cells)
    return Block(start + blind, length - blind, first, sum(keys for _, keys in cells), None if full else tuple(cells))


def _continues(last: Block, block: Block) -> bool:
    adjacent = last.query + last.queries == block.query
    return adjacent and last.cells is None and block.cells is None and (last.key, last.keys) == (block.key, block.keys)


@functools.lru_cache(maxsize=16)
def make_plan(
    q_starts: Ints,
    q_lengths: Ints,
    k_starts: Ints,
    k_lengths: Ints,
    kv_index: Ints | None,
    table: Ints,
    segments: tuple[int, int],
    tokens: tuple[int, int],
    heads: int,
    most_scores: int,
) -> Plan:
    """The plan of a batch: flattened ``[B, S]`` starts and lengths of both sides; ``segments`` and ``tokens`` of (q, k).

    A tile of several blocks holds at most ``most_scores`` scores.
    """
    # A plan outlives the call that made it: whatever the caller's default device or inference mode, these are plain CPU tensors.
    with torch.device("cpu"), torch.inference_mode(False):
        return _plan_tiles(
            _instances(q_starts, q_lengths, k_starts, k_lengths, kv_index, table, segments), tokens, heads, most_scores
        )


def _plan_tiles(instances: list[Instance], tokens: tuple[int, int], heads: int, most_scores: int) -> Plan:
    tiles, q_parts, k_parts = [], [], []
    for group in _groups(instances, heads, most_scores):
        queries, keys = max(i.block.queries for i in group), max(i.block.keys for i in group)
        keys = keys if all(i.block.keys == keys for i in group) else _rounded(keys)
        q_rows, q_real = _rows([(i.query_row, i.block.queries) for i in group], queries)
        k_rows, k_real = _rows([(i.key_row, i.block.keys) for i in group], keys)
        aligned = bool(q_real.all()) and bool(k_real.all())
        causal = aligned and all(i.block.cells == ((CAUSAL, queries),) for i in group)
        tiles.append(
            Tile(
                tuple(group),
                queries,
                keys,
                _as_slice(q_rows),
                _as_slice(k_rows),
                _as_slice(q_rows) if bool(q_real.all()) else torch.where(q_real, q_rows, tokens[0]),
                None if causal else _mask(group, queries, keys),
                causal,
            )
        )
        q_parts.append((q_rows, q_real))
        k_parts.append((k_rows, k_real))
    return Plan(_side(q_parts, tokens[0]), _side(k_parts, tokens[1]), tuple(tiles))


def _instances(
    q_starts: Ints,
    q_lengths: Ints,
    k_starts: Ints,
    k_lengths: Ints,
    kv_index: Ints | None,
    table: Ints,
    segments: tuple[int, int],
) -> list[Instance]:
    sq, sk = segments
    blocks = functools.cache(visible_blocks)
    found = []
    for sample in range(len(q_lengths) // sq):
        source = sample if kv_index is None else kv_index[sample]
        lengths, key_lengths = q_lengths[sample * sq : sample * sq + sq], k_lengths[source * sk : source * sk + sk]
        for block in blocks(lengths, key_lengths, table):
            found.append(Instance(block, sample, q_starts[sample * sq] + block.query, k_starts[source * sk] + block.key))
    return found


def _groups(instances: list[Instance], heads: int, most_scores: int) -> list[list[Instance]]:
    """Blocks of like shape together: sorted by size, cut where padding would cost more than another tile."""
    ordered = sorted(instances, key=lambda i: (i.block.cells is not None, i.block.keys, i.block.queries), reverse=True)
    groups: list[list[Instance]] = []
    keys = queries = needed = 0
    masked = False
    for instance in ordered:
        block = instance.block
        own = block.queries * _rounded(block.keys) * heads
        widest = max(queries, block.queries)
        padded = (len(groups[-1]) + 1) * widest * keys * heads if groups else 0
        fits = padded <= most_scores and padded - needed - own <= WASTED_SCORES and masked == (block.cells is not None)
        if groups and fits:
            groups[-1].append(instance)
            queries, needed = widest, needed + own
        else:
            groups.append([instance])
            keys, queries, needed, masked = _rounded(block.keys), block.queries, own, block.cells is not None
    return groups


def _rounded(keys: int) -> int:
    return keys if keys >= ROUNDED_KEYS else -(-keys // KEY_MULTIPLE) * KEY_MULTIPLE


def _mask(group: list[Instance], queries: int, keys: int) -> Tensor | None:
    """float32 ``[n or 1, 1, queries or 1, keys]``; one sample or one row stands for all when they are alike."""
    if all(i.block.cells is None and i.block.keys == keys for i in group):
        return None
    shapes = [(i.block.queries if i.block.cells else 0, i.block.keys, i.block.cells) for i in group]
    releases = {shape: i.block.release() for shape, i in zip(shapes, group)}
    padded = {shape: pad(release, (0, keys - release.numel()), value=NEVER) for shape, release in releases.items()}
    release = torch.stack([padded[shape] for shape in shapes] if len(padded) > 1 else list(padded.values()))
    alike = bool(((release <= 0) | (release >= queries)).all())
    hidden = release[:, None, None, :] > torch.arange(1 if alike else queries)[:, None]
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _rows(spans: list[tuple[int, int]], padded: int) -> tuple[Tensor, Tensor]:
    """The packed rows of ``[n, padded]``, repeating the last of each span, and which of them are real."""
    first, length = torch.tensor(spans).T[:, :, None]
    position = torch.arange(padded)
    return (first + torch.minimum(position, length - 1)).flatten(), (position < length).flatten()


def _as_slice(rows: Tensor) -> Tensor | slice:
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if bool((rows == torch.arange(first, first + len(rows))).all()) else rows


def _side(parts: list[tuple[Tensor, Tensor]], tokens: int) -> Side:
    nothing = torch.empty(0, dtype=torch.int64)
    rows, real = (torch.cat(column) for column in zip(*parts)) if parts else (nothing, nothing.bool())
    places = torch.full((tokens,), len(rows), dtype=torch.int64)
    places[rows[real]] = real.nonzero().flatten()
    once = int((places < len(rows)).sum()) == int(real.sum())
    identity = len(rows) == tokens and bool((rows == torch.arange(tokens)).all())
    return Side(tokens, rows, places if once else None, identity)
