"""The contract can fail: kernels of the sigmoid and triplet losses with one thing wrong turn it red in the interpreter."""

import dataclasses

import pytest
import torch

from tests.mutants import load_mutant
from vlkernels.core import similarity
from vlkernels.core.spec import Case
from vlkernels.ops.sigmoid_loss import spec as sigmoid
from vlkernels.ops.sigmoid_loss.gpu import kernels as sigmoid_kernels
from vlkernels.ops.sigmoid_loss.gpu import launches as sigmoid_launches
from vlkernels.ops.sigmoid_loss.gpu import tiles as sigmoid_tiles
from vlkernels.ops.triplet_loss import spec as triplet
from vlkernels.ops.triplet_loss.gpu import kernels as triplet_kernels
from vlkernels.ops.triplet_loss.gpu import launches as triplet_launches
from vlkernels.ops.triplet_loss.gpu import tiles as triplet_tiles
from vlkernels.testing import contract

SIGMOID, TRIPLET = (dataclasses.replace(spec, deterministic=False) for spec in (*sigmoid.SPECS, *triplet.SPECS))
LAUNCHES = {sigmoid_kernels: sigmoid_launches, triplet_kernels: triplet_launches}


def _of_sigmoid(fill):
    return sigmoid.features(fill, 150, 24, bias=-2.0)


def _of_sigmoid_labels(fill):
    return _of_sigmoid(fill) | {"labels": fill.integers(0, 40, (150,))}


def _of_hardest(fill):
    return triplet.features(fill, 150, 24)


def _of_hubs(fill):
    """Most rows have the same hardest negative: more of them than a program takes at a time."""
    arguments = triplet.features(fill, 80, 24)
    texts = arguments["text_features"].detach()
    texts[7] = 40 * arguments["image_features"].detach().mean(0) + texts[7]
    return arguments | {"text_features": texts.requires_grad_()}


def _of_opposites(fill):
    """Every similarity is negative."""
    images, texts = (fill.normal(80, 24, grad=False).abs() / 5 for _ in range(2))
    return {"image_features": images.requires_grad_(), "text_features": texts.neg().requires_grad_()}


def _of_learned_pairs(fill):
    """Half of the pairs are told apart already."""
    arguments = triplet.features(fill, 80, 24)
    texts = arguments["text_features"].detach()
    texts[::2] = 2 * arguments["image_features"].detach()[::2]
    return arguments | {"text_features": texts.requires_grad_()}


def _of_summed(fill):
    return triplet.features(fill, 150, 24, hardest=False)


def _of_summed_labels(fill):
    return _of_summed(fill) | {"labels": fill.integers(0, 40, (150,))}


MUTANTS = {  # name: (module, old, new, the case that must notice)
    "partners of the next image": (
        sigmoid_kernels, "(images + partner)[:, None]", "(images + partner + 1)[:, None]", _of_sigmoid,
    ),
    "labels that repel": (
        sigmoid_kernels, "of_images[:, None] == of_texts", "of_images[:, None] != of_texts", _of_sigmoid_labels,
    ),
    "logits without the bias": (
        sigmoid_kernels, "similarities * multiplier + summand", "similarities * multiplier", _of_sigmoid,
    ),
    "every quarter the first": (sigmoid_kernels, "column + k * (COLUMNS // 4)", "column", _of_sigmoid),
    "texts past the end": (sigmoid_kernels, " & (texts < columns)[None, :]", "", _of_sigmoid),
    "images past the end": (sigmoid_kernels, "(images < rows)[:, None] & ", "", _of_sigmoid),
    "a term of the logarithm": (sigmoid_kernels, "(P8 * e + P7) * e + P6", "P8 * e + P6", _of_sigmoid),
    "losses of large logits": (sigmoid_kernels, "tl.maximum(logits, 0.0) + ", "", _of_sigmoid_labels),
    "derivatives that attract strangers": (
        sigmoid_kernels, "positive, -derivatives, derivatives", "positive, derivatives, -derivatives", _of_sigmoid,
    ),
    "derivatives of large logits": (sigmoid_kernels, "tl.where(logits > 0.0, 1.0, small)", "small", _of_sigmoid_labels),
    "the scale's share": (
        sigmoid_kernels, "tl.sum(derivatives * similarities, 1)", "tl.sum(derivatives * logits, 1)", _of_sigmoid,
    ),
    "sums in the place of others": (sigmoid_kernels, "sums + 2 * programs + program", "sums + programs + program", _of_sigmoid),
    "sums of the last wave": (sigmoid_tiles, "total.add_(", "total.copy_(", _of_sigmoid),
    "partners that are negatives": (triplet_kernels, "inside & (positive == 0)", "inside", _of_hardest),
    "texts of nobody": (triplet_kernels, " & (texts < columns)[None, :]", "", _of_opposites),
    "a last band as high as the others": (triplet_kernels, "tl.minimum(down - first, BAND)", "BAND", _of_hardest),
    "every band the first": (triplet_kernels, "(first + inside % height)", "(inside % height)", _of_hardest),
    "places within the tile": (triplet_kernels, "text_start + column + place", "text_start + place", _of_hardest),
    "places of images within the tile": (triplet_kernels, "image_start + row + place", "image_start + place", _of_hardest),
    "the hardest of the last tile": (triplet_kernels, "tl.atomic_max(of_images", "tl.atomic_xchg(of_images", _of_hardest),
    "negative similarities in reverse": (triplet_kernels, "((bits >> 31) & MAGNITUDE)", "0", _of_opposites),
    "features past the first eight": (
        triplet_kernels, "tl.load(bounds + row), end, TAKEN",
        "tl.load(bounds + row), tl.minimum(tl.load(bounds + row) + 1, end), TAKEN", _of_hubs,
    ),
    "features of the next row": (triplet_kernels, "mask=(taken < end)", "mask=(taken <= end)", _of_hardest),
    "own negatives": (triplet_kernels, " + own + ", " + ", _of_hardest),
    "rows that do not push": (triplet_tiles, " & (hardest.push[rows.span] > 0)", "", _of_learned_pairs),
    "excess over the image's least alone": (triplet_kernels, " + tl.maximum(of_texts, 0.0)", "", _of_summed),
    "pushes of texts": (triplet_kernels, "tl.sum(pushing_texts, 0)", "tl.sum(pushing_images, 0)", _of_summed),
    "weights of images alone": (
        triplet_kernels, "(pushing_images + pushing_texts)", "(pushing_images + pushing_images)", _of_summed,
    ),
    "equal labels among negatives": (
        triplet_kernels, "of_images[:, None] == of_texts", "of_images[:, None] < of_texts", _of_summed_labels,
    ),
    "excess of the last wave": (triplet_tiles, "total.add_(", "total.copy_(", _of_summed),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_waves(monkeypatch):
    monkeypatch.setattr(triplet_launches, "BAND", 2)
    monkeypatch.setattr(similarity, "WAVE_ROWS", 128)
    monkeypatch.setattr(similarity, "WHOLE_TILES", 64)
    monkeypatch.setattr(similarity, "WORKSPACE_BYTES", 128 * 128 * 4)


def verify(make):
    contract.verify(SIGMOID if "sigmoid" in make.__name__ else TRIPLET, Case(make.__name__, make), torch.float32, "triton")


@pytest.mark.parametrize("make", list(dict.fromkeys(make for *_, make in MUTANTS.values())), ids=lambda make: make.__name__)
def test_the_cases_are_green_without_mutants(make):
    verify(make)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_turns_the_contract_red(name, tmp_path, monkeypatch):
    module, old, new, make = MUTANTS[name]
    mutant = load_mutant(module, old, new, tmp_path)
    if module in LAUNCHES:
        monkeypatch.setattr(LAUNCHES[module], "_kernels", lambda: mutant)
    else:
        for method in ("meet", "hardest", "push_hardest", "summed"):
            if hasattr(mutant.Tiles, method):
                monkeypatch.setattr(module.Tiles, method, getattr(mutant.Tiles, method))
    with pytest.raises(AssertionError):
        verify(make)
        pytest.fail("the contract stayed green", pytrace=False)
