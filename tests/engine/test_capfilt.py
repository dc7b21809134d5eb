"""CapFilt from a run folder and shards to shards that can be trained on."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vlkernels as vk
from shared_cache import shared_cache

from engine import capfilt
from engine.batch import Text
from engine.build import build_model
from engine.data import load_source, load_training_sets, make_tokenizer
from engine.export import export, load
from engine.generation import generate
from engine.recipes import table
from engine.sections import Data

__all__ = ["shared_cache"]
RECORDS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared_cache):
    """Folder, configuration and a shard of built-in pictures; the model's weights are large enough to tell pictures apart."""
    options = ("--tiny=true", "--precision=fp32", f"--data.cache={shared_cache}", "--data.max_records=20")
    config = table.recipe("blip_base", *options)
    tokenizer = make_tokenizer(config, load_training_sets(config))
    torch.manual_seed(0)
    model = build_model(config, tokenizer.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    folder, source = tmp_path_factory.mktemp("run"), load_source(config.data, "held_out")
    export(folder, model, config, tokenizer)
    records = ((source[index], source[index].captions) for index in range(RECORDS))
    assert capfilt.write(folder / "found", records) == 1
    return folder, config, folder / "found" / "00000.tar"


@pytest.mark.parametrize("writer, source", [(None, "None"), (SimpleNamespace(source="joint"), "joint")])
def test_a_captioner_reads_an_image_tower(writer, source, monkeypatch, capsys):
    model = SimpleNamespace(options=SimpleNamespace(decoder=writer))
    monkeypatch.setattr(capfilt, "load", lambda _: SimpleNamespace(model=model))
    with pytest.raises(SystemExit):
        capfilt.main(["--captioner", "a", "--filter", "b", "--source", "c", "--output", "d"])
    assert f"a has no decoder that reads an image tower, its source is {source}" in capsys.readouterr().err


def test_what_is_written_is_likeliest_by_the_pass_of_training(run):
    """Decoding step by step, against one pass over what it wrote."""
    folder, config, shard = run
    loaded = load(folder)
    source = load_source(config.data, "train")
    records = [source[index] for index in range(5)]
    model, decoder = loaded.model, capfilt.decoder_of(loaded)
    batch = capfilt.batch_of(loaded, [(record, np.asarray([loaded.tokenizer.cls_id])) for record in records])
    first = model.begun_with(-2, batch.text)
    with torch.no_grad():
        read = model.decoder.source_of(model.image_states(batch))
        ends = {"end": -1, "pad": 0, "max_new_tokens": 6}
        found = generate(decoder, decoder.prompt(first.ids, first.layout), **ends, source=read).ids
        whole = torch.cat((first.ids[:, None], found[:, :-1]), 1)
        layout = vk.SegmentLayout([[6]] * 5)
        states = model.decoder(Text(whole.flatten(), layout), layout, model.rng, read).hidden
        logits = model.heads["causal_language"].logits(states, model.words_of("decoder"))
    assert torch.equal(logits.argmax(1).view(5, 6), found)
    assert len({tuple(row) for row in found.tolist()}) > 1


@pytest.mark.parametrize("bias", [10000.0, -10000.0])
def test_captions_that_belong_are_kept(run, tmp_path, bias, capsys):
    """A head that takes everything keeps the found caption and the written one; one that takes nothing ends in one line."""
    folder, config, shard = run
    loaded = load(folder)
    with torch.no_grad():
        loaded.model.heads["matching"].classifier.bias[1] = bias
    export(tmp_path / "filter", loaded.model, config, loaded.tokenizer)
    places = {"captioner": folder, "filter": tmp_path / "filter", "source": shard, "output": tmp_path / "new"}
    arguments = [f"--{name}={place}" for name, place in places.items()]
    if bias < 0:
        with pytest.raises(SystemExit):
            capfilt.main(arguments)
        assert "the filter has dropped every caption" in capsys.readouterr().err
        return
    assert capfilt.main(arguments) == 0
    before, after = (
        load_source(Data(source=str(one), cache=str(tmp_path)), "train") for one in (shard, tmp_path / "new" / "00000.tar")
    )
    assert len(before) == len(after) == RECORDS
    for index in range(RECORDS):
        old, new = before[index], after[index]
        assert np.array_equal(np.asarray(old.image), np.asarray(new.image))
        assert new.captions[: len(old.captions)] == list(dict.fromkeys(old.captions))
    assert sum(len(after[index].captions) - len(before[index].captions) for index in range(RECORDS)) > RECORDS // 2
