"""What the compiled library says about cards."""

import pytest
import torch

from vlkernels.core import native
from vlkernels.ops.layer_norm import functional

ARCHITECTURES = ["80", "90a", "100"]


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3)])
def test_cards_of_a_compiled_generation_are_served(capability):
    assert native.not_compiled_for(capability, ARCHITECTURES) is None


@pytest.mark.parametrize("capability", [(7, 5), (9, 1), (12, 0)])
def test_other_cards_are_named(capability):
    reason = native.not_compiled_for(capability, ARCHITECTURES)
    assert reason == f"the CUDA kernels are compiled for sm_80, sm_90a, sm_100, the card is sm_{capability[0]}{capability[1]}"


@pytest.mark.skipif(native.load() is not None, reason="the compiled library is not built")
def test_an_op_without_a_cuda_kernel_says_so():
    assert "built without a CUDA kernel for linear_forward" in native.missing("linear_forward", "CUDA")


def test_layer_norm_on_a_card_takes_cuda_first():
    cuda = functional.IMPLEMENTATIONS[0]
    facts = {"dtype": torch.bfloat16, "width": 768, "too_few": 0}
    assert cuda.name == "cuda" and cuda.supports(facts) is None
    assert cuda.supports(facts | {"width": 16_385}) == "it serves D up to 16,384, x has D = 16,385"
    assert "computes in float32" in cuda.supports(facts | {"dtype": torch.float64})
    assert "the inputs are on cpu" in cuda.refusal("cpu", facts)
