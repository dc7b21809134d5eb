"""vk.attention with a bias, impl="triton", interpreted: the contract, gradients shared in every way, rows of nobody, bits."""

import dataclasses

import pytest
import torch

import vlkernels as vk
from tests.ops import test_attention as shared
from vlkernels.ops.attention import reference, spec, triton_launches
from vlkernels.testing import contract
from vlkernels.testing.error_rule import assert_close

SPECS = {s.name: dataclasses.replace(s, deterministic=False) for s in spec.SPECS}
CASES = {(s.name, case.name): case for s in spec.SPECS for case in s.cases if "bias" in case.name}
HALF_CASES = ("bias", "shared_bias", "bias_by_place")
CALLS = [(*names, torch.float32) for names in CASES] + [
    ("attention", name, dtype) for name in HALF_CASES for dtype in (torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize("op, name, dtype", CALLS)
def test_contract(op, name, dtype):
    contract.verify(SPECS[op], CASES[op, name], dtype, "triton")


def obeys_the_error_rule(tensors, options, bias=lambda tensors: {}):
    """``bias``: makes the arguments that are built from other tensors, which get the gradients."""
    inputs = {name: t.bfloat16().double() for name, t in tensors.items()}

    def call(function, dtype, **more):
        def attend(q, k, v, rng, return_lse, bias_tensor=None, table=None, **rest):
            given = {"bias": bias_tensor} if table is None else bias(table)
            return function(q, k, v, **given, rng=rng, return_lse=return_lse, **rest)

        return shared.results(attend, inputs, options, dtype, **more)

    truth, eager = call(reference.attention, torch.float64), call(reference.attention, torch.float32)
    for name, tensor in call(vk.attention, torch.float32, impl="triton").items():
        assert_close(name, tensor, eager[name], truth[name])


SHARED_BY = {"nobody": (3, 4), "samples": (1, 4), "heads": (3, 1), "all": (1, 1)}


@pytest.mark.parametrize("shape", SHARED_BY.values(), ids=SHARED_BY)
@pytest.mark.parametrize("cross", (False, True))
def test_a_bias_shared_in_every_way(shape, cross, monkeypatch):
    monkeypatch.setattr(triton_launches, "BUSY_PROGRAMS", 6)  # small enough that samples are summed in several parts
    layout = vk.SegmentLayout([[3, 68], [0, 5], [7, 2]], capacity=90)
    keys = vk.SegmentLayout([[9, 4], [70, 1]]) if cross else layout
    options = {"layout": layout, "mask": vk.SegmentMask.prefix_lm(), "dropout_p": 0.2, "stream": 1}
    if cross:
        table = vk.SegmentMask([["causal", "full"], ["full", "none"]])
        options |= {"kv_layout": keys, "kv_index": torch.tensor([1, 1, 0]), "mask": table}
    bias = torch.randn(*shape, layout.max_seqlen + 1, keys.max_seqlen + 3)
    bias[torch.rand_like(bias) < 0.1] = -torch.inf
    q, k, v = (torch.randn(n, heads, 16) for n, heads in ((90, 4), (keys.num_tokens, 2), (keys.num_tokens, 2)))
    obeys_the_error_rule({"q": q, "k": k, "v": v, "bias_tensor": bias}, options)
