"""Every recipe, whichever there are: the published number of parameters, and thirty steps at its smallest size."""

from pathlib import Path

import pytest
import torch
from shared_cache import shared_cache

from engine.build import build_model
from engine.data import load_source, load_training_sets, make_tokenizer, held_out_batches, training_stream
from engine.evaluation import describe, evaluate
from engine.objectives import PretrainingModule
from engine.recipes import table
from engine.training.optimizer import freeze

__all__ = ["shared_cache"]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30


@pytest.mark.parametrize("name", table.names())
def test_as_many_parameters_as_published(name):
    config = table.recipe(name)
    assert config.name == name
    parameters = table.num_parameters(table.model_of(config))
    assert config.system is None or config.system.agrees(parameters), table.count(config, parameters)


def test_the_readme_names_every_recipe():
    listed = (ROOT / "README.md").read_text().partition("### Published systems")[2].partition("\n### ")[0]
    assert [name for name in table.names() if f"`{name}`" not in listed] == []


def test_a_wrong_count_is_told():
    config = table.recipe("uniter_base")
    parameters = table.num_parameters(table.model_of(config))
    assert not config.system.agrees(parameters + 1)
    assert " NOT " in table.count(config, parameters + 1)


@pytest.mark.parametrize("name, learning", [("blip2_stage1", 186_705_470), ("blip2_stage2", 107_133_696)])
def test_blip2_trains_queries_and_what_stands_around_them(name, learning):
    """Neither tower nor language model learns, but for the norm behind the tower."""
    config = table.recipe(name)
    model = table.model_of(config)
    freeze(config.optimizer.freeze, model.named_parameters())
    learns = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in learns if n.startswith("image.")} == {f"image.transformer.final_norm.{w}" for w in ("weight", "bias")}
    assert {n for n in learns if n.startswith("decoder.")} <= {"decoder.prefix.weight", "decoder.prefix.bias"}
    assert sum(learns.values()) == learning


def test_blocks_name_parts_and_counts():
    block = table.describe("uniter_base")
    assert "112,936,839 = 112,938,887 of the release - 2,048" in block and "12 x 768, 12 heads, post-norm" in block


@pytest.mark.parametrize("name", table.names())
def test_smallest_size_trains_and_evaluates(name, shared_cache):
    """All losses are finite and every parameter that learns has had a gradient."""
    config = table.recipe(name, "--tiny=true", f"--data.cache={shared_cache}", "--precision=fp32", f"--train.max_steps={STEPS}")
    if config.train.buckets is not None:
        config.train.global_batch = config.train.accumulation = 1
    torch.manual_seed(config.seed)
    sets, held_out = load_training_sets(config), load_source(config.data, "held_out")
    tokenizer = make_tokenizer(config, sets)
    model = build_model(config, tokenizer.vocab_size)
    module = PretrainingModule(model, config.objectives.active)
    learning = {n: p for n, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-3)
    stream = training_stream(config, sets, tokenizer, 0, 1, step=0, samples_seen=0)
    reached, met = set(), set()
    for _, window in zip(range(STEPS), stream):
        for batch in window:
            total, losses, _ = module(batch)
            assert all(value.isfinite() for value in losses.values()), losses
            met |= losses.keys()
            (total / len(window)).backward()
        reached |= {n for n, p in learning.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
        model.rng.advance()
    assert met >= set(config.objectives.active)
    assert learning.keys() == reached, sorted(learning.keys() - reached)
    read = lambda batch, task=None: held_out_batches(config, held_out, tokenizer, batch, task)  # noqa: E731
    figures = evaluate(model, read, config, tokenizer=tokenizer)
    assert describe(figures).count("\n") >= 1
    for objective in config.objectives.active:
        measured = figures.get(f"{objective}_loss", figures[objective])
        assert len([name for name in measured if name.startswith("loss")]) >= 2, f"{objective} is not beside what is known blindly"
        beside_other_images = objective == "masked_language" and config.model.reads_pictures is not None
        assert not beside_other_images or "loss_shuffled_image" in measured
