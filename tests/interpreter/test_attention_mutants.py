"""The contract can fail: kernels with one wrong comparison, offset, stride or range turn it red in the interpreter."""

import dataclasses
import importlib.util

import pytest
import torch

import vlkernels as vk
from vlkernels.core.spec import Case, InputMaker
from vlkernels.ops.attention import spec, triton_kernels, triton_launches
from vlkernels.testing import contract

SPEC = dataclasses.replace(next(s for s in spec.SPECS if s.name == "attention"), deterministic=False)

MUTANTS = {  # name: (old, new, the case that must notice)
    "mask: < for <=": ("(keys <= limit)", "(keys < limit)", "full"),
    "mask of the keys' gradient: > for >=": ("[None, :] >= release", "[None, :] > release", "causal"),
    "causal offset of the queries": ("fixed - 1, queries + slope", "fixed - 1, queries", "cross"),
    "causal offset of the keys": ("begin, keys - slope", "begin, keys", "cross"),
    "a partial tile taken for a full one": ("fixed, first + slope + 1", "fixed, first + slope + 2", "ends_aligned"),
    "the last visible tile left out": ("fixed, last + slope + 1", "fixed, last + slope", "ends_aligned"),
    "the diagonal of the keys' gradient cut short": ("run_begin, last - slope", "run_begin, first - slope", "longer_than_a_tile"),
    "full keys hidden by a causal segment": ("tl.maximum(fixed - 1, queries + slope)", "queries + slope", "cross_prefix"),
    "row stride": ("load_rows(k_base, first, k_stride", "load_rows(k_base, first, v_stride", "strided"),
    "row stride of the queries": ("load_rows(q_base, first, q_stride", "load_rows(q_base, first, do_stride", "strided"),
    "key head": ("head // heads_per_key * k_head", "head % heads_per_key * k_head", "grouped_heads"),
    "query heads of a key head": ("range(0, heads_per_key)", "range(0, 1)", "grouped_heads"),
    "a reader forgotten": ("range(first_run, last_run)", "range(first_run + 1, last_run)", "negatives"),
    "statistics of head 0": ("tl.store(lse_base + head *", "tl.store(lse_base + 0 *", "full"),
    "sign of the gradient of lse": ("delta -=", "delta +=", "full"),
    "scale of dk": ("dk * softmax_scale", "dk", "full"),
    "scale of what is kept": ("dp * keep_scale", "dp", "dropout"),
    "draws keyed by the packed row": ("queries - origin, key_origin", "queries, key_origin", "dropout"),
    "draws of the keys' gradient": ("queries - origin, first_column", "queries - origin, first_column + 16", "dropout"),
    "rows of nobody": ("mask=queries < stop", "mask=queries < end", "capacity"),
    "rows of nobody among the keys": ("dv_stride, tile_begin, stop", "dv_stride, tile_begin, end", "prefix_lm"),
}  # fmt: skip


def _strided(fill: InputMaker):
    wide = [fill.normal(23, 2, width, grad=False) for width in (12, 16, 20)]
    q, k, v = (x[..., :8].requires_grad_() for x in wide)
    return {"q": q, "k": k, "v": v, "layout": fill.layout([[9, 14]])}


def _cross_prefix(fill: InputMaker):
    layout, keys = fill.layout([[9]]), fill.layout([[6, 3]])
    rows = (9, 1), (9, 1), (9, 1)
    q, k, v = (fill.normal(*shape, 8) for shape in rows)
    return {"q": q, "k": k, "v": v, "layout": layout, "kv_layout": keys, "mask": vk.SegmentMask([["full", "causal"]])}


def _capacity(fill: InputMaker):
    qkv = (fill.normal(9, 1, 8) for _ in range(3))
    return {**dict(zip("qkv", qkv)), "layout": fill.layout([[4]], capacity=9), "return_lse": True}


OWN_CASES = {make.__name__[1:]: Case(make.__name__[1:], make) for make in (_strided, _cross_prefix, _capacity)}


CASES = {case.name: case for case in SPEC.cases} | OWN_CASES


@pytest.mark.parametrize("name", OWN_CASES)
def test_own_cases(name):
    contract.verify(SPEC, CASES[name], torch.float32, "triton")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_the_contract_red(name, tmp_path, monkeypatch):
    old, new, case = MUTANTS[name]
    source = open(triton_kernels.__file__).read()
    assert old in source, f"the kernels no longer read {old!r}"
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(old, new))
    module_spec = importlib.util.spec_from_file_location("mutant", path)
    mutant = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(mutant)
    monkeypatch.setattr(triton_launches, "_kernels", lambda: mutant)
    with pytest.raises(AssertionError):
        contract.verify(SPEC, CASES[case], torch.float32, "triton")
        pytest.fail("the contract stayed green", pytrace=False)
