"""The contract can fail: kernels of the contrastive loss with one thing wrong turn it red in the interpreter."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from tests.mutants import load_mutant
from vlkernels.core import similarity, triton_similarity
from vlkernels.core.spec import Case
from vlkernels.ops.contrastive_loss.gpu import kernels, launches
from vlkernels.ops.contrastive_loss.spec import SPECS, _features, _keys
from vlkernels.testing import contract

SPEC = dataclasses.replace(SPECS[0], deterministic=False)


def _waves(fill):
    return _features(fill, 150, 8, 30.0)


def _long_queue(fill):
    return _features(fill, 70, 8) | _keys(fill, 70, 500, 8)


CASES = {case.name: case for case in (*SPEC.cases, Case("waves", _waves), Case("long_queue", _long_queue))}

MUTANTS = {  # name: (module, old, new, the case that must notice)
    "another row's partner": (kernels, "(row + partner)[:, None] ==", "(row + partner + 1)[:, None] ==", "pairs"),
    "a tile of partners passed over": (kernels, "partner < first_column + COLUMNS", "partner < first_column", "waves"),
    "rows past the end": (kernels, "tl.where((row < rows)[:, None] & ", "tl.where(", "pairs"),
    "columns past the end": (kernels, " & (column < columns)[None, :], logits", ", logits", "pairs"),
    "sums of earlier tiles": (kernels, "total = keep * total", "total = total", "waves"),
    "the excess of what shrank": (kernels, "(before - largest) * total", "0.0 * total", "long_queue"),
    "one part of the columns for all splits": (kernels, "split.to(tl.int64) * FIELDS", "0 * FIELDS", "waves"),
    "columns forgotten by the next rows": (kernels, "down > first_tile)", "down < 0)", "waves"),
    "columns of the split before": (kernels, "down > first_tile)", "down >= first_tile)", "waves"),
    "joined at the wrong height": (kernels, "tl.exp2((other_largest - both)", "tl.exp2((largest - both)", "waves"),
    "labels of columns": (kernels, "tl.store(place, tl.load(place", "tl.store(place, 2 * tl.load(place", "duplicates_waves"),
    "rows' largest for the columns": (kernels, "(logits - largest[None, :]) * LOG2_E", "logits * LOG2_E", "pairs"),
    "softmax of rows without its sum": (kernels, "weights *= tl.load(row_factor", "weights += 0 * tl.load(row_factor", "pairs"),
    "targets of one direction": (kernels, "== column[None, :], hard, 0.0)", "== column[None, :], 1.0, 0.0)", "pairs"),
    "shares of labels": (kernels, "wanted = hard * tl.load(shares", "wanted = hard + 0 * tl.load(shares", "duplicates"),
    "shares of keys": (kernels, "other=0.0) * factor", "other=0.0) * 0.5 * factor", "momentum_labels"),
    "alignment of the last wave": (kernels, "tl.load(place) + tl.sum(aligned)", "tl.sum(aligned)", "waves"),
    "logits without the scale": (kernels, "sums * tl.load(scale_base)", "sums", "pairs"),
    "tiles of a wave in one column": (triton_similarity, "program % across", "program % 1", "waves"),
    "tiles of a wave in one row": (triton_similarity, "program // across * ROWS", "program // across * 0", "waves"),
    "weights written in one column": (triton_similarity, "* stride + own_columns", "* stride + own_columns * 0", "waves"),
    "width past the end": (triton_similarity, "if WIDTH % DEPTH != 0:", "if False:", "pairs"),
}  # fmt: skip


def _duplicates_waves(fill):
    return _features(fill, 150, 8, 30.0) | {"labels": fill.integers(0, 30, (150,))}


CASES["duplicates_waves"] = Case("duplicates_waves", _duplicates_waves)


@pytest.fixture
def many_of_everything(monkeypatch):
    """Several waves, splits and strips out of few pairs."""
    monkeypatch.setattr(similarity, "WAVE_ROWS", 128)
    monkeypatch.setattr(similarity, "WHOLE_TILES", 64)
    monkeypatch.setattr(similarity, "WORKSPACE_BYTES", 128 * 128 * 4)
    monkeypatch.setattr(launches, "MOST_SPLITS", 2)
    monkeypatch.setattr(launches, "PROGRAMS", 2)


def mutate(module, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let launches take kernels with ``new`` for ``old``, be it theirs or in what they call."""
    mutant = load_mutant(module, old, new, folder)
    if module is kernels:
        monkeypatch.setattr(launches, "_kernels", lambda: mutant)
        return
    monkeypatch.setitem(sys.modules, module.__name__, mutant)
    place = folder / "callers"
    place.mkdir()
    callers = load_mutant(kernels, '"""impl', '"""impl', place)
    monkeypatch.setattr(launches, "_kernels", lambda: callers)


@pytest.mark.parametrize("name", {case for *_, case in MUTANTS.values()})
def test_the_cases_are_green_without_mutants(name, many_of_everything):
    contract.verify(SPEC, CASES[name], torch.float32, "triton")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_the_contract_red(name, tmp_path, monkeypatch, many_of_everything):
    module, old, new, case = MUTANTS[name]
    mutate(module, old, new, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        contract.verify(SPEC, CASES[case], torch.float32, "triton")
        pytest.fail("the contract stayed green", pytrace=False)
