"""The device-built work list: tiles cover every row once, runs show what the table shows, and nothing waits for the device."""

import random

import pytest
import torch

import vlkernels as vk
from vlkernels.core.spec import Case
from vlkernels.ops.attention import work_list
from vlkernels.ops.attention.work_list import RUN_FIELDS, TILE_FIELDS, Streams
from vlkernels.testing import sync_lint

CELLS = ("none", "full", "causal")


def draw_streams(seed):
    """Random layouts and table, as the raw op takes them, with the layouts and the mask."""
    draw = random.Random(seed)
    samples, segments, longest = draw.randint(1, 5), draw.randint(1, 4), draw.choice((3, 20, 70))

    def lengths(count, width):
        return [[draw.choice((0, 1, draw.randint(0, longest))) for _ in range(width)] for _ in range(count)]

    layout = vk.SegmentLayout(lengths(samples, segments), capacity=samples * segments * longest)
    keys, index = layout, None
    if draw.random() < 0.5:
        keys = vk.SegmentLayout(lengths(draw.choice((samples, 3)), draw.randint(1, 3)))
    elif segments == 1:
        layout = keys = vk.SegmentLayout.padded(layout.lengths[:, 0], longest)
    if keys.num_samples != samples or draw.random() < 0.4:
        index = torch.tensor([draw.randrange(keys.num_samples) for _ in range(samples)])
        index = index.to(draw.choice((torch.int32, torch.int64)))
    columns = range(keys.num_segments)
    rows = [[draw.choice(CELLS if keys is not layout or q == k else CELLS[:2]) for k in columns] for q in range(segments)]
    mask = draw.choice((vk.SegmentMask(rows), vk.SegmentMask([["full"] * keys.num_segments] * segments)))
    other = (None, None) if keys is layout else (keys.starts, keys.lengths)
    return Streams(layout.starts, layout.lengths, *other, index, mask.table("cpu"), layout.sample_ids), layout, keys, mask


def as_dicts(table, fields):
    return [dict(zip(fields, row)) for row in table.tolist()]


def walk(side, block):
    """(tile, its rows, its runs) of every tile that has rows."""
    runs = as_dicts(side.runs, RUN_FIELDS)
    for tile in as_dicts(side.tiles, TILE_FIELDS):
        rows = range(max(tile["first"], tile["begin"]), min(tile["first"] + block, tile["stop"]))
        if tile["first"] < tile["stop"]:
            yield tile, rows, [r for r in runs[tile["run"] : tile["last_run"]] if r["end"] > r["begin"]]


@pytest.mark.parametrize("seed", range(60))
def test_query_tiles_show_what_the_table_shows(seed):
    streams, layout, keys, mask = draw_streams(seed)
    seen = torch.zeros(layout.num_tokens, keys.num_tokens, dtype=torch.int32)
    written = torch.zeros(layout.num_tokens, dtype=torch.int32)
    for tile, rows, runs in walk(work_list.query_side(streams, layout.num_tokens, 16), 16):
        for i in rows:
            written[i] += 1
            for run in runs if i < tile["end"] else ():
                limit = min(run["end"] - 1, max(run["fixed"] - 1, i + run["slope"]))
                seen[i, run["begin"] : limit + 1] += 1
    assert torch.equal(seen, mask.dense(layout, keys if keys is not layout else None, streams.kv_index).int())
    assert (written == 1).all()


@pytest.mark.parametrize("multiple", (1, 16))
@pytest.mark.parametrize("seed", range(60))
def test_key_tiles_show_what_the_table_shows(seed, multiple):
    streams, layout, keys, mask = draw_streams(seed)
    seen = torch.zeros(layout.num_tokens, keys.num_tokens, dtype=torch.int32)
    written = torch.zeros(keys.num_tokens, dtype=torch.int32)
    for tile, rows, runs in walk(work_list.key_side(streams, keys.num_tokens, 16, multiple), 16):
        assert (tile["first"] - tile["origin"]) % multiple == 0
        for j in rows:
            written[j] += 1
            for run in runs if j < tile["end"] else ():
                release = min(run["fixed"], max(run["begin"], j - run["slope"]))
                seen[release : run["end"], j] += 1
    assert torch.equal(seen, mask.dense(layout, keys if keys is not layout else None, streams.kv_index).int())
    assert (written == 1).all()


def test_readers_come_in_their_order_and_runs_name_their_samples():
    layout, keys = vk.SegmentLayout([[2], [3], [4], [5]], sample_ids=[9, 8, 7, 6]), vk.SegmentLayout([[3], [20]])
    index, table = torch.tensor([1, 0, 1, 1]), vk.SegmentMask.full().table("cpu")
    streams = Streams(layout.starts, layout.lengths, keys.starts, keys.lengths, index, table, layout.sample_ids)
    tiles = walk(work_list.key_side(streams, 23, 32), 32)
    found = {tile["origin"]: [(run["begin"], run["identity"]) for run in runs] for tile, _, runs in tiles}
    assert found == {0: [(2, 8)], 3: [(0, 9), (5, 7), (9, 6)]}


def test_a_full_table_wastes_no_tile_at_the_borders_of_segments():
    layout = vk.SegmentLayout([[50, 14, 64], [1, 2, 3]])
    streams = Streams(layout.starts, layout.lengths, None, None, None, vk.SegmentMask.full(3).table("cpu"), None)
    for side in (work_list.query_side(streams, layout.num_tokens, 64), work_list.key_side(streams, layout.num_tokens, 64)):
        tiles = list(walk(side, 64))
        assert [len(rows) for _, rows, _ in tiles] == [64, 64, 6]
        assert all(len(runs) == 1 for _, _, runs in tiles)


def test_the_longest_come_first():
    layout = vk.SegmentLayout([[3], [90], [40]])
    streams = Streams(layout.starts, layout.lengths, None, None, None, vk.SegmentMask.causal().table("cpu"), None)
    first = [tile["first"] for tile, _, _ in walk(work_list.query_side(streams, 133, 32), 32)]
    assert first == [67, 35, 3, 125, 93, 0]


def test_work_lists_are_shared_while_their_tensors_live_unchanged():
    layout, table = vk.SegmentLayout([[5, 6]]), vk.SegmentMask.prefix_lm().table("cpu")
    streams = Streams(layout.starts, layout.lengths, None, None, None, table, None)
    before = work_list.query_side(streams, 11, 16)
    assert work_list.query_side(streams, 11, 16) is before
    assert work_list.query_side(streams, 11, 32) is not before
    assert work_list.key_side(streams, 11, 16, 1) is not work_list.key_side(streams, 11, 16, 16)
    layout.lengths[0, 1] -= 1
    after = work_list.query_side(streams, 11, 16)
    assert after is not before and not torch.equal(after.tiles, before.tiles)
    assert len(work_list._made) <= work_list.MOST_KEPT


@pytest.mark.parametrize("seed", range(8))
def test_building_waits_for_nothing(seed, monkeypatch):
    streams, layout, keys, _ = draw_streams(seed)
    monkeypatch.setattr(work_list, "_kept", lambda name, tensors, make: make())  # without a card there is no stream to ask

    def build(**tensors):
        there = Streams(**tensors)
        queries = work_list._query_side(there, layout.num_tokens, 16)
        return [*queries, *work_list._key_side(there, keys.num_tokens, 16, 16)]

    sync_lint.lint(build, Case("work list", lambda fill: streams._asdict()))
