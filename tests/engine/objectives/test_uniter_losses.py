"""UNITER's losses worked out by hand, and what normalises them."""

from math import log
from types import SimpleNamespace

import pytest
import torch
import vlkernels as vk
from random_pairs import FOUR, TASKS, packed, random_pairs, region_batch, small_one_stream
from torch.nn import functional as F

from engine.batch import IMAGE, TEXT, Batch, MaskedRegions, MaskedWords, Places, Regions, Text
from engine.models.heads import MaskedLanguageHead
from engine.models.transformer import Tokens
from engine.objectives.masked_language import MaskedLanguage
from engine.objectives.masked_region_classes import MaskedRegionClasses
from engine.objectives.masked_region_features import MaskedRegionFeatures
from engine.objectives.random_matching import RandomMatching

OBJECTIVES = FOUR.active
ELSEWHERE = 1000.0  # a state that must not be read


def batch_of(lengths: list[tuple[int, int]], image: Regions | None = None, **views) -> Batch:
    """Captions and regions of these lengths; a test gives what its loss reads."""
    layout = vk.SegmentLayout(lengths)
    words, regions = layout.segment_totals
    image = image or Regions(torch.full((regions, 2), ELSEWHERE), torch.zeros(regions, 7))
    counts = {"pairs": len(lengths), **{name: len(view) for name, view in views.items()}}
    text = Text(torch.zeros(words, dtype=torch.long), layout.select((TEXT,)))
    return Batch(layout, text, image, torch.arange(len(lengths)), layout.sample_ids, views, counts=counts)


def places(*pairs: tuple[int, int]) -> Places:
    """(sample, position within the segment)."""
    return Places(*torch.tensor(pairs).T)


def model_of(hidden: torch.Tensor, batch: Batch, more: dict, **heads) -> SimpleNamespace:
    """What objectives ask of a model; its states are these whatever it reads."""
    tokens = Tokens(hidden, batch.layout)

    def masked_states(_: Batch, name: str) -> torch.Tensor:
        view = batch.views[name]
        return hidden[view.places.rows(batch.layout, TEXT if isinstance(view, MaskedWords) else IMAGE)]

    return SimpleNamespace(impl="auto", joint_states=lambda _: tokens, masked_states=masked_states, heads=heads, **more)


def two_masked_regions(
    task: str, hidden: torch.Tensor, soft_labels: torch.Tensor | None = None, image: Regions | None = None
):
    """The last region of the first pair and the first of the second: rows 3 and 5 of the stream, 1 and 2 of
    the regions."""
    states = torch.full((7, hidden.shape[1]), ELSEWHERE)
    states[[3, 5]] = hidden
    masked = MaskedRegions(places((0, 1), (1, 0)), soft_labels)
    batch = batch_of([(2, 2), (1, 2)], image, **{task: masked})
    return batch, states


def test_region_features_are_a_mean_over_regions_and_values():
    """Errors (1, 2) and (3, 4): (1 + 4 + 9 + 16) / (2 regions x 2 values)."""
    targets = torch.tensor([[ELSEWHERE, ELSEWHERE], [0.0, 1.0], [3.0, 4.0], [ELSEWHERE, ELSEWHERE]])
    predicted = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    image = Regions(targets, torch.zeros(4, 7))
    batch, states = two_masked_regions("masked_region_features", predicted, image=image)
    head = SimpleNamespace(features=lambda hidden, embedding: hidden)
    joint = SimpleNamespace(image=SimpleNamespace(feature_projection=SimpleNamespace(weight=None)))
    model = model_of(states, batch, {"joint": joint}, masked_region_features=head)
    losses, _ = MaskedRegionFeatures()(model, batch)
    torch.testing.assert_close(losses["masked_region_features"], torch.tensor(7.5))


def test_soft_region_classes_are_a_mean_over_regions_and_classes():
    """KL((1/2, 1/2, 0, 0) || 1/4 each) = log 2, KL((0, 1, 0, 0) || (1/8, 5/8, 1/8, 1/8)) = log 8/5; 8
    elements."""
    labels = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, log(5), 0.0, 0.0]])
    batch, states = two_masked_regions("masked_region_classes", logits, labels)
    model = model_of(states, batch, {}, masked_region_classes=SimpleNamespace(logits=lambda hidden: hidden))
    losses, _ = MaskedRegionClasses(targets="soft")(model, batch)
    torch.testing.assert_close(losses["masked_region_classes"], torch.tensor((log(2) + log(8 / 5)) / 8))


def test_hard_region_classes_leave_the_background_out():
    """The background is likeliest in the first region; class 1 is next, predicted with 1/8. Then class 3 with
    5/8."""
    labels = torch.tensor([[0.9, 0.06, 0.04, 0.0], [0.1, 0.0, 0.2, 0.7]])
    logits = torch.tensor([[log(5), 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, log(5)]])
    batch, states = two_masked_regions("masked_region_classes", logits, labels)
    model = model_of(states, batch, {}, masked_region_classes=SimpleNamespace(logits=lambda hidden: hidden))
    losses, _ = MaskedRegionClasses(targets="hard")(model, batch)
    torch.testing.assert_close(losses["masked_region_classes"], torch.tensor((log(8) + log(8 / 5)) / 2))


def test_masked_language():
    """The transform makes (1, -1) of (9, 0) and (-1, 1) of (0, 9). Over two words the probabilities are then
    (1/10, 9/10), for target 1, and (1/2, 1/2), for target 0."""
    head = MaskedLanguageHead(2, 2, 2, "gelu", 1e-12, "auto")
    with torch.no_grad():
        head.transform.weight.copy_(torch.eye(2))
        head.transform.bias.zero_()
        head.bias.copy_(torch.tensor([0.0, log(3)]))
    table = torch.tensor([[0.0, 0.0], [log(3) / 2, -log(3) / 2]])
    ids = torch.zeros(4, dtype=torch.long)
    words = MaskedWords(ids, places((0, 2), (1, 0)), torch.tensor([1, 0]))
    batch = batch_of([(3, 2), (1, 1)], masked_language=words)
    states = torch.full((7, 2), ELSEWHERE)
    states[[2, 5]] = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    model = model_of(states, batch, {"words": table}, masked_language=head)
    losses, _ = MaskedLanguage()(model, batch)
    torch.testing.assert_close(losses["masked_language"], torch.tensor((log(10 / 9) + log(2)) / 2))


def matched(alignment: float):
    """Captions of one word (1, 0), each all of whose mass goes to its regions evenly: costs 0 and 1, own; 2,
    replaced; 1, own. Last a caption of two words, (1, 0) and (0, 1), beside (1, 0): costs 0 and 1, replaced."""
    states = [
        [1.0, 0.0], [3.0, 0.0], [0.0, 2.0],
        [1.0, 0.0], [-1.0, 0.0],
        [1.0, 0.0], [0.0, 5.0],
        [1.0, 0.0], [0.0, 1.0], [1.0, 0.0],
    ]  # fmt: skip
    batch = batch_of([(1, 2), (1, 1), (1, 1), (2, 1)], random_matching=torch.tensor([1, 0, 1, 0]))
    logits = torch.tensor([[0.0, log(3)]]).expand(4, 2)
    joint = SimpleNamespace(segment=("text", "image").index)
    model = model_of(torch.tensor(states), batch, {"pooled": lambda _: logits, "joint": joint}, random_matching=lambda pooled: pooled)
    return RandomMatching(alignment=alignment)(model, batch)


def test_matching():
    """Every pair is taken for an own one with 3/4: two are."""
    losses, report = matched(alignment=0.0)
    assert losses.keys() == {"random_matching"} and report.keys() == {"matching_accuracy"}
    torch.testing.assert_close(losses["random_matching"], torch.tensor((2 * log(4 / 3) + 2 * log(4)) / 4))
    assert report["matching_accuracy"] == 0.5


def test_alignment_is_own_less_replaced_over_all_pairs():
    """Own pairs 1/2 and 1, replaced ones 2 and 1/2: 0.1 (3/2 - 5/2) / 4 pairs."""
    losses, report = matched(alignment=0.1)
    torch.testing.assert_close(losses["word_region_alignment"], torch.tensor(-0.1 / 4))
    torch.testing.assert_close(report["transport_own"], torch.tensor(0.75))
    torch.testing.assert_close(report["transport_replaced"], torch.tensor(1.25))


@pytest.mark.parametrize("task", TASKS)
def test_normalizers_replace_the_local_mean(task):
    """A local sum times the trainer's factor."""
    model, batch = small_one_stream(), region_batch(range(4))
    means = OBJECTIVES[task](model, batch)[0]
    count = "pairs" if task == "random_matching" else task
    batch.normalizers = {count: torch.tensor(0.5 / batch.counts[count])}
    halves = OBJECTIVES[task](model, batch)[0]
    for name, mean in means.items():
        torch.testing.assert_close(halves[name], mean / 2)


@pytest.mark.parametrize("task", [task for task in TASKS if task.startswith("masked")])
def test_nothing_masked_gives_zero_and_zero_gradients(task):
    pairs = random_pairs(range(3))
    batch = packed(pairs)
    none = torch.empty(0, dtype=torch.long)
    for name, view in batch.views.items():
        if isinstance(view, MaskedWords):
            batch.views[name] = MaskedWords(batch.text.ids, Places(none, none), none)
        elif isinstance(view, MaskedRegions):
            batch.views[name] = MaskedRegions(Places(none, none), torch.empty(0, 9))
    batch.counts |= dict.fromkeys([task for task in TASKS if task.startswith("masked")], 0)
    model = small_one_stream()
    loss = OBJECTIVES[task](model, batch)[0][task]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_one_kind_of_pair_alone():
    """A batch of own images only, or of replaced ones only, has no mean distance of the other kind."""
    model, batch = small_one_stream(), region_batch(range(4))
    for own, empty in ((1, "replaced"), (0, "own")):
        batch.views["random_matching"] = torch.full((4,), own)
        losses, report = OBJECTIVES["random_matching"](model, batch)
        assert report[f"transport_{empty}"] == 0
        assert (losses["word_region_alignment"] > 0) == (own == 1)


@pytest.mark.parametrize("task", TASKS)
def test_losses_in_half_precision_are_sums_in_float32(task):
    model, batch = small_one_stream().bfloat16(), region_batch(range(4))
    exact = small_one_stream().double()
    exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    expected = OBJECTIVES[task](exact, batch)[0][task]
    found = OBJECTIVES[task](model, batch)[0][task]
    assert found.dtype == torch.float32
    assert F.l1_loss(found.double(), expected) < 0.05 * expected.abs()
