"""Published models become runs and runs become folders of `transformers`: every family, every parameter redrawn, the same
states and the same weights on the other side."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import vlkernels as vk
from stack_parity import LENGTHS, InDouble, layout_of, redraw, visible
from torch import Tensor, nn

from engine.batch import Patches, Text
from engine.build import build_model
from engine.data.tokenization.training import train_tokenizer
from engine.initial_weights import load_initial_weights
from engine.models import VisionLanguageModel
from engine.models.embedding.places import even_grid
from engine.models.embedding.sinusoids import grid_sinusoids
from engine.published import Loaded, write
from engine.recipes import table

transformers = pytest.importorskip("transformers")

TOKENIZER = train_tokenizer([f"word{number} glyph{number}" for number in range(99)], "wordpiece", 120, False)
VOCAB, LAYERS, PATCH, SIDE, POSITIONS = TOKENIZER.vocab_size, 2, 4, 3, 16
OURS = {"width": 24, "layers": LAYERS, "heads": 3, "mlp_width": 40}
STACK = {"hidden_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 3, "intermediate_size": 40}
WORDS = STACK | {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "pad_token_id": 0}
PICTURE = STACK | {"image_size": SIDE * PATCH, "patch_size": PATCH}
GPT = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": LAYERS, "n_head": 3, "n_positions": POSITIONS}
T5 = {"vocab_size": VOCAB, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": LAYERS, "num_heads": 3}
BART = {"vocab_size": VOCAB, "d_model": 24, "max_position_embeddings": POSITIONS}
BART |= {f"{part}_{name}": value for part in ("encoder", "decoder")
         for name, value in (("layers", LAYERS), ("attention_heads", 3), ("ffn_dim", 40))}  # fmt: skip
TEXT_EPS, IMAGE_EPS = {"layer_norm_eps": 1e-12}, {"layer_norm_eps": 1e-6}
NARROW = WORDS | TEXT_EPS | {"embedding_size": 20}
DISTILBERT = {"vocab_size": VOCAB, "dim": 24, "n_layers": LAYERS, "n_heads": 3, "hidden_dim": 40}
SMALL_DECODER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
QUERIES = 4
BLIP = {"text_config": WORDS | {"encoder_hidden_size": 24} | TEXT_EPS, "vision_config": PICTURE | IMAGE_EPS}
Q_FORMER = {"encoder_hidden_size": 24, "cross_attention_frequency": 2} | TEXT_EPS
OPT = WORDS | {"model_type": "opt", "ffn_dim": 40, "word_embed_proj_dim": 24, "bos_token_id": 1, "eos_token_id": 2}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def ids_of() -> Tensor:
    """Texts that begin with [CLS] and end with [SEP]."""
    ids = torch.randint(5, VOCAB - 1, (len(LENGTHS), max(LENGTHS)))  # BERT gives id 0 no gradient
    ids[:, 0] = TOKENIZER.cls_id
    ids[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] = TOKENIZER.sep_id
    return ids * visible()


def pixels_of(count: int) -> tuple[Tensor, Patches, vk.SegmentLayout]:
    pixels = torch.randn(count, 3, SIDE * PATCH, SIDE * PATCH, dtype=torch.float64)
    layout = vk.SegmentLayout([[SIDE * SIDE]] * count)
    return pixels, Patches(vk.patchify(pixels, layout, PATCH), even_grid(count, (SIDE, SIDE), pixels.device)), layout


def text_states(ours: VisionLanguageModel, theirs: nn.Module, their_ids: Callable) -> tuple[Tensor, Tensor]:
    ids = ids_of()
    found = ours.text(Text(ids[visible()], layout_of()), layout_of(), None).hidden
    read = theirs.base_model(input_ids=their_ids(ids), attention_mask=visible().long())
    return found, read.last_hidden_state[visible()]


def generated_states(ours: VisionLanguageModel, theirs: nn.Module, their_ids: Callable) -> tuple[Tensor, Tensor]:
    ids = ids_of()
    found = ours.generator(Text(ids[visible()], layout_of()), layout_of(), None).hidden
    return found, theirs.base_model(input_ids=ids, attention_mask=visible().long()).last_hidden_state[visible()]


def paged_states(ours: VisionLanguageModel, theirs: nn.Module, their_ids: Callable) -> tuple[Tensor, Tensor]:
    ids, boxes = ids_of(), torch.randint(500, (len(LENGTHS), max(LENGTHS), 4)) + torch.tensor([0, 0, 500, 500])
    layout = ours.joint.layout_of(layout_of(), layout_of(), None)
    found = ours.joint(Text(ids[visible()], layout_of(), None, boxes[visible()].int()), None, layout, None).hidden
    return found, theirs.base_model(ids, bbox=boxes, attention_mask=visible().long()).last_hidden_state[visible()]


def written_states(ours: VisionLanguageModel, theirs: nn.Module, their_ids: Callable) -> tuple[Tensor, Tensor]:
    ids = ids_of()
    text, layout = Text(ids[visible()], layout_of()), layout_of()
    found = ours.decoder(text, layout, None, ours.text(text, layout, None)).hidden
    read = theirs(ids, visible().long(), ids, use_cache=False, output_hidden_states=True)
    head = ours.heads["denoising"]
    if hasattr(theirs, "final_logits_bias"):  # BART's, which is zero and no parameter
        assert not theirs.final_logits_bias.any()
    expected = torch.cat((read.decoder_hidden_states[-1], read.logits), dim=2)[visible()]
    return torch.cat((found, head.logits(found, ours.words_of("decoder"))), dim=1), expected


def image_states(ours: VisionLanguageModel, theirs: nn.Module, their_ids: Callable) -> tuple[Tensor, Tensor]:
    pixels, patches, layout = pixels_of(2)
    return ours.image(patches, layout, None).hidden, theirs.base_model(pixels).last_hidden_state.flatten(0, 1)


def pooled_images(ours: VisionLanguageModel, theirs: nn.Module, their_ids: Callable) -> tuple[Tensor, Tensor]:
    pixels, patches, layout = pixels_of(2)
    return ours.image.pooled(ours.image(patches, layout, None)), theirs(pixels).pooler_output


def all_patches(ours: VisionLanguageModel, theirs: nn.Module, their_ids: Callable) -> tuple[Tensor, Tensor]:
    """MAE shuffles patches; nothing is hidden here and the class token stays where it is."""
    pixels, patches, layout = pixels_of(2)
    theirs.config.mask_ratio = 0.0
    tokens = ours.image(patches, layout, None)
    return tokens.hidden[tokens.layout.starts[:, 0].long()], theirs.vit(pixels).last_hidden_state[:, 0]


def similarities(ours: VisionLanguageModel, theirs: nn.Module, their_ids: Callable) -> tuple[Tensor, Tensor]:
    ids = ids_of()
    pixels, patches, layout = pixels_of(len(LENGTHS))
    image = ours.features_of_image(ours.image(patches, layout, None))
    if ours.options.text.mask == "full":  # padding is read
        whole = vk.SegmentLayout([[max(LENGTHS)]] * len(LENGTHS))
        text = ours.features_of_text(ours.text(Text(ids.flatten(), whole), whole, None))
        return ours.scale() * text @ image.T + ours.heads["sigmoid_contrastive"](), theirs(ids, pixels).logits_per_text
    text = ours.features_of_text(ours.text(Text(ids[visible()], layout_of()), layout_of(), None))
    return ours.scale() * text @ image.T, theirs(their_ids(ids), pixels).logits_per_text


def joint_states(ours: VisionLanguageModel, theirs: nn.Module, their_ids: Callable) -> tuple[Tensor, Tensor]:
    """ViLT shuffles patches too: of what stands for the pairs."""
    ids = ids_of()
    pixels, patches, images = pixels_of(len(LENGTHS))
    layout = ours.joint.layout_of(layout_of(), layout_of(), images)
    tokens = ours.joint(Text(ids[visible()], layout_of()), patches, layout, None, image_layout=images)
    return ours.pooled(tokens), theirs.base_model(ids, visible().long(), None, pixels).pooler_output


def ranked(ours: VisionLanguageModel, theirs: nn.Module, their_ids: Callable) -> tuple[Tensor, Tensor]:
    """What ViLT's logit of a pair is, of the two that tell its own picture from another's."""
    ids = ids_of()
    pixels, patches, images = pixels_of(len(LENGTHS))
    layout = ours.joint.layout_of(layout_of(), layout_of(), images)
    tokens = ours.joint(Text(ids[visible()], layout_of()), patches, layout, None, image_layout=images)
    logits = ours.heads["random_matching"](ours.pooled(tokens))
    return logits[:, 1:] - logits[:, :1], theirs(ids, visible().long(), None, pixels).logits


def matched(ours: VisionLanguageModel, theirs: nn.Module, their_ids: Callable) -> tuple[Tensor, Tensor]:
    """Logits of BLIP's pairs."""
    ids = ids_of()
    pixels, patches, layout = pixels_of(len(LENGTHS))
    tokens = ours.text.embed(Text(ids[visible()], layout_of()), layout_of(), None)
    fused = ours.fuse(tokens, ours.source_of(ours.image(patches, layout, None)))
    return ours.heads["matching"](fused.hidden, fused.layout), theirs(ids, pixels, attention_mask=visible().long()).itm_score


def captioned(ours: VisionLanguageModel, theirs: nn.Module, their_ids: Callable) -> tuple[Tensor, Tensor]:
    ids = ids_of()
    pixels, patches, layout = pixels_of(len(LENGTHS))
    hidden = ours.decoder(Text(ids[visible()], layout_of()), layout_of(), None, ours.image(patches, layout, None)).hidden
    logits = ours.heads["causal_language"].logits(hidden, ours.words_of("decoder"))
    return logits, theirs(pixels, ids, attention_mask=visible().long()).logits[visible()]


def matched_by_queries(ours: VisionLanguageModel, theirs: nn.Module, their_ids: Callable) -> tuple[Tensor, Tensor]:
    ids = ids_of()
    pixels, patches, images = pixels_of(len(LENGTHS))
    layout = ours.joint.layout_of(layout_of(), layout_of(), None)
    source = ours.joint.source_of(ours.image(patches, images, None))
    read = ours.joint(Text(ids[visible()], layout_of()), None, layout, None, source=source, mask="full")
    found = ours.heads["query_matching"](vk.segment_mean(read.hidden, read.layout, 0))
    return found, theirs(pixels, ids, visible().long(), use_image_text_matching_head=True).logits_per_image


def written_behind_queries(ours: VisionLanguageModel, theirs: nn.Module, their_ids: Callable) -> tuple[Tensor, Tensor]:
    ids = ids_of()
    pixels, patches, images = pixels_of(len(LENGTHS))
    source = ours.joint.source_of(ours.image(patches, images, None))
    queries = ours.joint(None, None, ours.joint.layout_of(layout_of(), None, None), None, source=source)
    read = ours.decoder(Text(ids[visible()], layout_of()), layout_of(), None, queries)
    found = vk.take_segments(read.hidden, read.layout, (1,))
    seen = theirs.vision_model(pixels).last_hidden_state
    queries = theirs.qformer(query_embeds=theirs.query_tokens.expand(len(ids), -1, -1), encoder_hidden_states=seen)
    rows = torch.cat((theirs.language_projection(queries.last_hidden_state), theirs.get_input_embeddings()(ids)), dim=1)
    shown = torch.cat((torch.ones(len(ids), QUERIES, dtype=torch.bool), visible()), dim=1)
    states = theirs.language_model.model(inputs_embeds=rows, attention_mask=shown.long()).last_hidden_state
    return found, states[:, QUERIES:][visible()]


class Case(NamedTuple):
    """A recipe, the class that it is, and what states of both are compared."""

    recipe: str
    public: str
    theirs: dict
    states: Callable
    ours: dict = {}
    """By path within `model`, or within the objectives."""
    role: str | None = None
    """That is read and written alone; null: the whole."""
    family: str | None = None
    """That is asked for; null: the first that the model is."""


def sizes(*roles: str, **more) -> dict:
    return {f"{role}.{name}": value for role in roles for name, value in {**OURS, **more}.items()}


def words(*roles: str, **more) -> dict:
    return sizes(*roles, max_positions=POSITIONS, **more)


def picture(role: str = "image") -> dict:
    shape = {} if "." in role else sizes(role)
    return shape | {f"{role}.patch_size": PATCH, f"{role}.max_grid": [SIDE, SIDE]}


BLIP_SIZES = picture() | words("text", "decoder") | sizes("fusion") | {"projection_dim": 12}
CASES = {
    "bert": Case("bert_base", "BertForPreTraining", WORDS | TEXT_EPS, text_states, words("text")),
    "roberta": Case(
        "roberta_base",
        "RobertaForMaskedLM",
        WORDS | {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5},
        text_states,
        words("text"),
    ),
    "albert": Case("albert_base", "AlbertForPreTraining", NARROW, text_states, words("text", embedding_width=20)),
    "distilbert": Case(
        "distilbert",
        "DistilBertForMaskedLM",
        DISTILBERT | {"max_position_embeddings": POSITIONS},
        text_states,
        words("text"),
    ),
    "gpt2": Case("gpt2", "GPT2LMHeadModel", GPT | {"n_inner": 40}, text_states, words("text")),
    "gpt": Case("gpt", "OpenAIGPTLMHeadModel", GPT, text_states, words("text", mlp_width=96)),
    "t5": Case("t5_base", "T5ForConditionalGeneration", T5, written_states, sizes("text", "decoder")),
    "t5_1_1": Case(
        "t5_base",
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        written_states,
        sizes("text", "decoder", gated=True, activation="gelu_tanh") | {"objectives.denoising.output": "own"},
    ),
    "bart": Case("bart_base", "BartForConditionalGeneration", BART, written_states, words("text", "decoder")),
    "vit": Case(
        "vit_b16",
        "ViTForImageClassification",
        PICTURE | {"num_labels": 7},
        image_states,
        picture() | {"objectives.classification.classes": 7},
    ),
    "deit": Case(
        "vit_b16",
        "DeiTForImageClassification",
        PICTURE | {"num_labels": 7} | TEXT_EPS,
        image_states,
        picture() | {"objectives.classification.classes": 7, "image.distillation_token": True, "image.eps": 1e-12},
    ),
    "clip": Case(
        "clip_vit_b32",
        "CLIPModel",
        {"text_config": WORDS | {"eos_token_id": VOCAB - 1}, "vision_config": PICTURE, "projection_dim": 12},
        similarities,
        picture() | words("text") | {"projection_dim": 12},
    ),
    "electra": Case(
        "electra_small",
        "ElectraForPreTraining",
        NARROW,
        text_states,
        words("text", embedding_width=20) | words("generator", embedding_width=20),
        "text",
    ),
    "electra_generator": Case(
        "electra_small",
        "ElectraForMaskedLM",
        NARROW,
        generated_states,
        words("text", embedding_width=20) | words("generator", embedding_width=20),
        "generator",
    ),
    "mae": Case(
        "mae_b16",
        "ViTMAEForPreTraining",
        PICTURE | {f"decoder_{name}": value for name, value in SMALL_DECODER.items()},
        all_patches,
        picture() | {"objectives.masked_patches": {"width": 24, "layers": 2, "heads": 4}},
    ),
    "clip_vision": Case("clip_vit_b32", "CLIPVisionModel", PICTURE, pooled_images, picture() | words("text"), "image"),
    "siglip": Case(
        "siglip_b16",
        "SiglipModel",
        {"text_config": WORDS | {"projection_size": 24}, "vision_config": PICTURE},
        similarities,
        picture() | words("text") | {"projection_dim": 24},
    ),
    "siglip_vision": Case(
        "siglip_b16",
        "SiglipVisionModel",
        PICTURE,
        pooled_images,
        picture() | words("text") | {"projection_dim": 24},
        "image",
    ),
    "vilt": Case(
        "vilt_b32", "ViltForMaskedLM", WORDS | PICTURE | IMAGE_EPS, joint_states, words("joint") | picture("joint.image")
    ),
    "vilt_ranks": Case(
        "vilt_b32",
        "ViltForImageAndTextRetrieval",
        WORDS | PICTURE | IMAGE_EPS,
        ranked,
        words("joint") | picture("joint.image"),
        None,
        "vilt_ranks",
    ),
    "blip": Case(
        "blip_base", "BlipForImageTextRetrieval", BLIP | {"image_text_hidden_size": 12}, matched, BLIP_SIZES, None, "blip"
    ),
    "blip_captions": Case("blip_base", "BlipForConditionalGeneration", BLIP, captioned, BLIP_SIZES, None, "blip_captions"),
    "blip2_stage1": Case(
        "blip2_stage1",
        "Blip2ForImageTextRetrieval",
        {
            "vision_config": PICTURE | IMAGE_EPS,
            "qformer_config": WORDS | Q_FORMER | {"use_qformer_text_input": True},
            "num_query_tokens": QUERIES,
            "image_text_hidden_size": 12,
        },
        matched_by_queries,
        picture() | words("joint") | {"joint.queries": QUERIES, "projection_dim": 12},
    ),
    "blip2_stage2": Case(
        "blip2_stage2",
        "Blip2ForConditionalGeneration",
        {
            "vision_config": PICTURE | IMAGE_EPS,
            "qformer_config": WORDS | Q_FORMER,
            "num_query_tokens": QUERIES,
            "text_config": OPT | {"max_position_embeddings": POSITIONS + QUERIES},
        },
        written_behind_queries,
        picture() | sizes("joint") | sizes("decoder", max_positions=POSITIONS + QUERIES) | {"joint.queries": QUERIES},
    ),
    "layoutlm": Case("layoutlm_base", "LayoutLMForMaskedLM", WORDS | TEXT_EPS, paged_states, words("joint", pooling="pooler")),
}


def model_of(case: Case, folder) -> tuple[VisionLanguageModel, list[str]]:
    paths = {path if path.startswith("objectives") else f"model.{path}": value for path, value in case.ours.items()}
    paths |= {"data.image_size": SIDE * PATCH, "data.max_caption_tokens": POSITIONS}
    config = table.recipe(case.recipe, *(f"--{path}={value}" for path, value in paths.items()))
    config.init_from = {case.role or "model": str(folder)}
    model = build_model(config, VOCAB)
    return model, load_initial_weights(config, model)


def exchanged(case: Case) -> Callable[[Tensor], Tensor]:
    """Ids as an exported tokenizer has them."""
    first, second = {"CLIPModel": (TOKENIZER.sep_id, VOCAB - 1), "RobertaForMaskedLM": (0, 1)}.get(case.public, (0, 0))
    other = torch.arange(VOCAB)
    other[first], other[second] = second, first
    return lambda ids: other[ids]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_there_and_back(name, tmp_path):
    case = CASES[name]
    public = getattr(transformers, case.public)
    theirs = public(public.config_class(**case.theirs))
    if case.theirs.get("tie_word_embeddings") is False:  # T5 1.1: they tie it, and let a folder undo that
        theirs.lm_head.weight = nn.Parameter(torch.empty_like(theirs.shared.weight))
    redraw(theirs).float()
    waves = {key: tensor for key, tensor in theirs.named_parameters() if not tensor.requires_grad}
    for tensor in waves.values():  # of MAE, which leaves them zero where no folder is read
        tensor[0] = torch.cat((torch.zeros(1, tensor.shape[2]), grid_sinusoids(SIDE, SIDE, tensor.shape[2])))
    theirs.save_pretrained(tmp_path / "theirs")
    model, lines = model_of(case, tmp_path / "theirs")
    assert not any(line.startswith("of tables") for line in lines), lines
    idle = [line.partition(": ")[2] for line in lines if line.startswith("not used")]
    assert set(", ".join(idle).split(", ")) <= {"", "final_logits_bias", *waves}
    ids = exchanged(case)
    first, *left = write(tmp_path / "ours", Loaded(model, TOKENIZER, None), case.family, case.role)
    assert first.endswith(f", a {case.public}")
    again, told = public.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    with InDouble():
        found, expected = case.states(model.double().eval(), again.double().eval(), ids)
        torch.testing.assert_close(found, expected, **CLOSE)
    by_name = dict(again.float().named_parameters())
    for key, tensor in theirs.named_parameters():
        found = by_name[key][ids(torch.arange(VOCAB))] if tensor.shape[:1] == (VOCAB,) else by_name[key]
        assert torch.equal(found, tensor), key
    written = again.config.to_dict()
    for key, value in theirs.config.to_dict().items():
        if key.endswith(("_size", "_layers", "_heads", "_eps", "_epsilon", "_buckets", "_distance")):
            assert written[key] == value, key
