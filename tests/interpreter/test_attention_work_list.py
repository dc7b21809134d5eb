"""The kernels of the work list, interpreted, against the definition: every tile, every run, and their order."""

import pytest
import torch

import vlkernels as vk
from tests import work_list_definition as definition
from tests.mutants import load_mutant
from tests.work_list_definition import draw_streams, listed, streams_of
from vlkernels.core.triton_runtime import Launch
from vlkernels.ops.attention.gpu import work_list, work_list_kernels
from vlkernels.testing import contract

BLOCK = 16


def built(kind, streams, *arguments):
    """A side in memory that was NaN's before: what a tile names must have been written."""
    with contract.poisoned_memory():
        return listed(getattr(work_list, kind)(streams, *arguments))


def compare(kind, streams, *arguments):
    found, wanted = built(kind, streams, *arguments), getattr(definition, kind)(streams, *arguments)
    assert sorted(found) == sorted(wanted)
    assert found == wanted, "the order differs"


@pytest.mark.parametrize("seed", range(50))
def test_random_layouts_and_tables(seed):
    streams, layout, keys, _ = draw_streams(seed)
    compare("query_side", streams, layout.num_tokens, BLOCK)
    compare("key_side", streams, keys.num_tokens, BLOCK, (1, 16)[seed % 2])


def many(samples=1000):
    generator = torch.Generator().manual_seed(0)
    return vk.SegmentLayout(torch.randint(0, 40, (samples, 1), generator=generator))


TWICE, AND_FULL = vk.SegmentMask([["causal"], ["causal"]]), vk.SegmentMask([["causal", "full"]])
SIXTEEN = vk.SegmentMask([["causal" if k == q else "full" if k < q else "none" for k in range(16)] for q in range(16)])
PREFIX, FULL, CAUSAL = vk.SegmentMask.prefix_lm(), vk.SegmentMask.full(), vk.SegmentMask.causal()
FEW = vk.SegmentLayout([[7], [30], [0], [12]])
PICKED = torch.arange(1000) % 7 % 4
LAYOUTS = {  # name: (layout, mask, kv_layout, kv_index)
    "one token": (vk.SegmentLayout([[1]]), FULL, None, None),
    "no token": (vk.SegmentLayout([[0], [0]]), FULL, None, None),
    "capacity": (vk.SegmentLayout([[5, 3]], capacity=400), PREFIX, None, None),
    "capacity of nobody": (vk.SegmentLayout([[0, 0]], capacity=100), PREFIX, None, None),
    "one long sample": (vk.SegmentLayout([[900, 500]]), PREFIX, None, None),
    "three in one group": (vk.SegmentLayout([[50, 14, 64], [1, 2, 3]]), vk.SegmentMask.full(3), None, None),
    "equals": (vk.SegmentLayout([[9], [9], [9]]), FULL, None, None),
    "causal twice": (vk.SegmentLayout([[5, 6], [9, 2]]), TWICE, vk.SegmentLayout([[7], [4]]), None),
    "causal, then full": (vk.SegmentLayout([[5], [9]]), AND_FULL, vk.SegmentLayout([[3, 4], [6, 2]]), None),
    "padded full": (vk.SegmentLayout.padded([3, 0, 40, 9], 50), FULL, None, None),
    "readers": (vk.SegmentLayout([[2], [3], [4], [5]], sample_ids=[9, 8, 7, 6]), FULL, FEW, torch.tensor([1, 0, 1, 3])),
    "padded": (vk.SegmentLayout.padded([3, 0, 40, 9], 50), CAUSAL, None, None),
    "images and captions": (vk.SegmentLayout([[197, 3 + b % 9] for b in range(70)]), PREFIX, None, None),
    "sixteen segments": (vk.SegmentLayout([[(b * s) % 5 for s in range(16)] for b in range(3)]), SIXTEEN, None, None),
    "a thousand samples": (many(), CAUSAL, None, None),
    "a thousand readers of four samples": (many(), FULL, FEW, PICKED),
    "readers of few of a thousand samples": (FEW, FULL, many(), torch.tensor([999, 3, 999, 0])),
    "nobody reads": (vk.SegmentLayout([[0], [0]], capacity=3), FULL, FEW, torch.tensor([1, 1])),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    compare_layout(name)


def compare_layout(name):
    layout, mask, keys, index = LAYOUTS[name]
    streams = streams_of(layout, mask, keys, index)
    compare("query_side", streams, layout.num_tokens, 64)
    compare("key_side", streams, (keys or layout).num_tokens, 64, 16)


def test_readers_come_in_their_order_and_runs_name_their_samples():
    layout, keys = vk.SegmentLayout([[2], [3], [4], [5]], sample_ids=[9, 8, 7, 6]), vk.SegmentLayout([[3], [20]])
    streams = streams_of(layout, FULL, keys, torch.tensor([1, 0, 1, 1]))
    found = {tile.origin: [(run.begin, run.identity) for run in tile.runs] for tile in built("key_side", streams, 23, 32)}
    assert found == {0: [(2, 8)], 3: [(0, 9), (5, 7), (9, 6)]}


def test_a_full_table_wastes_no_tile_at_the_borders_of_segments_and_meets_one_run():
    layout, mask = LAYOUTS["three in one group"][:2]
    streams = streams_of(layout, mask)
    for kind in ("query_side", "key_side"):
        side = getattr(work_list, kind)(streams, layout.num_tokens, 64)
        assert [min(64, tile.stop - tile.first) for tile in listed(side)] == [64, 64, 6]
        named = side.tiles[:, 5] - side.tiles[:, 4]
        assert named[:3].tolist() == [1, 1, 1], "segments that open no run leave no gap between runs"


def test_the_longest_come_first():
    layout = vk.SegmentLayout([[3], [90], [40]])
    found = built("query_side", streams_of(layout, CAUSAL), 133, 32)
    assert [tile.first for tile in found] == [67, 35, 3, 125, 93, 0]


def test_two_builds_are_equal_bit_for_bit_behind_the_last_tile_too():
    streams, layout, keys, _ = draw_streams(3)
    for kind, tokens in (("query_side", layout.num_tokens), ("key_side", keys.num_tokens)):
        with contract.poisoned_memory():
            first, second = (getattr(work_list, kind)(streams, tokens, BLOCK) for _ in range(2))
        assert torch.equal(first.tiles, second.tiles) and torch.equal(first.runs, second.runs)
        rest = first.tiles[len(listed(first)) :]
        assert not rest.any(), "tiles past the real ones have no rows"


def test_the_layers_of_a_model_and_both_directions_share_their_work_lists(monkeypatch):
    launched, run = [], Launch.run

    def counted(launch):
        launched.append(launch.kernel.fn.__name__)
        run(launch)

    monkeypatch.setattr(Launch, "run", counted)
    layout = vk.SegmentLayout([[9, 4], [3, 7]])
    x = torch.randn(23, 3, 1, 16, requires_grad=True)
    for _ in range(3):
        x = vk.attention_qkvpacked(x, layout=layout, mask=PREFIX, impl="triton")[:, None].expand(-1, 3, -1, -1)
    x.sum().backward()
    lists = [name for name in launched if name in ("query_side_kernel", "key_side_kernel", "readers_kernel")]
    assert lists == ["query_side_kernel", "key_side_kernel"] and len(launched) == 2 + 3 * 3


MUTANTS = {  # name: (old, new, the layout that must notice)
    "groups joined across a causal cell": ("(codes != before) | (codes == CAUSAL)", "(codes != before)", "causal twice"),
    "a group of its first segment alone": (", index, segments), 1) - 1", ", 0, 0), 1) + segment", "three in one group"),
    "rows of nobody behind a sample": ("sample + 1 < samples, behind, tokens", "sample + 1 < samples, end, tokens", "padded"),
    "rows of nobody past the last sample": ("behind, tokens)", "behind, end)", "capacity"),
    "tiles that hold no whole draw": ("origin + (begin - origin) // multiple * multiple", "begin", "capacity"),
    "a tile too few": ("+ (block - 1), 0) // block", ", 0) // block", "capacity"),
    "equals in no order": ("(other[None, :] < number[:, None])", "(met[:, None] < 0)", "equals"),
    "the shortest first": ("(other_met > met[:, None])", "(other_met < met[:, None])", "padded"),
    "the first tile of a group first": ("(count[:, None] - 1 - number) * block", "number * block", "one long sample"),
    "a causal run that does not end": ("closes = (code == CAUSAL) | ((code", "closes = ((code", "causal, then full"),
    "a run of queries that ends too late": ("(after != FULL)", "(after == NONE)", "causal twice"),
    "ends of causal keys not aligned": ("end - query_end", "start - query_end", "capacity"),
    "ends of causal queries not aligned": ("key_end - end, slope", "key_end - start, slope", "capacity"),
    "full keys under the causal line": ("tl.where(code == CAUSAL, start, end)", "start", "padded full"),
    "full queries under the causal line": ("tl.where(code == CAUSAL, end, start)", "end", "padded full"),
    "own keys for the ones read": ("(kv_index + sample, mask=inside", "(kv_index + sample * 0, mask=inside", "readers"),
    "readers that come before their equals": ("(reader < key)", "(reader > key)", "readers"),
    "another's readers": ("first_reader = tl.load(bounds + sample", "first_reader = tl.load(bounds + sample + 1", "readers"),
    "readers of others weigh": ("(read == key) & (reader < samples)", "(reader < samples)", "readers"),
    "the sample id of a neighbour": ("tl.load(sample_ids + sample,", "tl.load(sample_ids + (sample ^ 1),", "readers"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, tmp_path, monkeypatch):
    old, new, layout = MUTANTS[name]
    mutant = load_mutant(work_list_kernels, old, new, tmp_path)
    monkeypatch.setattr(work_list, "_kernels", lambda: mutant)
    with pytest.raises(AssertionError):
        compare_layout(layout)
        pytest.fail("the layout looks right", pytrace=False)
