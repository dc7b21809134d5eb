"""Models of `transformers` with the weights of ours: run as they are released, with SDPA where they have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from engine.sections import Stack

QUERY_KEY_VALUE = "self_attention.query_key_value."


def bert_options(stack: Stack) -> dict[str, Any]:
    return {
        "hidden_size": stack.width,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "intermediate_size": stack.mlp_width,
        "hidden_act": stack.activation,
        "hidden_dropout_prob": stack.dropout,
        "attention_probs_dropout_prob": stack.attention_dropout,
        "layer_norm_eps": stack.eps,
    }


class BertLayers(nn.Module):
    """BERT's layers in the place of the plain `Transformer`."""

    def __init__(self, stack: Stack):
        super().__init__()
        from transformers import BertConfig
        from transformers.models.bert.modeling_bert import BertEncoder

        self.encoder = BertEncoder(BertConfig(**bert_options(stack), attn_implementation="sdpa"))

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        return self.encoder(x, attention_mask=visible).last_hidden_state


BERT_NAMES = {
    "self_attention.output.": "attention.output.dense.",
    "self_attention.norm.": "attention.output.LayerNorm.",
    "feed_forward.inner.": "intermediate.dense.",
    "feed_forward.output.": "output.dense.",
    "feed_forward.norm.": "output.LayerNorm.",
}
CLIP_NAMES = {
    "self_attention.output.": "self_attn.out_proj.",
    "self_attention.norm.": "layer_norm1.",
    "feed_forward.inner.": "mlp.fc1.",
    "feed_forward.output.": "mlp.fc2.",
    "feed_forward.norm.": "layer_norm2.",
}


def bert_weights(blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By their names in `BertEncoder`, from those of the blocks of a `Transformer`: `blocks.0.self_attention...`."""
    return _layers(blocks, "layer", BERT_NAMES, "attention.self.{}.", ("query", "key", "value"))


def clip_weights(blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _layers(blocks, "layers", CLIP_NAMES, "self_attn.{}.", ("q_proj", "k_proj", "v_proj"))


def _layers(
    blocks: Mapping[str, Tensor], folder: str, names: Mapping[str, str], part: str, parts: tuple[str, str, str]
) -> dict[str, Tensor]:
    found = {}
    for name, weight in blocks.items():
        _, layer, name = name.split(".", 2)
        place, kind = name.rsplit(".", 1)
        if f"{place}." == QUERY_KEY_VALUE:
            for own, piece in zip(parts, weight.chunk(3), strict=True):
                found[f"{folder}.{layer}.{part.format(own)}{kind}"] = piece
        else:
            found[f"{folder}.{layer}.{names[f'{place}.']}{kind}"] = weight
    return found


def named(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: weight for name, weight in weights.items()}


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin so, without it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def quietly(make: Any, *arguments: Any) -> nn.Module:
    """Without the warnings of a configuration that is not a released one."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return make(*arguments)
    finally:
        logging.set_verbosity(before)
