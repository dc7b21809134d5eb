"""UNITER's recipe, shrunk, under ZeRO and accumulation, and the same in plain PyTorch."""

import dataclasses
import itertools

import torch
from launch import ROOT
from quickstart_curves import weights_of

from engine import pretrain
from engine.batch import Batch, MaskedRegions, MaskedWords, Places
from engine.build import build_model
from engine.config import Config
from engine.data import load_training_sets, make_tokenizer, training_stream
from engine.objectives import PretrainingModule
from engine.training import zero
from engine.training.command_line import parse
from engine.training.step import agree, normalizers, run_window

RECIPE = ROOT / "engine" / "recipes" / "uniter_base.yaml"
STAGES, ACCUMULATIONS = (0, 1, 2, 3), (1, 2, 6)
SEED, STEPS = 29, 4  # whose first four steps have a task each
RATES = {
    "random_matching": 1.0,
    "masked_language": 1.0,
    "masked_region_features": 4.0,
    "masked_region_classes": 512.0,
}
"""Such that the change of a weight is its gradient, neither rounded away nor the end of all learning."""
FULL = 20
"""In the second pass over the steps, samples from this one on have nothing masked and no replaced image:
whole micro-batches and ranks then have nothing to predict."""


def uniter(cache: str, stage: int = 1, accumulation: int = 1) -> Config:
    """SGD without clipping or decay, in fp32; dropout, sets and tasks as published; uneven batches."""
    sgd = ["--optimizer.kind=sgd", "--optimizer.clip=0", "--optimizer.weight_decay=0", "--precision=fp32"]
    rest = [f"--seed={SEED}", f"--data.cache={cache}", f"--zero.stage={stage}"]
    rest += [f"--train.accumulation={accumulation}", "--device=cpu", "--tiny=true"]
    uneven = ["--train.buckets.tokens=180", "--train.buckets.multiple=1"]
    return parse(["--config", str(RECIPE), *sgd, *rest, *uneven])


def windows(config: Config, rank: int, world: int) -> tuple[int, list[list[Batch]]]:
    """Size of the vocabulary, and the first steps of the real stream: as they are, then hollowed out."""
    sets = load_training_sets(config)
    tokenizer = make_tokenizer(config, sets)
    stream = training_stream(config, sets, tokenizer, rank, world, step=0, samples_seen=0)
    first = list(itertools.islice(stream, STEPS))
    return tokenizer.vocab_size, first + [[hollow(batch) for batch in window] for window in first]


def hollow(batch: Batch) -> Batch:
    """The batch with nothing to predict in the later samples of its step."""
    full = batch.sample_ids < FULL
    views, counts = dict(batch.views), dict(batch.counts)
    for name, view in batch.views.items():
        if isinstance(view, torch.Tensor):
            views[name] = torch.where(full, view, 1)
            continue
        kept = full[view.places.samples]
        views[name] = keep_words(batch, view, kept) if isinstance(view, MaskedWords) else keep_regions(view, kept)
        counts[name] = int(kept.sum())
    return dataclasses.replace(batch, views=views, counts=counts)


def keep_words(batch: Batch, words: MaskedWords, kept: torch.Tensor) -> MaskedWords:
    ids = words.ids.clone()
    ids[words.places.rows(batch.text.layout)[~kept]] = words.targets[~kept]
    return MaskedWords(ids, keep(words.places, kept), words.targets[kept])


def keep_regions(regions: MaskedRegions, kept: torch.Tensor) -> MaskedRegions:
    labels = regions.soft_labels
    return MaskedRegions(keep(regions.places, kept), None if labels is None else labels[kept])


def keep(places: Places, kept: torch.Tensor) -> Places:
    return Places(places.samples[kept], places.offsets[kept])


def plain_curve(cache: str) -> list[dict]:
    """The definition: one process, one batch, torch's SGD. Losses and the change of every weight."""
    config = uniter(cache)
    vocab_size, batches = windows(config, rank=0, world=1)
    torch.manual_seed(config.seed)
    model = build_model(config, vocab_size)
    model.rng.state[0] = config.seed
    module = PretrainingModule(model, config.objectives.active)
    optimizer = torch.optim.SGD(module.parameters())
    points = []
    for (batch,) in batches:
        optimizer.param_groups[0]["lr"] = RATES[batch.task[0]]
        batch.normalizers = normalizers(batch.counts, 1, torch.device("cpu"))
        before = weights_of(module)
        loss, losses, _ = module(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.rng.advance()
        named = {name: value.item() for name, value in {"loss": loss, **losses}.items()}
        points.append({"losses": named, "changes": changes(before, weights_of(module))})
    return points


def zero_curves(cache: str, truth: list[dict]) -> dict[str, list[dict]]:
    """The same under every stage and accumulation, on all ranks; weights are compared where they are."""
    curves = {}
    for accumulation in ACCUMULATIONS:
        ranks = zero.join(config := uniter(cache, accumulation=accumulation))
        vocab_size, cut = windows(config, ranks.rank, ranks.world)
        for stage in STAGES:
            engine, _ = pretrain.build_engine(uniter(cache, stage, accumulation), ranks, vocab_size)
            curves[f"{stage} {accumulation}"] = zero_curve(engine, ranks, cut, truth)
    return curves


def zero_curve(
    engine: zero.Engine, ranks: zero.Ranks, cut: list[list[Batch]], truth: list[dict]
) -> list[dict]:
    points = []
    for window, expected in zip(cut, truth, strict=True):
        for group in engine.deepspeed.optimizer.param_groups:
            group["lr"] = RATES[window[0].task[0]]
        with engine.whole_module() as whole:
            before = weights_of(whole)
        agreement = agree(window, ranks, stop=False)
        result = run_window(engine, window, agreement.counts, ranks, engine.module.model.rng)
        assert result.applied
        losses = {name: ranks.mean(result.values[name]).item() for name in expected["losses"]}
        with engine.whole_module() as whole:
            name, error = largest_error(changes(before, weights_of(whole)), expected["changes"])
        parts = [batch.counts for batch in window]
        points.append({"losses": losses, "parts": parts, "largest error": error, "where": name})
    return points


def changes(before: dict, after: dict) -> dict[str, torch.Tensor]:
    return {name: after[name] - before[name] for name in before}


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[str, float]:
    """Where a change is furthest from the expected one, in shares of what rounding explains."""
    assert found.keys() == expected.keys()
    largest = max(change.abs().max().item() for change in expected.values())
    errors = {
        name: (found[name] - change).abs().max().item() / (1e-4 * change.abs().max().item() + 1e-6 * largest)
        for name, change in expected.items()
    }
    return max(errors.items(), key=lambda item: item[1])
