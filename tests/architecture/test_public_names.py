"""What people import: the names, their documentation, and examples that are true."""

import doctest
import inspect

import pytest
import torch

import vlkernels as vk

PUBLIC = {
    "Rng", "SegmentLayout", "SegmentMask", "recorded", "integrations", "swap",
    "pack", "unpack", "take_rows", "take_segments", "put_segments", "segment_mean", "patchify",
    "layer_norm", "rms_norm", "FusedLayerNorm", "FusedRMSNorm", "embed_layer_norm",
    "attention", "attention_qkvpacked", "RelativeBias",
    "contrastive_loss", "hard_negatives", "late_interaction_loss", "linear", "linear_cross_entropy", "optimal_transport",
    "sigmoid_loss", "triplet_loss",
}  # fmt: skip

FUNCTIONS = sorted(name for name in vk.ops.__all__ if inspect.isfunction(getattr(vk, name)))
SECTIONS = ("Example", "Args", "Returns", "Gradients", "Numerics", "Memory", "Errors", "Source")


def test_the_public_names_are_exactly_these():
    assert set(vk.__all__) == PUBLIC
    assert len(vk.__all__) == len(set(vk.__all__))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_exist_and_are_documented(name):
    assert inspect.getdoc(getattr(vk, name)), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_run(name):
    function = getattr(vk, name)
    tests = doctest.DocTestFinder(recurse=False).find(function, name, globs={"torch": torch, "vk": vk})
    examples = [test for test in tests if test.examples]
    assert examples, f"{name} has no example"
    for test in examples:
        assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_have_their_sections(name):
    doc = inspect.getdoc(getattr(vk, name))
    missing = [section for section in SECTIONS if f"{section}:" not in doc]
    assert not missing, f"{name} does not say: {missing}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_op_takes_impl_and_the_rest_by_keyword(name):
    parameters = list(inspect.signature(getattr(vk, name)).parameters.values())
    assert parameters[-1].name == "impl" and parameters[-1].default == "auto"
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[3:]), name
