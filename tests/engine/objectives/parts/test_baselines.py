"""What can be had without looking at the pair, by hand."""

import math

import pytest
import torch

from engine.objectives.parts.baselines import ClassPrior, MeanRegion


def test_the_mean_region_by_hand():
    mean = MeanRegion()
    mean.add(torch.tensor([[0.0, 2.0], [4.0, 2.0]]))
    mean.add(torch.tensor([[2.0, 8.0]]))
    # The mean is (2, 4): squares 4 + 4 + 0 in the first value, 4 + 4 + 16 in the second.
    assert mean.count == 3 and mean.squared_error == pytest.approx((8 / 3 + 24 / 3) / 2)


def test_the_class_prior_by_hand():
    prior = ClassPrior()
    prior.add(torch.tensor([[0.5, 0.5]]))
    prior.add(torch.tensor([[1.0, 0.0]]))
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert prior.count == 2 and prior.divergence == pytest.approx((first + math.log(1 / 0.75)) / 2)


def test_the_class_prior_of_whole_labels_is_their_entropy():
    prior = ClassPrior()
    prior.add(torch.tensor([[1, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 0]]))
    assert prior.divergence == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert prior.largest_share == 0.75


def test_no_constant_is_stronger():
    targets, labels = torch.randn(50, 3) * 2 + 1, torch.randn(50, 4).softmax(1)
    mean, prior = MeanRegion(), ClassPrior()
    mean.add(targets)
    prior.add(labels)
    for _ in range(200):
        constant, distribution = torch.randn(3) * 2 + 1, torch.randn(4).softmax(0)
        assert (targets - constant).square().mean() > mean.squared_error
        assert (torch.xlogy(labels, labels / distribution)).sum(1).mean() > prior.divergence
