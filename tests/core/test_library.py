"""What every op's autograd promises beyond the contract: a second derivative is refused, never silently wrong."""

import pytest
import torch
import vlkernels as vk


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
