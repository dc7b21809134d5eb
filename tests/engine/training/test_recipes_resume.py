"""Recipes with states of several kinds go on exactly: documents in every step and the running statistics of a backbone; a
language model that stands still while gradients go through it."""

from itertools import islice

import pytest
import torch
from launch import ROOT
from shared_cache import shared_cache

from engine import pretrain
from engine.data import load_training_sets, make_tokenizer, training_stream
from engine.training import zero
from engine.training.checkpoint import Checkpoints, Progress
from engine.training.command_line import parse
from engine.training.step import agree, run_window

__all__ = ["shared_cache"]
BEFORE, AFTER = 2, 1
FROZEN = ("decoder.embedder.", "decoder.transformer.")


def states(engine: zero.Engine) -> dict[str, torch.Tensor]:
    with engine.whole_module() as module:
        return {name: value.clone() for name, value in module.model.state_dict().items()}


@pytest.mark.parametrize("name, stage", [("simvlm_base", 3), ("frozen", 2), ("frozen", 3)])
def test_a_recipe_resumes_exactly(tmp_path, shared_cache, name, stage):
    where = [f"--data.cache={shared_cache}", f"--output={tmp_path}", f"--zero.stage={stage}", "--tokenizer.kind=bpe"]
    recipe = ["--config", str(ROOT / "engine" / "recipes" / f"{name}.yaml"), "--tiny=true", "--device=cpu", "--precision=fp32"]
    config = parse([*recipe, *where])
    ranks, sets = zero.join(config), load_training_sets(config)
    tokenizer = make_tokenizer(config, sets)

    def take(engine: zero.Engine, first: int, count: int) -> dict[str, torch.Tensor]:
        done = {"step": first, "samples_seen": first * config.train.global_batch}
        for window in islice(training_stream(config, sets, tokenizer, 0, 1, **done), count):
            run_window(engine, window, agree(window, ranks, stop=False).counts, ranks, engine.module.model.rng)
        return states(engine)

    engine, _ = pretrain.build_engine(config, ranks, tokenizer.vocab_size)
    begun, rng = states(engine), engine.module.model.rng
    take(engine, 0, BEFORE)
    checkpoints = Checkpoints(config, ranks, tmp_path)
    checkpoints.save(engine, rng, Progress(step=BEFORE))
    straight = take(engine, BEFORE, AFTER)
    still = {name for name, value in straight.items() if torch.equal(value, begun[name])}
    assert still == {one for one in straight if name == "frozen" and one.startswith(FROZEN)}

    resumed, _ = pretrain.build_engine(config, ranks, tokenizer.vocab_size, new=False)
    checkpoints.load(checkpoints.newest(), resumed, resumed.module.model.rng)
    again = take(resumed, BEFORE, AFTER)
    assert again.keys() == straight.keys()
    assert all(torch.equal(value, straight[name]) for name, value in again.items())
