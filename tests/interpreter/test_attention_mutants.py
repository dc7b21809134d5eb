"""The contract can fail: kernels with one wrong comparison, offset, stride or range turn it red in the interpreter."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import vlkernels as vk
from vlkernels.core.spec import Case, InputMaker
from vlkernels.ops.attention import spec
from vlkernels.ops.attention.gpu import launches
from vlkernels.testing import contract

SPEC = dataclasses.replace(next(s for s in spec.SPECS if s.name == "attention"), deterministic=False)

MUTANTS = {  # name: (old, new, the case that must notice)
    "mask: < for <=": ("(keys <= limit)", "(keys < limit)", "full"),
    "mask of the keys' gradient: > for >=": ("[None, :] >= release", "[None, :] > release", "causal"),
    "causal offset of the queries": ("fixed - 1, queries + slope", "fixed - 1, queries", "cross"),
    "causal offset of the keys": ("begin, keys - slope", "begin, keys", "cross"),
    "a partial tile taken for a full one": ("fixed, first + slope + 1", "fixed, first + slope + 2", "ends_aligned"),
    "the last visible tile left out": ("fixed, last + slope + 1", "fixed, last + slope", "ends_aligned"),
    "the diagonal of the keys' gradient cut short": ("begin, last - slope", "begin, first - slope", "longer_than_a_tile"),
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
    "draws keyed by the packed row": ("identity, queries - origin", "identity, queries", "dropout"),
    "draws of the keys' gradient": ("queries - origin, first_column", "queries - origin, first_column + 16", "dropout"),
    "rows of nobody": ("mask=queries < stop", "mask=queries < end", "capacity"),
    "rows of nobody among the keys": ("dv_stride, tile_begin, stop", "dv_stride, tile_begin, end", "prefix_lm"),
    "sign of the distance": ("of_key - of_query, -radius", "of_query - of_key, -radius", "cross_bias"),
    "sign of the distance counted": ("of_keys[c] - of_queries[c]", "of_queries[c] - of_keys[c]", "cross_bias"),
    "coordinates of the wrong stream": ("load_coordinates(kv_coordinates, keys", "load_coordinates(coordinates, keys", "cross_bias"),
    "coordinates of the first stream alone": ("end, own, kv_coordinates, BIAS", "end, own, coordinates, BIAS", "cross_bias"),
    "the clamp at another distance": ("of_query, -radius), radius)", "of_query, -radius), radius - 1)", "cross_bias"),
    "what was clamped, cut short": ("distance >= radius", "distance > radius", "cross_bias"),
    "one table for all coordinates": ("table + c * (2 * radius + 1)", "table + 0 * (2 * radius + 1)", "cross_bias"),
    "scale of the bias": ("products * scale + added", "(products + added) * scale", "bias"),
    "the plane of the first sample": ("sample * sample_stride", "0 * sample_stride", "bias"),
    "the plane of the first head": ("sample_stride + head * head_stride", "sample_stride", "bias"),
    "ds stored outside its run": ("(keys >= begin) & (keys < end))", "(keys < end))", "own_bias_dropout"),
    "a shared bias summed over one sample": ("sharing_samples + number", "sharing_samples", "shared_bias"),
    "a shared bias summed over one head": ("sharing_heads + member", "sharing_heads", "shared_bias"),
    "a causal segment shared in full": ("causal & (key_left >= left)", "causal & (key_left >= 0)", "shared_bias"),
    "draws of a shared bias": ("identity, rows, first_key", "sample, rows, first_key", "shared_bias_dropout"),
    "what counts as one": ("counted = (ds * fixed)", "counted = (ds * (2 * fixed))", "cross_bias"),
    "counts of the first head": ("tl.num_programs(1) + head) * entries", "tl.num_programs(1)) * entries", "cross_bias"),
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


def _cross_bias(fill: InputMaker):
    """Distances of two coordinates, each with a bucket of its own up to the radius; one stream lies behind the other."""
    layout, keys = fill.layout([[9], [4]]), fill.layout([[6], [8]])
    q, k, v = (fill.normal(rows, heads, 8) for rows, heads in ((13, 4), (14, 2), (14, 2)))
    places = {"coordinates": fill.integers(0, 9, (13, 2)), "kv_coordinates": fill.integers(3, 14, (14, 2))}
    bias = vk.RelativeBias(**places, tables=[fill.normal(16, 4) for _ in range(2)], num_buckets=16, max_distance=5)
    return {"q": q, "k": k, "v": v, "layout": layout, "kv_layout": keys, "bias": bias}


def _bias_dropout(fill: InputMaker, samples: int):
    """Runs of keys that start in the middle of a draw: a tile of the second also covers the first."""
    layout, table = fill.layout([[3, 2, 4], [5, 1, 7]], sample_ids=[3, 8]), vk.SegmentMask([["full", "none", "full"]] * 3)
    q, k, v = (fill.normal(22, 2, 8) for _ in range(3))
    bias = fill.normal(samples, 2, 13, 13)
    return {"q": q, "k": k, "v": v, "layout": layout, "mask": table, "bias": bias, "dropout_p": 0.3, "rng": fill.rng()}


def _own_bias_dropout(fill: InputMaker):
    return _bias_dropout(fill, 2)


def _shared_bias_dropout(fill: InputMaker):
    return _bias_dropout(fill, 1)


OWN_MAKERS = (_strided, _cross_prefix, _capacity, _cross_bias, _own_bias_dropout, _shared_bias_dropout)
OWN_CASES = {make.__name__[1:]: Case(make.__name__[1:], make) for make in OWN_MAKERS}


CASES = {case.name: case for case in SPEC.cases} | OWN_CASES


@pytest.mark.parametrize("name", OWN_CASES)
def test_own_cases(name):
    contract.verify(SPEC, CASES[name], torch.float32, "triton")


KERNEL_FILES = ("tile_functions", "kernels", "bias_kernels")  # each imports from those before it


def mutate(old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let launches take copies of the kernels that read ``new`` for ``old``."""
    copies, found = {}, 0
    for file in KERNEL_FILES:
        source = (Path(launches.__file__).parent / f"{file}.py").read_text()
        found += source.count(old)
        path = folder / f"{file}.py"
        path.write_text(source.replace(old, new))
        module_spec = importlib.util.spec_from_file_location(file, path)
        copies[file] = importlib.util.module_from_spec(module_spec)
        monkeypatch.setitem(sys.modules, f"vlkernels.ops.attention.gpu.{file}", copies[file])
        module_spec.loader.exec_module(copies[file])
    assert found, f"the kernels no longer read {old!r}"
    monkeypatch.setattr(launches, "_kernels", lambda: copies["kernels"])
    monkeypatch.setattr(launches, "_bias_kernels", lambda: copies["bias_kernels"])


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_the_contract_red(name, tmp_path, monkeypatch):
    old, new, case = MUTANTS[name]
    mutate(old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        contract.verify(SPEC, CASES[case], torch.float32, "triton")
        pytest.fail("the contract stayed green", pytrace=False)
