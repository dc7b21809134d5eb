"""The feature cache without DeepSpeed: any batch-coupled objective, equal draws in both readings, memory of one
micro-batch."""

from types import SimpleNamespace

import pytest
import torch
import vlkernels as vk
from live_bytes import LiveBytes
from random_batch import random_batch, small_model
from torch import nn

from engine.batch import Batch
from engine.objectives import BatchCoupledObjective, Features, Objectives, PretrainingModule, StepLoss
from engine.objectives.masked_language import MaskedLanguage
from engine.objectives.matching import Matching
from engine.training import feature_cache
from engine.training.step import normalizers, run_window

PAIRS = 24
ONE_RANK = SimpleNamespace(world=1, device=torch.device("cpu"))


class PlainEngine:
    """What `run_window` asks of an engine, by autograd alone; it counts its forwards."""

    def __init__(self, module: PretrainingModule, micro_steps: int):
        self.module, self.micro_steps, self.forwards = module, micro_steps, 0

    def __call__(self, *inputs, **options):
        self.forwards += 1
        return self.module(*inputs, **options)

    def backward(self, loss):
        (loss / self.micro_steps).backward()

    def step(self):
        return True

    def after_step(self, applied):
        """No state follows the steps here."""


class Sigmoid(BatchCoupledObjective):
    """SigLIP's: labels beside the features, two numbers, one of them clamped out of the gradient's reach."""

    def features(self, model, batch):
        rows = {"image": model.image_features(batch), "text": model.text_features(batch), "label": batch.labels}
        return Features(rows, {"scale": model.scale(), "bias": model.logit_scale - 5})

    def loss(self, features, impl):
        numbers, rows = features.numbers, features.rows
        options = {"logit_bias": numbers["bias"], "labels": rows["label"], "impl": impl}
        loss = vk.sigmoid_loss(rows["image"], rows["text"], numbers["scale"], **options)
        # Two named losses, and one number that only one of them reads.
        return {"sigmoid": loss, "pull": (rows["image"] - rows["text"]).square().mean()}, {}


class LateInteraction(BatchCoupledObjective):
    """FILIP's: unevenly many rows per pair and per micro-batch."""

    def features(self, model, batch):
        image, text = model.image_states(batch), model.text_states(batch)
        rows = {"image": image.hidden, "text": text.hidden}
        lengths = {"image_lengths": image.layout.lengths, "text_lengths": text.layout.lengths}
        return Features({**rows, **lengths}, {"scale": model.scale()})

    def loss(self, features, impl):
        rows = features.rows
        layouts = {f"{name}_layout": vk.SegmentLayout(rows[f"{name}_lengths"]) for name in ("image", "text")}
        tokens = nn.functional.normalize(rows["image"], dim=1), nn.functional.normalize(rows["text"], dim=1)
        return {"late": vk.late_interaction_loss(*tokens, features.numbers["scale"], **layouts, impl=impl)}, {}


def small_module(dropout: float = 0.1, **coupled: BatchCoupledObjective) -> PretrainingModule:
    """Matching among the micro-batch, masked words, and what is given, at a weight of its own."""
    local = Objectives(matching=Matching(negatives="local"), masked_language=MaskedLanguage())
    return PretrainingModule(small_model(dropout), {**local.active, **coupled})


def window_of(micro_batch: int, pairs: int = PAIRS, task: tuple[str, ...] | None = None) -> list[Batch]:
    window = [random_batch(range(start, start + micro_batch)) for start in range(0, pairs, micro_batch)]
    for batch in window:
        batch.task = task
    return window


def take(module: PretrainingModule, window: list[Batch]) -> tuple[dict, PlainEngine]:
    counts = {name: sum(batch.counts[name] for batch in window) for name in window[0].counts}
    engine = PlainEngine(module, len(window))
    return run_window(engine, window, counts, ONE_RANK, module.model.rng).values, engine


def gradients_of(module: PretrainingModule) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


# ---- gradients


@pytest.mark.parametrize("objective", [Sigmoid(0.7), LateInteraction(0.7)])
def test_an_objective_of_ones_own_needs_no_other_trainer(objective):
    """Value and every parameter's gradient are those of one batch, beside a local loss."""
    task = ("own", "masked_language")
    whole, cut = small_module(own=objective), small_module(own=objective)
    values, engine = take(whole, window_of(PAIRS, task=task))
    assert engine.forwards == 1, "a micro-batch that is alone is read once"
    again, engine = take(cut, window_of(4, task=task))
    assert engine.forwards == 2 * PAIRS / 4
    assert {name: value.item() for name, value in again.items()} == pytest.approx(
        {name: value.item() for name, value in values.items()}, rel=1e-5
    )
    found, truth = gradients_of(cut), gradients_of(whole)
    assert found.keys() == truth.keys() and "model.logit_scale" in truth
    for name, gradient in truth.items():
        assert (found[name] - gradient).abs().max() < 1e-4 * gradient.abs().max(), name


def test_steps_without_a_batch_coupled_loss_are_read_once():
    _, engine = take(small_module(own=Sigmoid(0.7)), window_of(4, task=("masked_language", "matching")))
    assert engine.forwards == PAIRS / 4


def test_gradients_below_float16_arrive():
    """DeepSpeed scales the loss of the second reading; what the first one kept must not be lost before that."""
    rows = [torch.full((2, 3), 0.5, dtype=torch.float16, requires_grad=True) for _ in range(2)]
    tiny = SimpleNamespace(loss=lambda whole, impl: ({"tiny": (whole.rows["x"] * 2.0**-30).sum()}, {}))
    taken = StepLoss.over(tiny, [Features({"x": part.detach()}, {}) for part in rows], "auto")
    scaled = 2.0**20 * taken[1].at(Features({"x": rows[1]}, {}))
    (scaled / 2).backward()
    assert torch.equal(rows[1].grad, torch.full((2, 3), 2.0**-10, dtype=torch.float16))


# ---- draws


class WithTorchDropout(Sigmoid):
    """Also draws from torch's generator, and notes what it saw."""

    def __init__(self):
        super().__init__(0.7)
        self.seen = []

    def features(self, model, batch):
        features = super().features(model, batch)
        drawn = {name: nn.functional.dropout(features.rows[name], 0.5) for name in ("image", "text")}
        self.seen.append({name: drawn[name].detach().clone() for name in drawn})
        return Features({**features.rows, **drawn}, features.numbers)


def both_readings_agree(module: PretrainingModule, objective: WithTorchDropout) -> bool:
    """To rounding (without a graph other implementations may serve), and local objectives draw between readings."""
    window = window_of(4)
    take(module, window)
    firsts, seconds = objective.seen[: len(window)], objective.seen[len(window) :]
    assert len(seconds) == len(window) and not torch.equal(firsts[0]["image"], firsts[1]["image"])
    pairs = ((first[name], second[name]) for first, second in zip(firsts, seconds) for name in first)
    return all(torch.allclose(first, second, rtol=1e-5, atol=1e-6) for first, second in pairs)


@pytest.mark.parametrize("recompute", [False, True])
def test_both_readings_draw_the_same(recompute):
    objective = WithTorchDropout()
    module = small_module(dropout=0.3, own=objective)
    module.model.checkpoint_activations(recompute)
    before = torch.get_rng_state()
    assert both_readings_agree(module, objective)
    assert not torch.equal(torch.get_rng_state(), before), "the next step draws others"


def test_a_generator_that_is_not_restored_is_noticed(monkeypatch):
    monkeypatch.setattr(feature_cache, "restore_generators", lambda states, device: None)
    objective = WithTorchDropout()
    assert not both_readings_agree(small_module(own=objective), objective)


# ---- memory


def bytes_of(pairs: int, micro_batch: int) -> LiveBytes:
    module = small_module(own=Sigmoid(0.7))
    window = window_of(micro_batch, pairs, task=("own", "masked_language"))
    take(module, window)  # what a first step makes for good
    with LiveBytes() as live:
        take(module, window)
    return live


def test_memory_grows_with_the_micro_batch_alone():
    of_16, of_64, uncut = bytes_of(16, 8), bytes_of(64, 8), bytes_of(64, 64)
    assert uncut.peak > 5 * of_16.peak, "what the cache saves"
    assert of_64.peak < 1.05 * of_16.peak  # features, and the largest of eight ragged micro-batches in place of two
    assert of_64.held == 0, "nothing outlives a step"


def test_a_first_reading_with_a_graph_is_noticed(monkeypatch):
    monkeypatch.setattr(feature_cache, "torch", SimpleNamespace(no_grad=torch.enable_grad))
    assert bytes_of(64, 8).peak > 2 * bytes_of(16, 8).peak
