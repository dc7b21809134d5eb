"""Runs that begin with BERT's weights: the same states as `transformers`, one line for what does not fit."""

import json

import pytest
import torch
import vlkernels as vk
from random_pairs import UNITER
from safetensors.torch import load_file, save_file

from engine.batch import TEXT, Batch, Regions, Text
from engine.config import Config
from engine.initial_weights import load_initial_weights
from engine.build import build_model
from engine.objectives import Objectives
from engine.objectives.masked_language import MaskedLanguage
from engine.objectives.random_matching import RandomMatching
from engine.sections import Data, DataSet, JointStack, Model, Train
from engine.sections import Regions as RegionOptions

transformers = pytest.importorskip("transformers")

WIDTH, HEADS, LAYERS, INNER, VOCAB, POSITIONS = 32, 4, 3, 48, 50, 16
LENGTHS = [5, 1, 9, 3]


def bert_config(**changes) -> transformers.BertConfig:
    return transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=POSITIONS,
        **changes,
    )


@torch.no_grad()
def saved(folder, kind=transformers.BertForPreTraining, **changes):
    """A BERT with every parameter redrawn, in evaluation mode, saved to the folder."""
    bert = kind(bert_config(**changes)).eval()
    for parameter in bert.parameters():
        parameter.copy_(torch.randn(parameter.shape) * (0.25 if parameter.dim() >= 2 else 0.5))
    bert.save_pretrained(folder)
    return bert


def config_from(folder, **changes) -> Config:
    sizes = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "mlp_width": INNER, "max_positions": POSITIONS}
    sizes |= {"norm": "post", "eps": 1e-12, "activation": "gelu", **changes}
    return Config(
        init_from={"joint": str(folder)},
        data=Data(
            sets={"scenes": DataSet("builtin-scenes", {"masked_language": 1.0, "random_matching": 1.0})},
            regions=RegionOptions(feature_values=10, classes=6), max_caption_tokens=8,
        ),
        model=Model(image=None, text=None, fusion=None, joint=JointStack(**sizes, **UNITER)),
        objectives=Objectives(masked_language=MaskedLanguage(), random_matching=RandomMatching()),
        train=Train(max_steps=1),
    )


def captions_alone(ids: list[torch.Tensor]) -> Batch:
    layout = vk.SegmentLayout([[len(row), 0] for row in ids])
    nothing = Regions(torch.empty(0, 10), torch.empty(0, 7))
    text = Text(torch.cat(ids), layout.select((TEXT,)))
    return Batch(layout, text, nothing, torch.arange(len(ids)), layout.sample_ids)


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_captions_read_as_bert_reads_them(tmp_path, kind):
    bert = saved(tmp_path, getattr(transformers, kind))
    config = config_from(tmp_path)
    model = build_model(config, VOCAB).eval()
    load_initial_weights(config, model)

    ids = [torch.randint(1, VOCAB, (length,)) for length in LENGTHS]
    read = model.double().joint_states(captions_alone(ids))
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    visible = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    body = bert if kind == "BertModel" else bert.bert
    expected = body.double()(padded, attention_mask=visible)
    rows = zip(expected.last_hidden_state, LENGTHS, strict=True)
    hidden = torch.cat([row[:length] for row, length in rows])
    torch.testing.assert_close(read.hidden, hidden, rtol=1e-9, atol=1e-9)
    if expected.pooler_output is not None:
        torch.testing.assert_close(model.pooled(read), expected.pooler_output, rtol=1e-9, atol=1e-9)
    if kind != "BertModel":
        logits = model.heads["masked_language"].logits(read.hidden, model.words)
        torch.testing.assert_close(logits, bert.double().cls.predictions(hidden), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "tensors", "left"),
    [
        ("BertModel", 16 * LAYERS + 7, ["joint.image", "heads.masked_language", "heads.random_matching"]),
        ("BertForMaskedLM", 16 * LAYERS + 10, ["joint.image", "joint.pooling", "heads.random_matching"]),
        ("BertForPreTraining", 16 * LAYERS + 12, ["joint.image", "heads.random_matching"]),
    ],
)
def test_the_report_names_what_was_loaded_and_what_was_not(tmp_path, kind, tensors, left):
    saved(tmp_path, getattr(transformers, kind))
    config = config_from(tmp_path)
    model = build_model(config, VOCAB)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first, *others, last = load_initial_weights(config, model)
    assert first == f"loaded {tensors} tensors of {tmp_path} into model.joint"
    assert last == f"left at their initialisation: {', '.join(left)}"
    idle = [f"not used of {tmp_path}"] if kind == "BertForPreTraining" else []
    assert [line.partition(":")[0] for line in others] == idle
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith(tuple(left)), name


def test_tables_of_another_size_give_the_rows_in_common(tmp_path):
    bert = saved(tmp_path)
    config = config_from(tmp_path, max_positions=12)
    model = build_model(config, VOCAB + 4)
    fresh = model.words.detach().clone()
    lines = load_initial_weights(config, model)
    assert lines[1] == (
        "of tables of other rows: joint.text.words the first 50 rows (it has 54, the file 50), "
        "joint.text.positions the first 12 rows (it has 12, the file 16), "
        "heads.masked_language.bias the first 50 rows (it has 54, the file 50)"
    )
    embeddings = bert.bert.embeddings
    assert torch.equal(model.words[:VOCAB], embeddings.word_embeddings.weight)
    assert torch.equal(model.words[VOCAB:], fresh[VOCAB:])
    assert torch.equal(model.joint.text.positions, embeddings.position_embeddings.weight[:12])


def test_old_names_and_several_files(tmp_path):
    """Published BERTs call the norms' vectors gamma and beta; large models are split."""
    bert = saved(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for name, tensor in whole.items()
    }
    names = sorted(old)
    save_file({name: old[name] for name in names[:20]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: old[name] for name in names[20:]}, tmp_path / "model-00002-of-00002.safetensors")
    config = config_from(tmp_path)
    model = build_model(config, VOCAB)
    load_initial_weights(config, model)
    norm = bert.bert.encoder.layer[1].output.LayerNorm
    assert torch.equal(model.joint.transformer.blocks[1].feed_forward.norm.weight, norm.weight)
    assert torch.equal(model.joint.transformer.blocks[1].feed_forward.norm.bias, norm.bias)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"width": 64}, "model.joint.width must be 32, got 64"),
        (
            {"layers": 2, "heads": 2},
            "model.joint.layers must be 3, got 2; model.joint.heads must be 4, got 2",
        ),
        ({"mlp_width": 64}, "model.joint.mlp_width must be 48, got 64"),
        ({"activation": "gelu_tanh"}, "model.joint.activation must be gelu, got gelu_tanh"),
        ({"norm": "pre"}, "model.joint.norm must be post, got pre"),
    ],
)
def test_another_model_is_refused_in_one_line(tmp_path, changes, told):
    saved(tmp_path)
    config = config_from(tmp_path, **changes)
    with pytest.raises(ValueError) as caught:
        load_initial_weights(config, build_model(config, VOCAB))
    assert str(caught.value) == f"init_from.joint: {tmp_path} does not fit: {told}"


def test_pickles_are_not_read(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    config = config_from(tmp_path)
    told = "no model.safetensors but pytorch_model.bin, a pickle, which is not read"
    with pytest.raises(ValueError, match=told):
        load_initial_weights(config, build_model(config, VOCAB))


def test_folders_that_are_no_bert(tmp_path):
    config = config_from(tmp_path / "nowhere")
    model = build_model(config, VOCAB)
    with pytest.raises(ValueError, match="nowhere has no config.json"):
        load_initial_weights(config, model)
    saved(tmp_path)
    known = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(known | {"model_type": "mamba", "architectures": None}))
    with pytest.raises(ValueError, match="must be a folder of a .*bert, .*vit.*; got mamba"):
        load_initial_weights(config_from(tmp_path), model)
    (tmp_path / "config.json").write_text(json.dumps(known | {"position_embedding_type": "relative_key"}))
    with pytest.raises(ValueError, match="position_embedding_type of the folder must be absolute, got relative_key"):
        load_initial_weights(config_from(tmp_path), model)
    (tmp_path / "config.json").write_text(json.dumps(known))
    whole = load_file(tmp_path / "model.safetensors")
    del whole["bert.encoder.layer.1.output.dense.bias"]
    save_file(whole, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has no bert.encoder.layer.1.output.dense.bias"):
        load_initial_weights(config_from(tmp_path), model)
    config.init_from = {"text": str(tmp_path)}
    with pytest.raises(ValueError, match="the part must be one of model, joint, got text"):
        load_initial_weights(config, model)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.json", b"{", "cannot be read"),
        ("config.json", b"\xff\xfe", "cannot be read"),
        ("config.json", b"[1]", "must be an object"),
        ("model.safetensors", b"", "cannot be read"),
        ("model.safetensors", b"\x80" * 100, "cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, content, told):
    saved(tmp_path)
    (tmp_path / file).write_bytes(content)
    config = config_from(tmp_path)
    with pytest.raises(ValueError, match=rf"^init_from.joint: .*{file} {told}"):
        load_initial_weights(config, build_model(config, VOCAB))
