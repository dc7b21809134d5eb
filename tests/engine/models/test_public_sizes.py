"""At paper size the roles have exactly the parameters of the public models; nothing is allocated."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from engine.models.model import VisionLanguageModel
from engine.sections import (
    DecoderStack,
    Distances,
    FusionStack,
    GeneratorStack,
    ImageInput,
    ImageStack,
    JointStack,
    Model,
    TextStack,
)

transformers = pytest.importorskip("transformers")

BASE = {"width": 768, "layers": 12, "heads": 12, "mlp_width": 3072}
BERT = BASE | {"norm": "post", "eps": 1e-12, "activation": "gelu", "max_positions": 512, "types": 2}
CROSS = {name: value for name, value in BERT.items() if name not in ("max_positions", "types")}
GPT = BASE | {"embedding_norm": False, "mask": "causal", "pooling": "last"}
DECODER_GPT = {name: value for name, value in GPT.items() if name not in ("mask", "pooling")}
VIT = BASE | {"patch_size": 16, "max_grid": (14, 14), "positions": "learned", "embedding_norm": False}
SMALL = BASE | {"width": 512, "heads": 8, "mlp_width": 2048}
T5 = BASE | {
    "norm_kind": "rms",
    "biases": "none",
    "activation": "relu",
    "softmax_scale": 1.0,
    "positions": "none",
    "embedding_norm": False,
    "relative_position": Distances(),
}
BART = BASE | {"layers": 6, "norm": "post", "max_positions": 1024, "position_offset": 2}


def model(vocab_size: int = 30_522, projection_dim: int = 128, **roles) -> VisionLanguageModel:
    """On the meta device; roles that are not given are left out."""
    given = {name: None for name in ("image", "text", "fusion")} | roles
    with torch.device("meta"):
        return VisionLanguageModel(Model(**given, projection_dim=projection_dim), vocab_size)


def text(vocab_size: int = 30_522, **options) -> VisionLanguageModel:
    return model(vocab_size, text=TextStack(**options))


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


CASES: dict[str, tuple[Callable[[], VisionLanguageModel], str, dict, int]] = {
    "bert": (lambda: text(**BERT, pooling="pooler"), "BertModel", {}, 0),
    "roberta": (
        lambda: text(50_265, **BERT | {"types": 1, "position_offset": 2}, pooling="pooler"),
        "RobertaModel",
        {"vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1},
        0,
    ),
    "distilbert": (lambda: text(**BERT | {"layers": 6, "types": 0}, pooling="first"), "DistilBertModel", {}, 0),
    "albert": (
        lambda: text(30_000, **BERT, shared=True, embedding_width=128, pooling="pooler"),
        "AlbertModel",
        {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
        0,
    ),
    "electra_small": (
        lambda: text(**BERT | {"width": 256, "heads": 4, "mlp_width": 1024}, embedding_width=128),
        "ElectraModel",
        {},
        0,
    ),
    "gpt": (
        lambda: text(40_478, **GPT | {"norm": "post"}, max_positions=512),
        "OpenAIGPTModel",
        {},
        0,
    ),
    "gpt2": (lambda: text(50_257, **GPT, max_positions=1024), "GPT2Model", {}, 0),
    "gpt2_as_decoder": (
        lambda: model(50_257, decoder=DecoderStack(**DECODER_GPT, max_positions=1024)),
        "GPT2Model",
        {},
        0,
    ),
    "t5": (
        lambda: model(
            32_128,
            text=TextStack(**T5),
            decoder=DecoderStack(
                **T5 | {"relative_position": Distances(bidirectional=False)}, source="text", shares="words"
            ),
        ),
        "T5Model",
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
        0,
    ),
    "bart": (
        lambda: model(50_265, text=TextStack(**BART), decoder=DecoderStack(**BART, source="text", shares="words")),
        "BartModel",
        {
            "d_model": 768,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_ffn_dim": 3072,
            "decoder_ffn_dim": 3072,
            "encoder_attention_heads": 12,
            "decoder_attention_heads": 12,
        },
        0,
    ),
    "vit": (lambda: model(image=ImageStack(**VIT, class_token=True, pooling="pooler")), "ViTModel", {}, 0),
    "clip": (
        lambda: model(
            49_408,
            512,
            image=ImageStack(
                **BASE,
                patch_size=32,
                max_grid=(7, 7),
                positions="learned",
                patch_bias=False,
                class_token=True,
                pooling="first",
            ),
            text=TextStack(**SMALL, max_positions=77, embedding_norm=False, mask="causal", pooling="last"),
        ),
        "CLIPModel",
        {},
        0,
    ),
    "siglip": (
        lambda: model(
            32_000,
            768,
            image=ImageStack(**VIT, pooling="attention", projection="none"),
            text=TextStack(**BASE, max_positions=64, embedding_norm=False, pooling="last", projection="affine"),
        ),
        "SiglipModel",
        {},
        1,  # the bias of the logits belongs to the loss
    ),
    "layoutlm": (lambda: text(**BERT, page="sum", pooling="pooler"), "LayoutLMModel", {}, 0),
    "vilt": (
        lambda: model(
            joint=JointStack(
                **BERT | {"norm": "pre", "max_positions": 40},
                kinds=True,
                image=ImageInput(
                    patch_size=32, max_grid=(12, 12), positions="learned", class_token=True, embedding_norm=False
                ),
            )
        ),
        "ViltModel",
        {},
        0,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_role_has_the_public_models_parameters(name):
    make, public, options, elsewhere = CASES[name]
    config_class = getattr(transformers, public).config_class
    with torch.device("meta"):
        theirs = getattr(transformers, public)(config_class(**options))
    assert size(make()) + elsewhere == size(theirs)


def layers_of_bert(layers: int, crosses: bool) -> int:
    """Of as many blocks, without embeddings."""
    config = transformers.BertConfig(num_hidden_layers=layers, is_decoder=crosses, add_cross_attention=crosses)
    with torch.device("meta"):
        return size(transformers.BertModel(config, add_pooling_layer=False).encoder)


def embeddings_of_bert(**options) -> int:
    with torch.device("meta"):
        return size(transformers.BertModel(transformers.BertConfig(**options)).embeddings)


def vit_at(pixels: int) -> int:
    with torch.device("meta"):
        return size(transformers.ViTModel(transformers.ViTConfig(image_size=pixels), add_pooling_layer=False))


def test_albef_is_a_vit_and_a_bert_cut_in_two():
    ours = model(
        projection_dim=256,
        image=ImageStack(**VIT | {"max_grid": (16, 16)}, class_token=True, pooling="first", projection="affine"),
        text=TextStack(**BERT | {"layers": 6}, pooling="first", projection="affine"),
        fusion=FusionStack(**CROSS | {"layers": 6}),
    )
    assert size(ours.image) == vit_at(256)
    assert size(ours.text) == embeddings_of_bert() + layers_of_bert(6, crosses=False)
    assert size(ours.fusion) == layers_of_bert(6, crosses=True)
    assert size(ours) == size(ours.image) + size(ours.text) + size(ours.fusion) + 2 * (768 * 256 + 256) + 1


def test_blips_three_texts_share_all_but_the_decoders_self_attention():
    ours = model(
        30_524,
        256,
        image=ImageStack(**VIT, class_token=True, pooling="first", projection="affine"),
        text=TextStack(**BERT, pooling="first", projection="affine"),
        fusion=FusionStack(**CROSS, begins_with="ids"),
        decoder=DecoderStack(**BERT, source="image", shares="all_but_attention"),
    )
    self_attention = 4 * (768 * 768 + 768) + 2 * 768
    expected = embeddings_of_bert(vocab_size=30_524) + layers_of_bert(12, crosses=True) + 12 * self_attention
    assert size(nn.ModuleList([ours.text, ours.fusion, ours.decoder])) == expected


def test_q_former_is_blip2s():
    config = transformers.Blip2QFormerConfig(vocab_size=30_523, use_qformer_text_input=True)
    with torch.device("meta"):
        theirs = transformers.Blip2QFormerModel(config)
        tables = nn.ModuleList([nn.Embedding(30_523, 768), nn.Embedding(512, 768), nn.Embedding(32, 768)])
    ours = model(
        30_523,
        image=ImageStack(**VIT | {"width": 1408, "heads": 16, "layers": 1}),
        joint=JointStack(
            **BERT | {"types": 0},
            queries=32,
            source="image",
            cross_every=2,
            own_feed_forward=True,
            pooling="first",
        ),
    )
    assert size(ours.joint) == size(theirs) + size(tables)


def test_layoutlmv2_but_for_its_backbone():
    from transformers.models.layoutlmv2.modeling_layoutlmv2 import (
        LayoutLMv2Embeddings,
        LayoutLMv2Encoder,
        LayoutLMv2Pooler,
    )

    config = transformers.LayoutLMv2Config()
    with torch.device("meta"):
        parts = [LayoutLMv2Embeddings(config), LayoutLMv2Encoder(config), LayoutLMv2Pooler(config)]
        visual = [nn.Linear(256, 768), nn.LayerNorm(768)]
    buckets = {"relative_position": Distances(32, 128), "relative_box": Distances(64, 256)}
    ours = model(
        joint=JointStack(
            **BERT,
            **buckets,
            biases="no_key",
            page="concat",
            image=ImageInput(kind="grid", backbone="resnext101_fpn", max_grid=(7, 7), positions="text"),
        )
    )
    backbone = size(ours.joint.image.backbone)
    assert size(ours) - backbone == sum(map(size, [*parts, *visual]))


def test_electra_has_a_second_text_with_the_same_tables():
    large = BERT | {"embedding_width": 768}
    ours = model(
        text=TextStack(**large), generator=GeneratorStack(**BERT | {"width": 256, "heads": 4, "mlp_width": 1024}, embedding_width=768)
    )
    config = transformers.ElectraConfig(embedding_size=768, hidden_size=256)
    with torch.device("meta"):
        generator = transformers.ElectraModel(config)
    assert size(ours) == size(ours.text) + size(generator) - size(generator.embeddings)
    assert ours.generator.embedder is ours.text.embedder
