"""What every op's autograd promises beyond the contract: a second derivative is refused, never silently wrong."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import vlkernels as vk
from vlkernels.core import library, native
from vlkernels.ops.linear_cross_entropy import driver


def first_gradient(features):
    loss = vk.contrastive_loss(features, torch.randn(6, 4), 2.0, impl="torch")
    return torch.autograd.grad(loss, features, create_graph=True)[0]


def test_a_gradient_penalty_is_refused():
    features = torch.randn(6, 4, requires_grad=True)
    gradient = first_gradient(features)
    assert torch.isfinite(gradient).all()
    with pytest.raises(RuntimeError, match="no second derivative"):
        (gradient.square().sum() + features.sum()).backward()


def test_creating_a_graph_that_nobody_differentiates_is_allowed():
    features = torch.randn(6, 4, requires_grad=True)
    first_gradient(features)
    features.sum().backward()
    assert torch.equal(features.grad, torch.ones(6, 4))


def classifier_gradients(is_autocast):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator).requires_grad_() for n in (16, 50))
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        loss = vk.linear_cross_entropy(hidden, weight, torch.arange(16), impl="torch")
        return torch.autograd.grad(loss, (hidden, weight))


def test_autocast_does_not_reach_into_kernels(monkeypatch):
    monkeypatch.setattr(driver, "CPU_CHUNK_LOGITS", 200)
    for mine, plain in zip(classifier_gradients(True), classifier_gradients(False), strict=True):
        assert torch.equal(mine, plain)


def test_kernels_know_an_eager_call_from_a_compiled_graph():
    found = []

    def copy(x):
        found.append(bool(library.eager_call))
        return x.clone()

    op = library.define("test_copy(Tensor x, str impl) -> Tensor", fake=lambda x, impl: x.clone(), kernels={"torch": copy})
    call = library.differentiable(
        op, setup_context=lambda ctx, inputs, output: None, backward=lambda ctx, grad: (op(grad, "torch"), None)
    )
    x = torch.ones(3, requires_grad=True)
    call(x, "torch").sum().backward()
    call(x.detach(), "torch")
    with torch.no_grad():
        call(x, "torch")
    assert found == [True] * 4 and not library.eager_call
    found.clear()
    torch.compile(lambda x: call(x, "torch"), fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert found == [False] * 2


def two_outputs():
    """An op that doubles, and an output beside it that only its backward wants."""

    def double(x):
        return 2 * x, torch.full_like(x, 2.0)

    op = library.define(
        "test_double(Tensor x, str impl) -> (Tensor, Tensor)", fake=lambda x, impl: (x.clone(), x.clone()), kernels={"torch": double}
    )

    def keep(ctx, inputs, output):
        ctx.save_for_backward(output[1])

    def backward(ctx, grad, *others):
        return grad * ctx.saved_tensors[0], None

    return library.differentiable(op, setup_context=keep, backward=backward, returned=1)


def test_an_eager_call_returns_the_outputs_it_says_and_a_graph_all():
    call, x = two_outputs(), torch.ones(3, requires_grad=True)
    (eager,) = call(x, "torch")
    compiled, _ = torch.compile(lambda x: call(x, "torch"), fullgraph=True, backend="aot_eager")(x)
    with torch.no_grad():
        (alone,) = call(x, "torch")
    for output in (eager, compiled):
        assert torch.equal(torch.autograd.grad(output.sum(), x)[0], torch.full((3,), 2.0))
    assert torch.equal(alone, eager) and not alone.requires_grad


def classifier_loss(hidden):
    return vk.linear_cross_entropy(hidden, torch.ones(5, 8), torch.arange(4), impl="torch")


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev, torch.func.hessian])
def test_transforms_of_functions_are_refused(transform):
    """An eager call skips PyTorch's preparation for them: without this they would pass unseen."""
    with pytest.raises(RuntimeError, match='has no .*: use impl="reference"'):
        transform(classifier_loss)(torch.randn(4, 8) if transform is not torch.func.vmap else torch.randn(2, 4, 8))


@pytest.mark.parametrize("is_grad_enabled", [True, False])
def test_tangents_are_refused(is_grad_enabled):
    """Also where nobody asked for gradients, and of tensors in a list."""
    x, table = torch.randn(4, 8), torch.randn(4, 8)
    with torch.set_grad_enabled(is_grad_enabled):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(classifier_loss, (x,), (x,))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x)
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                classifier_loss(dual)
            if native.missing("embed_layer_norm_forward", "CPU") is None:
                with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                    vk.embed_layer_norm(torch.zeros(4, 2, dtype=torch.int64), [table, dual], None, impl="cpp")
            assert classifier_loss(x).isfinite()  # it has none


def contrastive(features):
    return vk.contrastive_loss(features, features.detach(), 2.0, impl="torch")


@pytest.mark.parametrize("loss", [classifier_loss, contrastive])
def test_products_with_derivatives_of_second_order_are_refused(loss):
    """They ask the graph of a gradient for its inputs and its cotangent, and took nothing for 0."""
    x = torch.randn(4, 8)
    for product in (torch.autograd.functional.hvp, torch.autograd.functional.vhp, torch.autograd.functional.jvp):
        with pytest.raises(RuntimeError, match="no second derivative"):
            product(loss, x, torch.randn(4, 8))


def test_a_checkpoint_runs_again_once_where_a_graph_of_gradients_is_made():
    x, runs = torch.randn(4, 8, requires_grad=True), []

    def loss(x):
        runs.append(1)
        return classifier_loss(x)

    expected = torch.autograd.grad(loss(x), x)[0]
    runs.clear()
    (found,) = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x, create_graph=True)
    assert torch.equal(found, expected) and len(runs) == 2
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(found.sum(), x)


def test_a_graph_names_the_op():
    loss = classifier_loss(torch.randn(4, 8, requires_grad=True))
    assert loss.grad_fn.name() == "linear_cross_entropy_backward"
