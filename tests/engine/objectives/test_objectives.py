"""Values by hand, and the batches that leave an objective nothing to do."""

import math

import torch
from live_bytes import LiveBytes
from random_batch import random_batch, small_model
from torch.nn import functional as F

from engine.batch import MaskedWords, Places
from engine.objectives import Objectives, PretrainingModule, contrastive
from engine.objectives.contrastive import Contrastive
from engine.objectives.masked_language import MaskedLanguage
from engine.objectives.matching import Matching, draw_negatives, matching_logits


def test_contrastive_by_hand():
    model, batch = small_model(), random_batch(range(5))
    losses, report = Contrastive()(model, batch)
    logits = model.scale() * model.image_features(batch) @ model.text_features(batch).T
    own = torch.arange(5)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(losses["contrastive"], expected)
    found = (logits.argmax(1) == own).float().mean() + (logits.argmax(0) == own).float().mean()
    torch.testing.assert_close(report["contrastive_accuracy"], found / 2)
    torch.testing.assert_close(report["logit_scale"], model.logit_scale.detach().exp()[0])


def test_contrastive_accuracy_tile_by_tile(monkeypatch):
    model, batch = small_model(), random_batch(range(7))
    whole = Contrastive()(model, batch)[1]["contrastive_accuracy"]
    monkeypatch.setattr(contrastive, "LOGITS_AT_ONCE", 2 * 7)
    assert 0 < whole < 1 and Contrastive()(model, batch)[1]["contrastive_accuracy"] == whole


def test_contrastive_accuracy_keeps_no_tile(monkeypatch):
    monkeypatch.setattr(contrastive, "LOGITS_AT_ONCE", 20 * 400)
    image, text = torch.randn(2, 400, 8)
    with LiveBytes() as live:
        contrastive._accuracy(image, text)
    assert 20 * 400 * 4 < live.peak < 4 * 20 * 400 * 4


def test_normalizers_replace_the_local_mean():
    """A local sum times the trainer's factor: half the mean when the factor is half of one over the local
    count."""
    model, batch = small_model(), random_batch(range(4))
    for objective, count, name in (
        (Matching(), "pairs", "matching"),
        (MaskedLanguage(), "masked_language", "masked_language"),
    ):
        batch.normalizers = {}
        mean = objective(model, batch)[0][name]
        batch.normalizers = {count: torch.tensor(0.5 / batch.counts[count])}
        torch.testing.assert_close(objective(model, batch)[0][name], mean / 2)


def test_weights_and_absent_objectives():
    objectives = Objectives(contrastive=Contrastive(weight=2.0), masked_language=MaskedLanguage(weight=0.5))
    module, batch = PretrainingModule(small_model(), objectives.active), random_batch(range(4))
    total, losses, report = module(batch)
    assert losses.keys() == {"contrastive", "masked_language"} and "matching_accuracy" not in report
    torch.testing.assert_close(total, 2 * losses["contrastive"] + 0.5 * losses["masked_language"])
    assert all(value.dim() == 0 and not value.requires_grad for value in report.values())


def test_negatives_never_have_the_label_of_the_sample():
    """Pairs 0 and 5 show the same image: neither is a negative of the other."""
    model, batch = small_model(), random_batch(range(6))
    drawn = set()
    for _ in range(60):
        model.rng.advance()
        texts, images = draw_negatives(model, batch, None, 1.0)
        for index in (texts, images):
            assert (batch.labels[index] != batch.labels).all()
            drawn |= {(i, int(j)) for i, j in enumerate(index)}
    assert len(drawn) > 12, "the draws follow the scores but are not frozen"


def test_one_label_has_no_negatives():
    model, batch = small_model(), random_batch(range(3))
    batch.labels = torch.zeros_like(batch.labels)
    losses, report = Matching()(model, batch)
    logits = matching_logits(model, model.fuse(model.text_states(batch), model.image_source(batch)))
    own = F.cross_entropy(logits, torch.ones(3, dtype=torch.long), reduction="sum")
    torch.testing.assert_close(losses["matching"], own / 9)
    torch.testing.assert_close(report["matching_accuracy"], (logits.argmax(1) == 1).float().mean())


def test_no_masked_words_give_zero_and_zero_gradients():
    model, batch = small_model(), random_batch(range(3))
    words = batch.views["masked_language"]
    batch.views["masked_language"] = MaskedWords(words.ids, Places(words.targets[:0], words.targets[:0]), words.targets[:0])
    batch.counts["masked_language"] = 0
    loss = MaskedLanguage()(model, batch)[0]["masked_language"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_hardness_chooses_between_uniform_and_the_hardest():
    """At 0 every other sample is drawn equally often, far above 1 always the one the towers confuse most."""
    model, batch = small_model(), random_batch(range(5))
    hardest = (model.image_features(batch) @ model.text_features(batch).T).fill_diagonal_(-2).argmax(1)
    assert torch.equal(draw_negatives(model, batch, None, 1e4)[0], hardest)
    counts = torch.zeros(5, 5)
    for _ in range(400):
        model.rng.advance()
        counts[torch.arange(5), draw_negatives(model, batch, None, 0.0)[0]] += 1
    assert counts.diagonal().sum() == 0
    assert (counts[~torch.eye(5, dtype=torch.bool)] - 100).abs().max() < 45


def test_negatives_are_drawn_by_the_scale_of_the_contrast():
    """Hardness multiplies it: what one of them is more, the other may be less."""

    def drawn(scale: float, hardness: float) -> list[torch.Tensor]:
        model, batch = small_model(), random_batch(range(5))
        with torch.no_grad():
            model.logit_scale.fill_(math.log(scale))
        found = []
        for _ in range(20):
            model.rng.advance()
            found += draw_negatives(model, batch, None, hardness)
        return found

    def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        return all(map(torch.equal, one, other))

    assert same(drawn(64.0, 0.5), drawn(8.0, 4.0)) and not same(drawn(64.0, 0.5), drawn(8.0, 0.5))
