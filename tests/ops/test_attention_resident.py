"""Attention for short samples in Triton where there is no card: which calls it serves, with which slots, compiled how often."""

import random

import pytest
import torch

import vlkernels as vk
from vlkernels.ops.attention.call import Call
from vlkernels.ops.attention.gpu import resident

triton = pytest.importorskip("triton")

from benchmarks import offline  # noqa: E402
from vlkernels.ops.attention.gpu import variants  # noqa: E402


@pytest.mark.parametrize(
    "longest, head_dim, architecture, rows",
    (
        (0, 64, 90, 16), (16, 64, 90, 16), (17, 64, 90, 32), (33, 24, 90, 64), (65, 64, 90, 128), (128, 64, 100, 128),
        (17, 80, 90, 64), (128, 128, 90, 128), (64, 64, 80, 64), (64, 64, 120, 64),
        (129, 64, 90, None), (16, 129, 90, None), (65, 64, 80, None), (65, 64, 89, None),
    ),
)  # fmt: skip
def test_the_shortest_slot_that_holds_the_longest_sample(longest, head_dim, architecture, rows):
    for dtype in (torch.bfloat16, torch.float16):
        slot = resident.slot(longest, dtype, head_dim, False, architecture)
        assert (slot and slot.rows) == rows
    assert resident.slot(longest, torch.float32, head_dim, False, architecture) is None


@pytest.mark.parametrize("longest, architecture, rows", ((64, 100, 64), (65, 100, None), (65, 90, 128)))
def test_dropout_takes_registers(longest, architecture, rows):
    slot = resident.slot(longest, torch.bfloat16, 64, True, architecture)
    assert (slot and slot.rows) == rows


def call(**changes):
    layout, qkv = vk.SegmentLayout([[3, 4], [6, 1]]), torch.empty(14, 3, 2, 16, dtype=torch.bfloat16)
    table = vk.SegmentMask.prefix_lm().table("cpu")
    plain = Call(
        [qkv], layout.starts, layout.lengths, None, None, None, table, None, None, None, None, layout.sample_ids, None,
        0.25, 0.0, 0, layout.max_seqlen, 0,
    )  # fmt: skip
    return plain._replace(**changes)


GROUPED = [torch.empty(14, heads, 16, dtype=torch.bfloat16) for heads in (4, 2, 2)]


@pytest.mark.parametrize(
    "changes, served",
    (
        ({}, True),
        ({"rng_state": vk.Rng(0).state, "dropout_p": 0.1}, True),
        ({"longest": 129}, False),
        ({"kv_starts": torch.zeros(2, 2), "kv_lengths": torch.zeros(2, 2)}, False),
        ({"kv_index": torch.zeros(2)}, False),
        ({"bias": torch.zeros(1, 1, 7, 7)}, False),
        ({"distance_bias": torch.zeros(2, 1, 3)}, False),
        ({"qkv": GROUPED}, False),
        ({"qkv": [torch.empty(14, 3, 2, 16)]}, False),
    ),
)
def test_what_is_served(changes, served):
    assert resident.serves(call(**changes), 90) is served


@pytest.mark.parametrize("dropout", (False, True))
def test_a_thousand_layouts_compile_each_kernel_once(dropout):
    draw, compiled = random.Random(0), {}
    with offline.card(90):
        for _ in range(1000):
            segments = draw.choice((1, 2, 3))
            lengths = [[draw.randint(0, 5) for _ in range(segments)] for _ in range(draw.randint(1, 40))]
            layout = vk.SegmentLayout(lengths, capacity=draw.randint(0, 40) + sum(map(sum, lengths)))
            if layout.num_tokens:
                for kernel, launch in variants.resident_launches(torch.bfloat16, 16, dropout, 90, layout).items():
                    compiled.setdefault(kernel, set()).add(launch.compile().hash)
    assert {kernel: len(hashes) for kernel, hashes in compiled.items()} == {"resident_forward": 1, "resident_backward": 1}
