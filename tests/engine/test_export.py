"""A model over words and regions leaves a folder that loads back. `test_evaluate.py` has the rest of
export."""

import json

import torch
from random_pairs import redraw, region_batch
from safetensors.torch import load_file

import engine
from benchmarks.plain_uniter import Sizes, bert
from engine.build import build_model
from engine.config import Config
from engine.data.tokenization.training import train_tokenizer
from engine.export import export, rebuild
from engine.models import VisionLanguageModel
from engine.training.command_line import parse


def test_a_joint_model_loads_back(tmp_path):
    config = parse(["--config=engine/recipes/uniter_base.yaml", "--tiny=true"])
    captions = [f"word{number} glyph{number}" for number in range(200)]
    tokenizer = train_tokenizer(captions, "wordpiece", 150, False)
    model = build_model(config, tokenizer.vocab_size).eval()
    redraw(model)
    export(tmp_path, model, config, tokenizer)
    assert rebuild(Config, json.loads((tmp_path / "config.json").read_text())) == config
    loaded, same_tokenizer, transform = engine.load(tmp_path)
    assert loaded.options.roles == ["joint"] and not loaded.training and transform is None
    assert same_tokenizer.vocab_size == tokenizer.vocab_size
    batch = region_batch(range(3), Sizes(bert(32, 2, 2), vocab_size=tokenizer.vocab_size))
    assert torch.equal(loaded.joint_states(batch, "masked_region_features").hidden, model.joint_states(batch, "masked_region_features").hidden)
    assert load_file(tmp_path / "model.safetensors").keys() == dict(model.named_parameters()).keys()
