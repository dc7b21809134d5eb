"""Runs that begin role by role: each reads as the public model whose weights it took, or a part of one."""

import contextlib
import json

import pytest
import torch
import vlkernels as vk
from stack_parity import LENGTHS, InDouble, layout_of, redraw, visible

from engine.batch import Patches, Text
from engine.build import build_model
from engine.config import Config
from engine.data.tokenization.training import train_tokenizer
from engine.export import export
from engine.initial_weights import load_initial_weights
from engine.models import VisionLanguageModel
from engine.models.embedding.places import even_grid
from engine.models.masks import mask_table
from engine.recipes import table

transformers = pytest.importorskip("transformers")

VOCAB, PATCH = 50, 4
TOKENIZER = train_tokenizer([f"word{number} glyph{number}" for number in range(99)], "wordpiece", 120, False)
SIZES = {"width": 24, "layers": 2, "heads": 3, "mlp_width": 40}
THEIRS = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def saved(folder, kind: str, **options):
    """A public model with every parameter redrawn in what float32 holds, saved to the folder."""
    model_class = getattr(transformers, kind)
    theirs = redraw(model_class(model_class.config_class(**THEIRS | options))).float().eval()
    theirs.save_pretrained(folder)
    return theirs


def begun(name: str, folders: dict, *more: str, roles=("image", "text", "fusion")) -> tuple[VisionLanguageModel, list[str]]:
    """A recipe with few layers that begins with the folders, in float64, and what was told."""
    sizes = [f"--model.{role}.{key}={value}" for role in roles for key, value in SIZES.items()]
    config: Config = table.recipe(name, *sizes, *more)
    config.init_from = {role: str(folder) for role, folder in folders.items()}
    model = build_model(config, VOCAB)
    lines = load_initial_weights(config, model)
    return model.double().eval(), lines


def pictures(side: int) -> tuple[torch.Tensor, Patches, vk.SegmentLayout]:
    pixels = torch.randn(2, 3, side * PATCH, side * PATCH, dtype=torch.float64)
    layout = vk.SegmentLayout([[side * side]] * 2)
    return pixels, Patches(vk.patchify(pixels, layout, PATCH), even_grid(2, (side, side), pixels.device)), layout


def albef(tmp_path, side: int) -> tuple[VisionLanguageModel, list[str], torch.nn.Module, torch.nn.Module]:
    vit = saved(tmp_path / "vit", "ViTModel", image_size=3 * PATCH, patch_size=PATCH, layer_norm_eps=1e-6)
    bert = saved(tmp_path / "bert", "BertForMaskedLM", num_hidden_layers=4, vocab_size=VOCAB)
    folders = {"image": tmp_path / "vit", "text": tmp_path / "bert", "fusion": tmp_path / "bert"}
    size = f"--data.image_size={side * PATCH}", f"--model.image.max_grid=[{side},{side}]", f"--model.image.patch_size={PATCH}"
    return *begun("albef_base", folders, *size), vit, bert


@torch.no_grad()
def test_albef_begins_as_a_vit_and_a_bert_cut_in_two(tmp_path):
    model, lines, vit, bert = albef(tmp_path, 3)
    pixels, image, layout = pictures(3)
    ids = torch.randint(1, VOCAB, (len(LENGTHS), max(LENGTHS)))
    text = Text(ids[visible()], layout_of())
    for block in model.fusion.transformer.blocks:  # BERT has nothing for what reads the picture: here it adds nothing
        block.cross_attention.output.weight.zero_(), block.cross_attention.output.bias.zero_()
    with InDouble():
        states = vit.double()(pixels).last_hidden_state
        read = bert.double().bert(ids, visible().long(), output_hidden_states=True).hidden_states
        torch.testing.assert_close(model.image(image, layout, None).hidden, states.flatten(0, 1), **CLOSE)
        halfway = model.text(text, text.layout, None)
        torch.testing.assert_close(halfway.hidden, read[2][visible()], **CLOSE)
        first, second = (block.feed_forward for block in model.fusion.transformer.blocks)
        assert torch.equal(first.inner.weight, bert.bert.encoder.layer[2].intermediate.dense.weight)
        assert torch.equal(second.norm.bias, bert.bert.encoder.layer[3].output.LayerNorm.bias)
        head = model.heads["masked_language"]
        torch.testing.assert_close(head.logits(read[4], model.words), bert.cls.predictions(read[4]), **CLOSE)
    left = lines[-1].removeprefix("left at their initialisation: ").split(", ")
    assert all(".cross_attention." in name or not name.startswith(("image.", "text.", "fusion.")) for name in left)
    assert sum(".cross_attention." in name for name in left) == 2 * 8
    told = [line for line in lines if line.startswith("not used")]
    assert "bert.encoder.layer.2." in told[1] and "bert.encoder.layer.1." not in told[1]
    assert "bert.encoder.layer.1." in told[2] and "bert.encoder.layer.2." not in told[2]


@torch.no_grad()
def test_another_grid_is_interpolated_as_in_vit(tmp_path):
    model, lines, vit, _ = albef(tmp_path, 5)
    pixels, image, layout = pictures(5)
    assert "of tables of other rows: image.embedder.places.table interpolated from 3 x 3 to 5 x 5 places" in lines
    with InDouble():
        states = vit.double()(pixels, interpolate_pos_encoding=True).last_hidden_state
        found = model.image(image, layout, None).hidden
    torch.testing.assert_close(found, states.flatten(0, 1), rtol=1e-5, atol=1e-5)  # interpolated in float32 here
    assert torch.equal(model.image.embedder.places.table[:1].float(), vit.embeddings.position_embeddings[0, :1].float())


@pytest.mark.parametrize(("side", "told"), [(3, "taken as they are to 3 x 3"), (4, "interpolated from 3 x 3 to 4 x 4")])
@torch.no_grad()
def test_pictures_that_take_up_a_part_of_a_grid_have_all_of_the_folders_places(side, told, tmp_path):
    vit = saved(tmp_path, "ViTModel", image_size=3 * PATCH, patch_size=PATCH, layer_norm_eps=1e-6)
    size = f"--data.image_size={side * PATCH}", "--model.image.max_grid=[5,5]", f"--model.image.patch_size={PATCH}"
    model, lines = begun("albef_base", {"image": tmp_path}, *size)
    assert f"of tables of other rows: image.embedder.places.table {told} of 5 x 5 places" in lines
    pixels, image, layout = pictures(side)
    with InDouble():
        states = vit.double()(pixels, interpolate_pos_encoding=True).last_hidden_state
        found = model.image(image, layout, None).hidden
    torch.testing.assert_close(found, states.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_the_copy_that_follows_begins_with_the_same(tmp_path):
    model, *_ = albef(tmp_path, 3)
    model.teacher.begin()
    assert torch.equal(model.teacher.module.image.embedder.class_token, model.image.embedder.class_token)


@pytest.mark.parametrize(
    ("role", "folder", "more", "told"),
    [
        ("text", "vit", [], "is a vit, with weights for image, joint; it has none for text"),
        ("decoder", "bert", [], "the part must be one of model, image, text, fusion, got decoder"),
        ("fusion", "bert", ["--model.text.layers=3"], "does not fit: model.fusion.layers must be 1, got 2"),
        ("text", "bert", ["--model.text.layers=5"], "does not fit: model.text.layers must be 4, got 5"),
        ("image", "deit", [], "does not fit: model.image.distillation_token must be True, got False"),
        (
            "image",
            "vit",
            ["--model.image.embedding_norm=true", "--model.image.layers=3"],
            "does not fit: model.image.layers must be 2, got 3; model.image.embedding_norm must be False, got True",
        ),
    ],
)
def test_what_does_not_fit_a_role(tmp_path, role, folder, more, told):
    for kind in ("ViT", "DeiT"):
        folder_of_kind = tmp_path / kind.lower()
        saved(folder_of_kind, f"{kind}Model", image_size=3 * PATCH, patch_size=PATCH, layer_norm_eps=1e-6)
    saved(tmp_path / "bert", "BertForMaskedLM", num_hidden_layers=4, vocab_size=VOCAB)
    size = [f"--data.image_size={3 * PATCH}", "--model.image.max_grid=[3,3]", f"--model.image.patch_size={PATCH}"]
    with pytest.raises(ValueError) as caught:
        begun("albef_base", {role: tmp_path / folder}, *size, *more)
    assert str(caught.value).endswith(told)


def test_a_distillation_token_stands_behind_a_class_token(capsys):
    with pytest.raises(SystemExit):
        table.recipe("siglip_b16", "--model.image.distillation_token=true")
    assert "model.image.class_token must be true, got false" in capsys.readouterr().err


BLIP2 = [
    *(f"--model.joint.{name}={value}" for name, value in {"max_positions": 16, "queries": 4}.items()),
    f"--data.image_size={3 * PATCH}",
    "--model.image.max_grid=[3,3]",
    f"--model.image.patch_size={PATCH}",
    "--data.max_caption_tokens=16",
]
CLIP_TOWER = ["embedding_norm=true", "patch_bias=false", "activation=quick_gelu", "eps=1e-5"]


@torch.no_grad()
def test_blip2s_first_stage_begins_as_bert_and_most_of_clip(tmp_path):
    """Networks of queries begin as those of words; the last norm of the picture is not CLIP's, whose last block is left out."""
    clip = saved(tmp_path / "clip", "CLIPVisionModel", num_hidden_layers=3, image_size=3 * PATCH, patch_size=PATCH)
    bert = saved(tmp_path / "bert", "BertModel", vocab_size=VOCAB, max_position_embeddings=16)
    folders = {"image": tmp_path / "clip", "joint": tmp_path / "bert"}
    tower = [f"--model.image.{option}" for option in CLIP_TOWER]
    model, lines = begun("blip2_stage1", folders, *BLIP2, *tower, roles=("image", "joint"))
    pixels, image, layout = pictures(3)
    with InDouble():
        before_last = clip.double()(pixels, output_hidden_states=True).hidden_states[2]
        model.image.transformer.final_norm = None
        torch.testing.assert_close(model.image(image, layout, None).hidden, before_last.flatten(0, 1), **CLOSE)
    layer = bert.encoder.layer[1]
    for network in model.joint.transformer.blocks[1].feed_forwards:
        assert torch.equal(network.inner.weight.float(), layer.intermediate.dense.weight)
        assert torch.equal(network.norm.bias.float(), layer.output.LayerNorm.bias)
    left = lines[-1].partition(": ")[2].split(", ")
    assert "image.transformer.final_norm.weight" in left and "joint.queries" in left
    assert not any("self_attention" in name or "feed_forward" in name for name in left)


@torch.no_grad()
def test_the_second_stage_goes_on_from_a_run_of_the_first_and_an_opt(tmp_path):
    shape = ["--model.image.layers=2", *BLIP2]
    sized = {"layers": 2, "width": 24, "heads": 3, "mlp_width": 40}
    sizes = [f"--model.{role}.{name}={value}" for role in ("image", "joint") for name, value in sized.items()]
    config = table.recipe("blip2_stage1", *sizes, *shape)
    first = redraw(build_model(config, TOKENIZER.vocab_size)).float()
    export(tmp_path / "run", first, config, TOKENIZER)
    opt_sizes = {"ffn_dim": 40, "vocab_size": VOCAB, "max_position_embeddings": 20, "word_embed_proj_dim": 24}
    opt = saved(tmp_path / "opt", "OPTForCausalLM", **opt_sizes)
    folders = {"image": tmp_path / "run", "joint": tmp_path / "run", "decoder": tmp_path / "opt"}
    more = [*(option for option in BLIP2 if "joint.max_positions" not in option), "--model.decoder.max_positions=20"]
    second, lines = begun("blip2_stage2", folders, *more, roles=("image", "joint", "decoder"))
    own, taken = second.float().joint, first.joint
    assert torch.equal(own.queries.learned, taken.queries.learned)
    assert torch.equal(own.queries_norm.weight, taken.text.norm.weight)
    for block, source in zip(own.transformer.blocks, taken.transformer.blocks, strict=True):
        assert torch.equal(block.feed_forward.output.weight, source.feed_forwards[0].output.weight)
        assert torch.equal(block.self_attention.query_key_value.bias, source.self_attention.query_key_value.bias)
    reading, read = (role.transformer.blocks[0].cross_attention.key_value for role in (own, taken))
    assert torch.equal(reading.weight, read.weight)
    assert torch.equal(second.image.transformer.final_norm.weight, first.image.transformer.final_norm.weight)
    assert lines[-1] == "left at their initialisation: decoder.prefix"
    ids = torch.randint(3, VOCAB, (len(LENGTHS), max(LENGTHS)))
    tokens = second.double().decoder.embed(Text(ids[visible()], layout_of()), layout_of(), None)
    found = second.decoder.transformer(tokens, mask=mask_table("causal", ["text"]))
    with InDouble():
        expected = opt.double().model(ids, visible().long()).last_hidden_state[visible()]
    torch.testing.assert_close(found.hidden, expected, **CLOSE)


def test_a_run_fills_a_role_that_computes_the_same(tmp_path):
    config = table.recipe("bert_base", "--tiny=true")
    model = redraw(build_model(config, TOKENIZER.vocab_size)).float()
    export(tmp_path, model, config, TOKENIZER)
    other = table.recipe("bert_base", "--tiny=true", f"--init_from.model={tmp_path}")
    again = build_model(other, TOKENIZER.vocab_size)
    assert load_initial_weights(other, again) == [f"loaded {len(model.state_dict())} tensors of {tmp_path} into the model"]
    assert all(torch.equal(own, taken) for own, taken in zip(again.parameters(), model.parameters(), strict=True))
    another = table.recipe("bert_base", "--tiny=true", f"--init_from.text={tmp_path}", "--model.text.activation=relu")
    with pytest.raises(ValueError, match="does not fit: model.text.activation must be gelu, got relu"):
        load_initial_weights(another, build_model(another, TOKENIZER.vocab_size))


@torch.no_grad()
def test_another_eps_is_told_and_kept(tmp_path):
    """DeiT's 1e-12 in a tower of 1e-6: of a published folder, and of a run."""
    vit = saved(tmp_path / "vit", "ViTModel", image_size=3 * PATCH, patch_size=PATCH, layer_norm_eps=1e-12)
    size = f"--data.image_size={3 * PATCH}", "--model.image.max_grid=[3,3]", f"--model.image.patch_size={PATCH}"
    model, lines = begun("albef_base", {"image": tmp_path / "vit"}, *size)
    assert "the run keeps its own: model.image.eps is 1e-06 (the folder: 1e-12)" in lines
    assert model.image.transformer.blocks[0].self_attention.norm.eps == 1e-6
    assert torch.equal(model.image.transformer.final_norm.weight.float(), vit.layernorm.weight)
    sizes = [f"--model.image.{key}={value}" for key, value in SIZES.items()]
    config = table.recipe("albef_base", *sizes, *size)
    export(tmp_path / "run", model, config, TOKENIZER)
    _, lines = begun("albef_base", {"image": tmp_path / "run"}, *size, "--model.image.eps=1e-5")
    assert "the run keeps its own: model.image.eps is 1e-05 (the folder: 1e-06)" in lines


def test_pictures_of_another_normalisation_are_told(tmp_path):
    """By a folder that says how its pictures are prepared, and by a run."""
    saved(tmp_path / "vit", "ViTModel", image_size=3 * PATCH, patch_size=PATCH, layer_norm_eps=1e-6)
    size = f"--data.image_size={3 * PATCH}", "--model.image.max_grid=[3,3]", f"--model.image.patch_size={PATCH}"
    _, lines = begun("albef_base", {"image": tmp_path / "vit"}, *size)
    assert not any("keeps its own" in line for line in lines)
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    own = "--data.image_mean=[0.4,0.5,0.5]", "--data.image_std=[0.5,0.5,0.5]"
    model, lines = begun("albef_base", {"image": tmp_path / "vit"}, *size, *own)
    told = "the run keeps its own: data.image_mean is [0.4, 0.5, 0.5] (the folder: [0.5, 0.5, 0.5])"
    assert told in lines
    sizes = [f"--model.image.{key}={value}" for key, value in SIZES.items()]
    export(tmp_path / "run", model, table.recipe("albef_base", *sizes, *size, "--data.image_std=[0.5,0.5,0.5]",
                                                 "--data.image_mean=[0.5,0.5,0.5]"), TOKENIZER)  # fmt: skip
    assert told in begun("albef_base", {"image": tmp_path / "run"}, *size, *own)[1]


def test_a_decoder_begins_as_the_text_of_a_run(tmp_path):
    config = table.recipe("gpt2", "--tiny=true")
    model = redraw(build_model(config, TOKENIZER.vocab_size)).float()
    export(tmp_path, model, config, TOKENIZER)
    more = ["--model.decoder.position_offset=0", "--model.decoder.activation=gelu_tanh"]
    other = table.recipe("blip2_stage2", "--tiny=true", *more, f"--init_from.decoder={tmp_path}")
    writer = build_model(other, TOKENIZER.vocab_size)
    assert "decoder.prefix" in load_initial_weights(other, writer)[-1]
    assert torch.equal(writer.decoder.embedder.words, model.text.embedder.words)
    inner, source = (role.transformer.blocks[1].feed_forward.inner for role in (writer.decoder, model.text))
    assert torch.equal(inner.weight, source.weight)


@torch.no_grad()
def test_vilt_begins_as_a_vit(tmp_path):
    vit = saved(tmp_path, "ViTModel", image_size=3 * PATCH, patch_size=PATCH, layer_norm_eps=1e-6)
    places = ["--model.joint.image.max_grid=[5,5]", f"--model.joint.image.patch_size={PATCH}", f"--data.image_size={3 * PATCH}"]
    model, lines = begun("vilt_b32", {"joint": tmp_path}, *places, "--model.joint.max_positions=40", roles=("joint",))
    assert "joint.image.places.table interpolated from 3 x 3 to 5 x 5 places" in lines[1]
    assert torch.equal(model.joint.image.class_token.float(), vit.embeddings.cls_token[0])
    assert torch.equal(model.joint.transformer.final_norm.weight.float(), vit.layernorm.weight)
    assert {"joint.text", "joint.kinds", "joint.pooling"} <= set(lines[-1].partition(": ")[2].split(", "))


def small_bert(folder) -> Config:
    sizes = [f"--model.text.{key}={value}" for key, value in SIZES.items()]
    return table.recipe("bert_base", *sizes, f"--init_from.text={folder}")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.txt"])
def test_rows_of_words_are_taken_by_word(tmp_path, kind):
    """The folder has other numbers for the words of the run, and another name for one of its special tokens."""
    theirs = saved(tmp_path, "BertForMaskedLM", vocab_size=VOCAB, max_position_embeddings=64)
    ours = {"[PAD]": 0, "[CLS]": 1, "glyph": 2, "word": 3, "unknown": 4}
    named = ["word", "other", "glyph", "<s>" if kind == "tokenizer.json" else "[CLS]", "[PAD]"]
    if kind == "tokenizer.json":
        pieces = {word: number for number, word in enumerate(named[:3])}
        added = [{"id": 3, "content": "<s>"}, {"id": 4, "content": "[PAD]"}]
        (tmp_path / kind).write_text(json.dumps({"model": {"vocab": pieces}, "added_tokens": added}))
    else:
        (tmp_path / kind).write_text("\n".join(named) + "\n")
    config = small_bert(tmp_path)
    model = build_model(config, len(ours))
    fresh = model.words.clone()
    lines = load_initial_weights(config, model, ours)
    table_of_theirs, bias = theirs.bert.embeddings.word_embeddings.weight, theirs.cls.predictions.bias
    assert torch.equal(model.words[:4], table_of_theirs[[4, 3, 2, 0]])
    assert torch.equal(model.heads["masked_language"].bias[:4], bias[[4, 3, 2, 0]])
    assert torch.equal(model.words[4], fresh[4])
    assert "text.embedder.words 4 of its 5 rows by their words" in lines[1]


def test_words_without_a_tokenizer_are_told(tmp_path):
    saved(tmp_path, "BertModel", vocab_size=VOCAB, max_position_embeddings=64)
    config = small_bert(tmp_path)
    lines = load_initial_weights(config, build_model(config, VOCAB), {"word": 0})
    assert f"rows of words were taken by their numbers: {tmp_path} has no tokenizer.json" in lines
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="init_from.text: the tokenizer of .* cannot be read"):
        load_initial_weights(config, build_model(config, VOCAB))


def test_t5_1_1_is_another_model_than_t5(tmp_path):
    """Whichever name the file has for it."""
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3, "vocab_size": VOCAB}
    saved(tmp_path, "T5ForConditionalGeneration", **sizes)
    known = json.loads((tmp_path / "config.json").read_text())
    del known["scale_decoder_outputs"], known["tie_word_embeddings"]
    for more, fits in (({}, True), ({"tie_word_embeddings": False}, False), ({"scale_decoder_outputs": False}, False)):
        (tmp_path / "config.json").write_text(json.dumps(known | more))
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="scale_decoder_outputs must be False, got True"):
            begun("t5_base", {"model": tmp_path}, roles=("text", "decoder"))


# ---- backbones


def resnet(folder, depths: list[int]):
    """Norms keep what they have seen in buffers."""
    sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic", "depths": depths}
    theirs = transformers.ResNetModel(transformers.ResNetConfig(**sizes)).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(0.5 + drawn.abs() if name.endswith("var") else drawn * (0.1 if tensor.dim() > 1 else 0.5))
    theirs.save_pretrained(folder)
    return theirs.double()


@pytest.mark.parametrize("norm", ["frozen", "batch"])
@torch.no_grad()
def test_a_backbone_begins_as_a_resnet(tmp_path, norm):
    theirs = resnet(tmp_path, [2, 2, 2, 2])
    options = "--model.image.backbone=resnet18", f"--model.image.backbone_norm={norm}"
    model, lines = begun("vsepp", {"image": tmp_path}, *options, roles=())
    pixels = torch.randn(2, 3, 48, 40, dtype=torch.float64)
    torch.testing.assert_close(model.image.embedder.backbone(pixels), theirs(pixels).last_hidden_state, **CLOSE)
    assert lines[0].startswith("loaded 100 tensors") and not [line for line in lines if line.startswith("not used")]


def test_another_resnet_is_refused(tmp_path):
    resnet(tmp_path, [2, 1, 1, 1])
    with pytest.raises(ValueError, match=r"model.image.depths must be \[2, 1, 1, 1\], got \[2, 2, 2, 2\]"):
        begun("vsepp", {"image": tmp_path}, "--model.image.backbone=resnet18", roles=())
