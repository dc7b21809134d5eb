"""Small models of transformers, and inputs that ask something of attention: padding anywhere, causality, images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

VOCABULARY = 99
WIDTH = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
TEXT = dict(WIDTH, vocab_size=VOCABULARY, max_position_embeddings=40, pad_token_id=0)
IMAGE = dict(WIDTH, image_size=12, patch_size=4)
LLAMA = dict(TEXT, num_key_value_heads=2)
OPT = dict(WIDTH, ffn_dim=37, vocab_size=VOCABULARY, max_position_embeddings=40, word_embed_proj_dim=32)


@dataclass(frozen=True)
class Case:
    """``build`` a model; ``inputs()`` for it; attention calls of one forward; ``real`` rows, where a causal mask has padding.

    ``against`` is the implementation of transformers that must give the same.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    calls: int
    real: Callable[[], Tensor] | None = None
    against: str = "sdpa"

    def __str__(self) -> str:
        return self.name


def redrawn(model: nn.Module) -> nn.Module:
    """Every parameter at random, biases and norms too: a default initialisation is blind to much that goes wrong."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


def right() -> Tensor:
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, 7:], mask[2, 10:] = 0, 0
    return mask


def left() -> Tensor:
    return right().flip(1)


def holes() -> Tensor:
    mask = right()
    mask[1, 3:5] = 0
    mask[2, 0] = 0
    return mask


def ids(length: int = 11, seed: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY - 2, (3, length), generator=torch.Generator().manual_seed(seed))


def pixels(size: int = 12) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(3))


def text(mask: Callable[[], Tensor] = right, **more: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_ids": ids(), "attention_mask": mask(), **{name: make() for name, make in more.items()}}


def labels(mask: Callable[[], Tensor] = right) -> Callable[[], Tensor]:
    return lambda: ids(seed=4).masked_fill(mask() == 0, -100)


def boxes() -> Tensor:
    corner = torch.randint(0, 500, (3, 11, 2), generator=torch.Generator().manual_seed(5))
    size = torch.randint(1, 500, (3, 11, 2), generator=torch.Generator().manual_seed(6))
    return torch.cat([corner, corner + size], dim=-1)


def eos_last() -> Tensor:
    """CLIP reads its sentence at the largest id."""
    tokens = ids()
    tokens[torch.arange(3), right().sum(1) - 1] = VOCABULARY - 1
    return tokens


def _bert(**more: Any) -> Any:
    return transformers.BertConfig(**TEXT, **more)


def _clip() -> Any:
    text_config = dict(TEXT, bos_token_id=1, eos_token_id=VOCABULARY - 1, projection_dim=16)
    return transformers.CLIPConfig(text_config=text_config, vision_config=dict(IMAGE, projection_dim=16), projection_dim=16)


def _siglip2_inputs() -> dict[str, Any]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    patches = torch.randn(3, 9, 4 * 4 * 3, generator=torch.Generator().manual_seed(3))
    shapes = torch.tensor([[3, 3], [2, 3], [3, 3]])
    return {**text()(), "pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _blip2(**qformer: Any) -> Any:
    return transformers.Blip2Config(
        vision_config=dict(IMAGE), text_config=dict(OPT, model_type="opt"), image_token_index=VOCABULARY - 1,
        qformer_config=dict(TEXT, encoder_hidden_size=32, cross_attention_frequency=1, **qformer),
        num_query_tokens=4, image_text_hidden_size=16,
    )  # fmt: skip


def _with_image_tokens(count: int, mask: Callable[[], Tensor] = right) -> Callable[[], dict[str, Any]]:
    def inputs() -> dict[str, Any]:
        tokens = ids()
        tokens[:, 1 : 1 + count] = VOCABULARY - 1
        return {"input_ids": tokens, "attention_mask": mask(), "pixel_values": pixels(), "labels": labels(mask)()}

    return inputs


def _chameleon() -> Any:
    images = dict(embed_dim=8, num_embeddings=20, double_latent=False, latent_channels=8, resolution=16, base_channels=32)
    names = {"<image>": VOCABULARY - 1, **{f"IMGIMG{chr(65 + i)}Z": 40 + i for i in range(20)}}
    return transformers.ChameleonConfig(
        **LLAMA, vq_config=dict(images, channel_multiplier=[1, 2], num_res_blocks=1, attn_resolutions=[]), vocabulary_map=names
    )


def _bridge_tower() -> Any:
    # Its vision tower has a head per 64 channels.
    return transformers.BridgeTowerConfig(
        **WIDTH, text_config=dict(TEXT), vision_config=dict(hidden_size=64, num_hidden_layers=2, image_size=12, patch_size=4)
    )


def _bart() -> Any:
    sizes = dict(encoder_layers=2, decoder_layers=2, encoder_ffn_dim=37, decoder_ffn_dim=37)
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4, d_model=32)
    return transformers.BartConfig(vocab_size=VOCABULARY, max_position_embeddings=40, pad_token_id=0, **sizes, **heads)


def _t5() -> Any:
    return transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=12, decoder_start_token_id=0,
    )  # fmt: skip


T = transformers
_decoder_text = text(decoder_input_ids=lambda: ids(7, seed=8))
# As many positions in the decoder as in the encoder: nothing but the module says whose padding the mask is.
_equal_lengths = text(decoder_input_ids=lambda: ids(11, seed=8))

CASES = [
    Case("bert-right", lambda: T.BertModel(_bert()), text(right), 2),
    Case("bert-left", lambda: T.BertModel(_bert()), text(left), 2),
    Case("bert-holes", lambda: T.BertModel(_bert()), text(holes), 2),
    Case("bert-none", lambda: T.BertModel(_bert()), lambda: {"input_ids": ids()}, 2),
    Case("bert-mlm", lambda: T.BertForMaskedLM(_bert()), text(labels=labels()), 2),
    Case("bert-pretraining", lambda: T.BertForPreTraining(_bert()), text(), 2),
    Case("bert-decoder-right", lambda: T.BertLMHeadModel(_bert(is_decoder=True)), text(labels=labels()), 2, right),
    Case("bert-decoder-left", lambda: T.BertLMHeadModel(_bert(is_decoder=True)), text(left, labels=labels(left)), 2, left),
    Case(
        "bert-decoder-cross",
        lambda: T.BertLMHeadModel(_bert(is_decoder=True, add_cross_attention=True)),
        text(encoder_hidden_states=lambda: torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(3)),
             encoder_attention_mask=lambda: right()[:, 4:9]),
        4,
        right,
    ),
    Case("roberta", lambda: T.RobertaForMaskedLM(T.RobertaConfig(**TEXT)), text(labels=labels()), 2),
    Case("electra", lambda: T.ElectraModel(T.ElectraConfig(**TEXT, embedding_size=32)), text(left), 2),
    Case("albert", lambda: T.AlbertModel(T.AlbertConfig(**TEXT, embedding_size=16)), text(), 2),
    Case("layoutlm", lambda: T.LayoutLMForMaskedLM(T.LayoutLMConfig(**TEXT)), text(bbox=boxes, labels=labels()), 2),
    Case("gpt2-right", lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=99, n_positions=40, n_embd=32, n_layer=2, n_head=4)),
         text(labels=labels()), 2, right),
    Case("gpt2-left", lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=99, n_positions=40, n_embd=32, n_layer=2, n_head=4)),
         text(left), 2, left),
    Case("opt", lambda: T.OPTForCausalLM(T.OPTConfig(**OPT)), text(), 2, right),
    Case("llama-right", lambda: T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)), text(labels=labels()), 2, right),
    Case("llama-left", lambda: T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)), text(left), 2, left),
    Case("llama-holes", lambda: T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)), text(holes), 2, holes),
    Case("mistral", lambda: T.MistralForCausalLM(T.MistralConfig(**LLAMA, sliding_window=4)), text(), 2, right),
    Case("mistral-wide", lambda: T.MistralForCausalLM(T.MistralConfig(**LLAMA, sliding_window=99)), text(left), 2, left),
    Case("t5", lambda: T.T5ForConditionalGeneration(_t5()), _decoder_text, 6),
    Case("t5-equal-lengths", lambda: T.T5ForConditionalGeneration(_t5()), _equal_lengths, 6),
    Case("t5-left", lambda: T.T5ForConditionalGeneration(_t5()), text(left, decoder_input_ids=lambda: ids(7, seed=8)), 6),
    Case("bart", lambda: T.BartForConditionalGeneration(_bart()), _decoder_text, 6),
    Case("bart-equal-lengths", lambda: T.BartForConditionalGeneration(_bart()), _equal_lengths, 6),
    Case("clip", lambda: T.CLIPModel(_clip()), lambda: {
        "input_ids": eos_last(), "attention_mask": right(), "pixel_values": pixels(), "return_loss": True}, 4, right),
    Case("siglip", lambda: T.SiglipModel(T.SiglipConfig(text_config=dict(TEXT, projection_size=32), vision_config=IMAGE)),
         text(pixel_values=pixels), 4),
    Case("siglip2", lambda: T.Siglip2Model(T.Siglip2Config(
        text_config=dict(TEXT, projection_size=32), vision_config=dict(WIDTH, patch_size=4, num_patches=9))),
        _siglip2_inputs, 4),
    Case("vit", lambda: T.ViTModel(T.ViTConfig(**IMAGE)), lambda: {"pixel_values": pixels()}, 2),
    Case("deit", lambda: T.DeiTModel(T.DeiTConfig(**IMAGE)), lambda: {"pixel_values": pixels()}, 2),
    Case("dinov2", lambda: T.Dinov2Model(T.Dinov2Config(**IMAGE)), lambda: {"pixel_values": pixels()}, 2),
    Case("vit-mae", lambda: T.ViTMAEForPreTraining(T.ViTMAEConfig(
        **IMAGE, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=20)),
        lambda: {"pixel_values": pixels(), "noise": torch.rand(3, 9, generator=torch.Generator().manual_seed(7))},
        2),  # its decoder keeps the implementation that it was built with: set_attn_implementation does not reach it
    Case("beit", lambda: T.BeitForMaskedImageModeling(T.BeitConfig(
        **IMAGE, vocab_size=VOCABULARY, use_mask_token=True, use_relative_position_bias=True)),
        lambda: {"pixel_values": pixels(), "bool_masked_pos": torch.arange(27).view(3, 9) % 4 == 0}, 2),
    Case("swin", lambda: T.SwinModel(T.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4)),
        lambda: {"pixel_values": pixels(16)}, 3),
    Case("blip2-caption", lambda: T.Blip2ForConditionalGeneration(_blip2()), _with_image_tokens(4), 8, right),
    Case("blip2-retrieval", lambda: T.Blip2ForImageTextRetrieval(_blip2(use_qformer_text_input=True)),
         text(pixel_values=pixels, use_image_text_matching_head=lambda: True), 6),
    Case("llava", lambda: T.LlavaForConditionalGeneration(T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**IMAGE), text_config=T.LlamaConfig(**LLAMA), image_token_index=VOCABULARY - 1)),
        _with_image_tokens(9, left), 4, left),
    Case("chameleon", lambda: T.ChameleonModel(_chameleon()), text(left), 2, left),
    Case("dual-encoder", lambda: T.VisionTextDualEncoderModel(T.VisionTextDualEncoderConfig(
        vision_config=T.ViTConfig(**IMAGE).to_dict(), text_config=_bert().to_dict(), projection_dim=16)),
        text(pixel_values=pixels, return_loss=lambda: True), 4),
    Case("bridgetower", lambda: T.BridgeTowerModel(_bridge_tower()), text(pixel_values=pixels), 10, against="eager"),
]  # fmt: skip
