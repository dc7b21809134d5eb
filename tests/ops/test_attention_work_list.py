"""The work list where no kernel runs: its definition shows what the table shows, and building it waits for nothing.

That the kernels build what is defined is tested in the interpreter.
"""

import heapq
import random

import pytest
import torch

import vlkernels as vk
from tests import work_list_definition as definition
from tests.work_list_definition import draw_streams, streams_of
from vlkernels.core import triton_runtime
from vlkernels.core.spec import Case
from vlkernels.core.triton_runtime import Launch
from vlkernels.ops.attention.gpu import work_list
from vlkernels.ops.attention.gpu.work_list import Streams
from vlkernels.testing import sync_lint

BLOCK = 16


@pytest.mark.parametrize("seed", range(40))
def test_tiles_of_queries_show_what_the_table_shows(seed):
    streams, layout, keys, mask = draw_streams(seed)
    seen = torch.zeros(layout.num_tokens, keys.num_tokens, dtype=torch.int32)
    written = torch.zeros(layout.num_tokens, dtype=torch.int32)
    for tile in definition.query_side(streams, layout.num_tokens, BLOCK):
        for i in range(tile.first, min(tile.first + BLOCK, tile.stop)):
            written[i] += 1
            for run in tile.runs if i < tile.end else ():
                limit = min(run.end - 1, max(run.fixed - 1, i + run.slope))
                seen[i, run.begin : limit + 1] += 1
    assert torch.equal(seen, visible(streams, layout, keys, mask))
    assert (written == 1).all()


@pytest.mark.parametrize("multiple", (1, 16))
@pytest.mark.parametrize("seed", range(40))
def test_tiles_of_keys_show_what_the_table_shows(seed, multiple):
    streams, layout, keys, mask = draw_streams(seed)
    seen = torch.zeros(layout.num_tokens, keys.num_tokens, dtype=torch.int32)
    written = torch.zeros(keys.num_tokens, dtype=torch.int32)
    for tile in definition.key_side(streams, keys.num_tokens, BLOCK, multiple):
        assert (tile.first - tile.origin) % multiple == 0
        for j in range(max(tile.first, tile.begin), min(tile.first + BLOCK, tile.stop)):
            written[j] += 1
            for run in tile.runs if j < tile.end else ():
                release = min(run.fixed, max(run.begin, j - run.slope))
                seen[release : run.end, j] += 1
    assert torch.equal(seen, visible(streams, layout, keys, mask))
    assert (written == 1).all()


def visible(streams, layout, keys, mask):
    return mask.dense(layout, None if keys is layout else keys, streams.kv_index).int()


def images_and_captions(tokens, samples, shortest, longest):
    draw = random.Random(0)
    return vk.SegmentLayout([[tokens, draw.randint(shortest, longest)] for _ in range(samples)])


REAL = {  # name: (layout, mask), a micro-batch of published recipes
    "ViLT": (images_and_captions(217, 64, 5, 40), vk.SegmentMask.full(2)),
    "UNITER": (vk.SegmentLayout([[10 + 7 * i % 91, 5 + 3 * i % 50] for i in range(128)]), vk.SegmentMask.full(2)),
    "BLIP captions": (images_and_captions(577, 32, 5, 40), vk.SegmentMask.prefix_lm()),
    "pages": (vk.SegmentLayout([[197, 40 + 37 * i % 470] for i in range(32)]), vk.SegmentMask.full(2)),
    "GPT": (vk.SegmentLayout([[64 + 61 * i % 1900] for i in range(16)]), vk.SegmentMask.causal()),
}
HEADS, PROGRAMS, OVERHEAD = 12, 132, 64  # a program costs as much as so many keys beside those it meets


@pytest.mark.parametrize("name", REAL)
def test_the_order_balances_as_well_as_a_sort_of_all_tiles_by_their_cost(name):
    layout, mask = REAL[name]
    tiles = definition.query_side(streams_of(layout, mask), layout.num_tokens, 128)
    costs = [OVERHEAD + sum(met(tile, run) for run in tile.runs) for tile in tiles]
    best = makespan(sorted(costs * HEADS, reverse=True))
    assert makespan([cost for cost in costs for _ in range(HEADS)]) <= 1.01 * best, "the heads of a tile after each other"
    assert makespan(costs * HEADS) <= 1.15 * best, "the tiles of a head after each other"


def met(tile, run):
    last = min(tile.first + 128, tile.end) - 1
    return min(run.end, max(run.fixed, last + run.slope + 1)) - run.begin


def makespan(costs):
    """When the last program ends, if each starts where one ended first."""
    ends = [0] * PROGRAMS
    for cost in costs:
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)


@pytest.fixture
def launched(monkeypatch):
    """What a card would run, for tensors that have no data."""
    launches = []
    monkeypatch.setattr(triton_runtime, "_missing_on_a_card", lambda: None)
    monkeypatch.setattr(Launch, "run", lambda launch: launches.append(launch))
    return launches


def names(launches):
    return [launch.kernel.fn.__name__ for launch in launches]


@pytest.mark.parametrize("seed", range(8))
def test_building_waits_for_nothing_and_is_a_launch_a_side(seed, launched):
    pytest.importorskip("triton")
    streams, layout, keys, _ = draw_streams(seed)

    def build(**tensors):
        there = Streams(**tensors)
        queries = work_list.query_side(there, layout.num_tokens, BLOCK)
        return [*queries, *work_list.key_side(there, keys.num_tokens, BLOCK, 16)]

    sync_lint.lint(build, Case("work list", lambda fill: streams._asdict()))
    readers = [] if streams.kv_index is None else ["readers_kernel"]
    assert names(launched) == ["query_side_kernel", *readers, "key_side_kernel"]  # meta tensors launch nothing


def test_where_no_kernel_runs_a_list_has_no_tiles():
    streams, layout, _, _ = draw_streams(0)
    for streams in (streams, Streams(*(None if t is None else t.to("meta") for t in streams))):
        side = work_list.query_side(streams, layout.num_tokens, BLOCK)
        assert side.tiles.shape[0] >= layout.num_tokens // BLOCK
        assert side.tiles.is_meta or not side.tiles.any()


def test_no_layout_table_or_place_in_memory_compiles_another_kernel():
    pytest.importorskip("triton")
    from benchmarks import offline

    hashes = {}
    with offline.card(90):
        for seed in range(100):
            streams, layout, keys, _ = draw_streams(seed)
            shifted = torch.zeros(layout.lengths.numel() + seed % 3, dtype=torch.int32)[seed % 3 :].view(layout.lengths.shape)
            streams = streams._replace(lengths=shifted)
            flags = (streams.kv_index is not None and streams.kv_index.dtype, streams.sample_ids is None)
            block, tokens = random.Random(seed).choice((16, 32, 64, 128)), layout.num_tokens
            for launch in (
                *work_list.query_launches(streams, tokens, block)[1],
                *work_list.key_launches(streams, keys.num_tokens, block, (1, 16)[seed % 2])[1],
            ):
                name = launch.kernel.fn.__name__
                known = flags[:1] if name == "readers_kernel" else flags
                hashes.setdefault((name, known), set()).add(launch.compile().hash)
    assert len(hashes) == 2 * 6 + 2, "two kernels with three kinds of index, with ids or without; readers by two indices"
    assert all(len(found) == 1 for found in hashes.values())


@pytest.mark.parametrize("architecture", (80, 90, 100))
def test_the_kernels_fit_their_cards(architecture):
    pytest.importorskip("triton")
    from benchmarks import offline

    with offline.card(architecture):
        launches = work_list.work_list_launches(architecture)
        assert set(launches) == {"query_side", "key_side", "readers"}
        for name, launch in launches.items():
            measured = offline.measure(launch, architecture)
            assert measured["stack_bytes"] == 0 and offline.local_memory_accesses(measured) == 0, f"{name} spills"
