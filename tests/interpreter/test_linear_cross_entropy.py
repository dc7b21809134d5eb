"""Linear cross-entropy, impl="triton", interpreted with the tiles of sm_90: the contract, ragged sizes, waves, mutants."""

import dataclasses
import hashlib

import pytest
import torch

import vlkernels as vk
from tests.mutants import load_mutant
from tests.ops import test_linear_cross_entropy as shared
from tests.ops.test_contract import RawCalls
from vlkernels.core import similarity, triton_runtime
from vlkernels.core.spec import InputMaker
from vlkernels.ops.linear_cross_entropy.gpu import kernels, launches, variants
from vlkernels.ops.linear_cross_entropy.spec import SPECS
from vlkernels.testing import contract

SPEC = dataclasses.replace(SPECS[0], deterministic=False)  # programs take turns: two runs prove nothing
CASES = {case.name: case for case in SPEC.cases}
HALF_CASES = ("longer_than_a_tile", "taught_softly", "taught_none", "z_loss_none")


@pytest.fixture
def small_waves(monkeypatch):
    monkeypatch.setattr(similarity, "WAVE_ROWS", 64)
    monkeypatch.setattr(similarity, "WHOLE_TILES", 64)
    monkeypatch.setattr(similarity, "WORKSPACE_BYTES", 64 * 256 * 4)


@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    contract.verify(SPEC, CASES[name], torch.float32, "triton")


@pytest.mark.parametrize("name", HALF_CASES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_contract_in_half_types(name, dtype):
    contract.verify(SPEC, CASES[name], dtype, "triton")


@pytest.mark.parametrize("sizes", shared.RAGGED)
def test_ragged_sizes(sizes):
    dtype = torch.float32 if sizes[-1] <= 1000 else torch.bfloat16  # whose tiles are four times as large
    contract.verify(SPEC, shared.ragged_case(*sizes), dtype, "triton")


@pytest.mark.parametrize("name", ("longer_than_a_tile", "taught_softly"))
def test_waves_of_rows_and_of_entries_give_what_one_gives(name, small_waves):
    contract.verify(SPEC, CASES[name], torch.float32, "triton")


def test_the_raw_ops_keep_their_schemas():
    recorder = RawCalls()
    for name in ("taught", "none"):
        with recorder:
            arguments = CASES[name].make(InputMaker(torch.float32))
            vk.linear_cross_entropy(**arguments, impl="triton").sum().backward()
    assert len(recorder.calls) == 2
    for op, arguments in recorder.calls.items():
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("ignored", ([1, 4], [*range(12)]))
def test_ignored_rows_are_not_even_read(ignored):
    fill = InputMaker(torch.float32)
    hidden, weight, targets, bias = fill.normal(12, 8), fill.normal(30, 8), fill.integers(0, 30, (12,)), fill.normal(30)
    hidden.data[ignored], targets[ignored] = torch.nan, -100
    loss = vk.linear_cross_entropy(hidden, weight, targets, bias=bias, z_loss=1.0, impl="triton")
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all() and bias.grad.isfinite().all() and not hidden.grad[ignored].any()
    assert len(ignored) < 12 or (loss == 0 and not weight.grad.any() and not bias.grad.any())


@pytest.mark.parametrize("largest", (2.0**-14, 2.0**12))
def test_float16_gradients_of_any_cotangents(largest):
    fill = InputMaker(torch.float16)
    tensors = fill.normal(20, 8), fill.normal(40, 8)
    targets, cotangent = fill.integers(0, 40, (20,)), torch.linspace(0.5, 1, 20) * largest
    loss = vk.linear_cross_entropy(*tensors, targets, reduction="none", impl="triton")
    exact = [t.detach().double().requires_grad_() for t in tensors]
    true = vk.linear_cross_entropy(*exact, targets, reduction="none", impl="reference")
    wanted = torch.autograd.grad(true, exact, cotangent.double())
    for mine, expected in zip(torch.autograd.grad(loss, tensors, cotangent), wanted):
        assert (mine.double() - expected).abs().max() < 2e-3 * expected.abs().max()


def test_strided_inputs_and_targets_of_either_width():
    fill = InputMaker(torch.float32)
    hidden, weight = fill.normal(20, 9, grad=False)[:, :8], fill.normal(8, 40, grad=False).T
    targets, bias = fill.integers(0, 40, (20,), dtype=torch.int32), fill.normal(80, grad=False)[::2]
    mine, true = (vk.linear_cross_entropy(hidden, weight, targets, bias=bias, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(mine, true)


def test_what_the_kernels_do_not_serve_is_refused_with_the_reason():
    hidden, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match='cannot run with impl="triton": it computes in float32, the inputs are float64'):
        vk.linear_cross_entropy(hidden.double(), hidden.double(), targets, impl="triton")
    teacher = (hidden.double(), hidden.double(), None)
    with pytest.raises(ValueError, match='cannot run with impl="triton": it computes in float32, the teacher is float64'):
        vk.linear_cross_entropy(hidden, hidden, targets, teacher=teacher, distillation=0.5, impl="triton")


def digest(found):
    said = [(x.kernel.fn.__name__, x.grid, sorted(x.constants.items()), x.warps, x.stages) for x in found]
    return hashlib.sha256(repr(said).encode()).hexdigest()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("is_taught", (False, True))
def test_what_is_interpreted_is_what_a_hopper_card_runs(monkeypatch, dtype, is_taught):
    launched = []
    monkeypatch.setattr(triton_runtime.Launch, "run", lambda launch: launched.append(launch))
    fill = InputMaker(dtype)
    hidden, weight, bias = fill.normal(130, 64), fill.normal(variants.ENTRIES, 64), fill.normal(variants.ENTRIES)
    options = {"teacher": (hidden.detach(), weight.detach(), bias.detach()), "distillation": 0.5} if is_taught else {}
    vk.linear_cross_entropy(hidden, weight, torch.zeros(130, dtype=torch.int64), bias=bias, impl="triton", **options)
    assert digest(launched) == digest(variants.launches(dtype, 64, is_taught, 90, rows=130).values())


MUTANTS = {  # name: (old, new, the case that must notice)
    "entries past the last one": ("tl.where((columns < entries)[None, :], logits, NOTHING)", "logits", "mean"),
    "the bias of the first tile": ("tl.load(bias + columns", "tl.load(bias + columns - column", "longer_than_a_tile"),
    "a split that begins late": ("range(split * split_entries,", "range((split + 1) * split_entries,", "longer_than_a_tile"),
    "a split that goes on": ("tl.minimum((split + 1) * split_entries, entries)", "entries", "longer_than_a_tile"),
    "sums not rescaled": ("total * rescale(highest, new, LOG2_E)", "total", "longer_than_a_tile"),
    "sums of splits not rescaled": ("* rescale(before, highest, LOG2_E)", "", "longer_than_a_tile"),
    "the target of another row": ("columns == target[:, None], logits", "columns == target[:, None] + 1, logits", "mean"),
    "the mean over other entries": ("logit_sum / entries", "logit_sum / (entries - 1)", "smoothed"),
    "smoothing of the target": ("(1 - label_smoothing) * to_target", "to_target", "smoothed"),
    "z of a logit alone": ("z_loss * lse * lse", "z_loss * highest * highest", "z_loss"),
    "losses of rows that do not count": ("tl.where(alive, found, 0.0)", "tl.where(alive, found, 1.0)", "none"),
    "soft sums from the hard highest": ("rescale(before, highest, softly)", "rescale(before, highest, LOG2_E)", "taught_wide"),
    "teacher's sums not rescaled": ("cross = cross * factor", "cross = cross", "taught_wide"),
    "temperature squared": ("distillation * temperature * temperature", "distillation * temperature", "taught_softly"),
    "the teacher's bias": ("teacher_weight, teacher_bias, row", "teacher_weight, None, row", "taught"),
    "slope at the target": ("hard * (1 - label_smoothing), 0.0)", "hard, 0.0)", "smoothed"),
    "slope of smoothing": ("- hard * label_smoothing / entries", "", "smoothed"),
    "slope of z": ("hard + 2 * z_loss", "hard + z_loss", "z_loss"),
    "slope of a soft target": ("temperature * probabilities(logits", "probabilities(logits", "taught_softly"),
    "sign of the teacher": ("found -= distillation", "found += distillation", "taught"),
    "cotangents left out": ("if cotangents is not None", "if cotangents is None", "none"),
    "slopes of rows that do not count": ("tl.where(counts[:, None], found, 0.0)", "found", "mean"),
    "bias sums of the first tile": ("(row - first_row) // ROWS * entries + columns", "columns", "longer_than_a_tile"),
    "bias sums with the factor": ("tl.sum(found, 0), mask", "tl.sum(found, 0) * 2, mask", "mean"),
}  # fmt: skip


def _taught_wide(fill):
    arguments = CASES["longer_than_a_tile"].make(fill)
    teacher = fill.normal(67, 12, grad=False), fill.normal(1100, 12, grad=False), fill.normal(1100, grad=False)
    return arguments | {"teacher": teacher, "distillation": 0.6, "temperature": 3.0}


ALL_CASES = CASES | {"taught_wide": dataclasses.replace(CASES["taught"], name="taught_wide", make=_taught_wide)}


def test_own_case():
    contract.verify(SPEC, ALL_CASES["taught_wide"], torch.float32, "triton")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_the_contract_red(name, tmp_path, monkeypatch):
    old, new, case = MUTANTS[name]
    mutant = load_mutant(kernels, old, new, tmp_path)
    monkeypatch.setattr(launches, "_kernels", lambda: mutant)
    with pytest.raises(AssertionError):
        contract.verify(SPEC, ALL_CASES[case], torch.float32, "triton")
        pytest.fail("the contract stayed green", pytrace=False)
