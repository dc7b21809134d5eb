"""A model over words and regions leaves a folder that loads back. `test_evaluate.py` has the rest of
export."""

import json

import pytest
import torch
import vlkernels as vk
from random_pairs import redraw, region_batch
from safetensors.torch import load_file

import engine
from benchmarks.plain_uniter import Sizes, bert
from engine.batch import Text
from engine.build import build_model
from engine.config import Config
from engine.data.tokenization.training import train_tokenizer
from engine.export import export, main, rebuild
from engine.published import Loaded, write
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


def small(recipe: str, *more: str):
    """A tiny model of a recipe with every parameter redrawn, its configuration and its tokenizer."""
    config = parse([f"--config=engine/recipes/{recipe}.yaml", "--tiny=true", *more])
    tokenizer = train_tokenizer([f"word{number} glyph{number}" for number in range(200)], "wordpiece", 150, False)
    model = build_model(config, tokenizer.vocab_size).eval()
    redraw(model)
    return config, tokenizer, model


def test_what_only_training_needs_stays_behind(tmp_path):
    config, tokenizer, model = small("albef_base")
    export(tmp_path, model, config, tokenizer)
    written = load_file(tmp_path / "model.safetensors").keys()
    assert any(name.startswith("teacher.") for name in model.state_dict())
    assert written == {name for name in model.state_dict() if not name.startswith(("teacher.", "heads.momentum_contrastive."))}
    loaded = engine.load(tmp_path).model
    own, copied = loaded.image.embedder.class_token, loaded.teacher.module.image.embedder.class_token
    assert torch.equal(own, model.image.embedder.class_token) and torch.equal(copied, own) and copied is not own


def test_a_run_becomes_a_folder_of_transformers(tmp_path, capsys):
    """By the command, with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    config, tokenizer, model = small("bert_base")
    export(tmp_path / "run", model, config, tokenizer)
    assert main([str(tmp_path / "run"), str(tmp_path / "bert")]) == 0
    assert capsys.readouterr().out.startswith(f"wrote 46 tensors to {tmp_path / 'bert'}, a BertForPreTraining")
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    text = "word7 glyph30 word199"
    assert read(text)["input_ids"] == tokenizer.encode(text, 64)[0].tolist()
    assert read.convert_tokens_to_ids(read.mask_token) == tokenizer.mask_id
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "bert").eval()
    ids = torch.tensor(tokenizer.encode(text, 64)[0])
    layout = vk.SegmentLayout([[len(ids)]])
    with torch.no_grad():
        found = model.text(Text(ids, layout), layout, None).hidden
        torch.testing.assert_close(found, theirs(**read(text, return_tensors="pt")).last_hidden_state[0], rtol=1e-4, atol=1e-4)


def test_a_mistake_is_one_line_of_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "out")])
    assert capsys.readouterr().err.startswith(f"export: error: {tmp_path} is not the folder of a finished run")


@pytest.mark.parametrize("recipe", ["roberta_base", "clip_vit_b32"])
def test_ids_that_mean_something_else_there_change_places(recipe, tmp_path):
    """[CLS] has RoBERTa's id of padding, [SEP] one that CLIP does not take for the end of a text."""
    transformers = pytest.importorskip("transformers")
    _, tokenizer, model = small(recipe)
    write(tmp_path, Loaded(model, tokenizer, None), None, None)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "word7 glyph30 word199"
    own = tokenizer.encode(text, 64)[0].tolist()
    assert read.convert_ids_to_tokens(read(text)["input_ids"]) == [tokenizer.model.id_to_token(number) for number in own]
    theirs = transformers.AutoModel.from_pretrained(tmp_path)
    if recipe == "roberta_base":
        assert (read.cls_token_id, read.pad_token_id) == (0, 1)
        table = theirs.embeddings.word_embeddings.weight
    else:
        assert read.sep_token_id == theirs.config.text_config.eos_token_id == tokenizer.vocab_size - 1
        table = theirs.text_model.embeddings.token_embedding.weight
    for number in own:
        assert torch.equal(table[read.convert_tokens_to_ids(tokenizer.model.id_to_token(number))], model.words[number])


@pytest.mark.parametrize(
    ("recipe", "family", "role", "told"),
    [
        ("albef_base", None, None, "no class that we know for a model with the roles image, text, fusion"),
        ("blip_base", None, None, "parts of it can be written as --family blip or blip_captions; it has"),
        ("albef_base", None, "decoder", "the role must be one of image, text, fusion, got decoder"),
        ("albef_base", "clip", None, "the model is no clip: model.image.patch_bias must be False, got True; .*model.text.norm must be pre"),
        ("bert_base", "roberta", None, "the model is no roberta: model.text.position_offset must be 2, got 0"),
        ("bert_base", "clip", None, "the model is no clip: it has other roles than text"),
        ("bert_base", "resnet", None, "the family must be one of bert, roberta"),
        ("uniter_base", None, None, "no class that we know for a model with the roles joint"),
    ],
)
def test_what_transformers_has_no_class_for(recipe, family, role, told, tmp_path):
    _, tokenizer, model = small(recipe)
    with pytest.raises(ValueError, match=told):
        write(tmp_path / "out", Loaded(model, tokenizer, None), family, role)
    assert not (tmp_path / "out").exists()


def test_roles_of_albef_are_written_alone(tmp_path):
    _, tokenizer, model = small("albef_base")
    first, left = write(tmp_path / "image", Loaded(model, tokenizer, None), None, "image")
    assert first.endswith("a ViTModel") and not (tmp_path / "image" / "tokenizer.json").exists()
    assert left.partition(": ")[2].split(", ")[:2] == ["logit_scale", "text.embedder"]
    assert write(tmp_path / "text", Loaded(model, tokenizer, None), None, "text")[0].endswith("a BertModel")
    assert not list(tmp_path.glob("*/*.draft"))


def test_what_is_shared_is_written_with_any_that_has_it(tmp_path):
    """BLIP's decoder has all but self-attention from the text role."""
    _, tokenizer, model = small("blip_base")
    first, left = write(tmp_path, Loaded(model, tokenizer, None), "blip_captions", None)
    assert first.endswith("a BlipForConditionalGeneration")
    named = left.partition(": ")[2].split(", ")
    assert "text.embedder" not in named and {"text.transformer", "heads.matching"} <= set(named)
