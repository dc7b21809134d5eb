"""Ranks, recall and chance by hand; a useless score never looks good."""

import math

import pytest
import torch
import vlkernels as vk
from torch.nn import functional as F

from engine.objectives.parts.retrieval import _candidates, _candidates_first, best_ranks, both_ways, chance, contrast

OWN = torch.eye(4, dtype=torch.bool)


def test_ranks_by_hand():
    scores = torch.tensor(
        [[0.9, 0.1, 0.2, 0.3], [0.8, 0.5, 0.1, 0.1], [0.3, 0.2, 0.1, 0.4], [0.1, 0.2, 0.3, 0.4]]
    )
    assert best_ranks(scores, OWN).tolist() == [0, 1, 3, 0]
    related = OWN | OWN.roll(1, 1)  # the next text is right as well: the best right one counts
    assert best_ranks(scores, related).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("value", [0.0, float("nan"), -float("inf")])
def test_scores_that_say_nothing_find_nothing(value):
    assert best_ranks(torch.full((4, 4), value), OWN).tolist() == [3, 3, 3, 3]


def test_recall_of_a_known_permutation():
    count = 20
    scores = torch.rand(count, count)
    order = scores.argsort(dim=1, descending=True)
    expected = (order == torch.arange(count)[:, None]).float().argmax(1)
    results = both_ways(scores, scores.T, torch.eye(count, dtype=torch.bool))
    for depth in (1, 5, 10):
        assert results[f"image_to_text_recall@{depth}"] == pytest.approx(
            (expected < depth).float().mean().item()
        )
        assert results[f"chance_recall@{depth}"] == pytest.approx(depth / count)


def test_chance_matches_random_orders():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4])
    related = labels[:, None] == labels[None]
    found = torch.stack(
        [(best_ranks(torch.rand(8, 8), related) < 2).float().mean() for _ in range(4000)]
    ).mean()
    assert chance(related, 2) == pytest.approx(found.item(), abs=0.01)
    assert chance(related, 10) == 1.0


def test_candidates_come_first_in_the_order_of_matching():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.1]])
    matching = torch.tensor([[-3.0, 5.0, -torch.inf, -torch.inf]])
    reranked = _candidates_first(scores, _candidates(scores, 2), matching)
    assert reranked.argsort(descending=True).tolist() == [[1, 0, 2, 3]]
    tied = _candidates_first(scores, _candidates(scores, 2), torch.zeros(1, 4))
    assert best_ranks(tied, torch.tensor([[True, False, False, False]])).tolist() == [1], (
        "a tie counts as wrong"
    )


def test_the_contrast_of_a_gallery_is_the_loss_over_it():
    image, text = F.normalize(torch.randn(2, 9, 5), dim=-1)
    logits = 7 * image @ text.T
    found = contrast(logits, logits.T)
    assert found["loss"] == pytest.approx(vk.contrastive_loss(image, text, 7.0).item(), rel=1e-5)
    assert contrast(torch.ones(9, 9), torch.ones(9, 9))["loss"] == pytest.approx(found["loss_all_alike"]) == pytest.approx(math.log(9))
