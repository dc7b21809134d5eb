"""Large products on a CPU are the library's, by whichever kernel is faster here."""

import pytest
import torch

from vlkernels import ops
from vlkernels.core import native, products
from vlkernels.core.spec import InputMaker
from vlkernels.testing.arguments import differentiable_tensors, floating_outputs, integer_outputs

compiled = pytest.mark.skipif(native.missing("multiply_into") is not None, reason=str(native.missing("multiply_into")))
SIZES = ((1, 1, 1), (24, 32, 384), (25, 33, 385), (7, 70, 900), (300, 5, 3), (4, 4, 0))


@compiled
@pytest.mark.parametrize("level", native.CPU_ISA_LEVELS)
@pytest.mark.parametrize("add", (False, True))
@pytest.mark.parametrize(("rows", "columns", "depth"), SIZES)
def test_the_kernel_multiplies_factors_in_any_orientation(rows, columns, depth, add, level):
    left, right, start = torch.randn(rows, depth), torch.randn(depth, columns), torch.randn(rows, columns)
    expected = left.double() @ right.double() + (start.double() if add else 0)
    native.limit_cpu_isa(level)
    try:
        for x in (left, left.T.contiguous().T):
            for y in (right, right.T.contiguous().T):
                out = start.clone()
                torch.ops.vlkernels.multiply_into(out, x, y, add)
                torch.testing.assert_close(out.double(), expected, atol=1e-5 * max(depth, 1) ** 0.5, rtol=0)
    finally:
        native.limit_cpu_isa(native.CPU_ISA_LEVELS[-1])


@pytest.mark.parametrize("add", (False, True))
@pytest.mark.parametrize("kind", ("kernel", "few rows", "few products", "float64", "scattered result", "other processor"))
def test_which_products_the_kernel_takes(kind, add, monkeypatch):
    taken = []
    monkeypatch.setattr(products, "_multiply_into", lambda out, left, right, add: taken.append(out))
    monkeypatch.setattr(products.native, "missing", lambda op: None)
    monkeypatch.setattr(products, "pytorchs_are_slow_here", lambda: kind != "other processor")
    rows, columns, depth = {"few rows": (500, 600, 600), "few products": (600, 100, 100)}.get(kind, (600, 600, 600))
    dtype = torch.float64 if kind == "float64" else torch.float32
    left, right = torch.randn(rows, depth, dtype=dtype), torch.randn(depth, columns, dtype=dtype)
    out = torch.ones(rows, 2 * columns if kind == "scattered result" else columns, dtype=dtype)[:, :columns]
    found = products.multiply(left, right, out, add)
    assert found is out and bool(taken) == (kind == "kernel")
    if not taken:
        torch.testing.assert_close(out, left @ right + (1 if add else 0), atol=1e-3, rtol=1e-5)


@compiled
def test_a_result_of_another_shape_or_place_is_refused():
    left, right = torch.randn(4, 3), torch.randn(3, 5)
    for out, message in ((torch.empty(4, 6), "out must be"), (torch.empty(5, 4).T, "out"), (torch.empty(4, 5).double(), "out")):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.vlkernels.multiply_into(out, left, right, False)


DEFINED_ON_FEATURES = (
    "contrastive_loss", "sigmoid_loss", "triplet_loss", "late_interaction_loss", "linear_cross_entropy", "hard_negatives",
    "optimal_transport",
)  # fmt: skip


@pytest.mark.parametrize("spec", [spec for spec in ops.specs() if spec.name in DEFINED_ON_FEATURES], ids=lambda spec: spec.name)
def test_autocast_changes_no_definition(spec):
    """Their kernels multiply in the dtype of the features whatever autocast says; so must what defines them."""

    def results(is_autocast):
        arguments = spec.cases[0].make(InputMaker(torch.float32))
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            output = spec.reference(**arguments)
        outputs = [t for t in floating_outputs(output) if t.requires_grad]
        inputs = list(differentiable_tensors(arguments).values())
        gradients = torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs]) if outputs else ()
        return [*floating_outputs(output), *integer_outputs(output), *gradients]

    for inside, outside in zip(results(True), results(False), strict=True):
        assert inside.dtype == outside.dtype and torch.equal(inside, outside)
