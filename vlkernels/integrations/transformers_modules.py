"""Attention modules of transformers that call no registry, over ``vk.attention``; nothing here imports transformers.

A class here is a ``forward`` for the module of the same parameters; :func:`replacement` joins the two into a class that a live
module can take.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import Tensor, nn

from vlkernels.integrations.calls import read_mask, refuse
from vlkernels.integrations.padded import Padding, attend, kept, whole_layout
from vlkernels.ops.attention import attention_qkvpacked

PREFIX = "Fused"


class SelfAttention:
    """ViLT, VisualBERT, FLAVA."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor]:
        refuse({"output_attentions": output_attentions})
        q, k, v = (_heads(self, project(hidden_states)) for project in (self.query, self.key, self.value))
        return (_attend(self, q, k, v, attention_mask),)


class TwoStreams:
    """LXMERT: the keys are another stream, or the same."""

    def forward(
        self, hidden_states: Tensor, context: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor]:
        refuse({"output_attentions": output_attentions})
        q, k, v = _heads(self, self.query(hidden_states)), _heads(self, self.key(context)), _heads(self, self.value(context))
        return (_attend(self, q, k, v, attention_mask),)


class LayoutLMv2:
    """The relative biases are added to the scaled scores as they are."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rel_pos: Tensor | None = None,
        rel_2d_pos: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        refuse(others)
        q, k, v = (_heads(self, x) for x in self.compute_qkv(hidden_states))
        near = rel_pos if self.has_relative_attention_bias else None
        bias = _sum(near, rel_2d_pos if self.has_spatial_attention_bias else None)
        return _attend(self, q, k, v, attention_mask, bias), None


class LayoutLMv3:
    """The relative biases are divided by sqrt(K) like the scores; a bias in space alone is not added."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rel_pos: Tensor | None = None,
        rel_2d_pos: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        refuse(others)
        q, k, v = (_heads(self, project(hidden_states)) for project in (self.query, self.key, self.value))
        bias = None
        if self.has_relative_attention_bias:
            bias = _sum(rel_pos, rel_2d_pos if self.has_spatial_attention_bias else None) * self.attention_head_size**-0.5
        return _attend(self, q, k, v, attention_mask, bias), None


class BlipVision:
    """One projection to q, k and v, which attention reads in place."""

    def forward(self, hidden_states: Tensor, **others: Any) -> tuple[Tensor, None]:
        refuse(others)
        batch, length, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch * length, 3, self.num_heads, self.head_dim)
        layout = whole_layout(batch, length, hidden_states.device)
        out = attention_qkvpacked(qkv, layout=layout, softmax_scale=self.scale, dropout_p=_dropout_p(self))
        return self.projection(out.view(batch, length, width)), None


class BlipText:
    """Self- or cross-attention, with or without a cache."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        refuse(others)
        q = _heads(self, self.query(hidden_states))
        if encoder_hidden_states is None:
            k, v = self._self_keys(hidden_states, past_key_values)
            return _attend(self, q, k, v, attention_mask), None
        k, v = self._cross_keys(encoder_hidden_states, past_key_values)
        return _attend(self, q, k, v, encoder_attention_mask), None

    def _project(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return _heads(self, self.key(states)), _heads(self, self.value(states))

    def _self_keys(self, states: Tensor, past: Any) -> tuple[Tensor, Tensor]:
        if past is None:
            return self._project(states)
        return getattr(past, "self_attention_cache", past).update(*self._project(states), self.layer_idx)

    def _cross_keys(self, states: Tensor, past: Any) -> tuple[Tensor, Tensor]:
        """The encoder's keys never change: a cache of both kinds keeps them after the first token."""
        if past is None:
            return self._project(states)
        if not hasattr(past, "cross_attention_cache"):
            return past.update(*self._project(states), self.layer_idx)
        if past.is_updated.get(self.layer_idx):
            kept_layer = past.cross_attention_cache.layers[self.layer_idx]
            return kept_layer.keys, kept_layer.values
        past.is_updated[self.layer_idx] = True
        return past.cross_attention_cache.update(*self._project(states), self.layer_idx)


FORWARDS = {
    "transformers.models.vilt.modeling_vilt.ViltSelfAttention": SelfAttention,
    "transformers.models.visual_bert.modeling_visual_bert.VisualBertSelfAttention": SelfAttention,
    "transformers.models.flava.modeling_flava.FlavaSelfAttention": SelfAttention,
    "transformers.models.lxmert.modeling_lxmert.LxmertAttention": TwoStreams,
    "transformers.models.layoutlmv2.modeling_layoutlmv2.LayoutLMv2SelfAttention": LayoutLMv2,
    "transformers.models.layoutlmv3.modeling_layoutlmv3.LayoutLMv3SelfAttention": LayoutLMv3,
    "transformers.models.blip.modeling_blip.BlipAttention": BlipVision,
    "transformers.models.blip.modeling_blip_text.BlipTextSelfAttention": BlipText,
}


@functools.cache
def replacement(old: type[nn.Module]) -> type[nn.Module] | None:
    """``old`` with another ``forward``, if there is one for it."""
    forward = FORWARDS.get(f"{old.__module__}.{old.__name__}")
    if forward is None:
        return None
    return type(PREFIX + old.__name__, (forward, old), {"__module__": __name__, "__doc__": forward.__doc__})


def __getattr__(name: str) -> type[nn.Module]:
    """The replacements under their names: a pickled model finds its classes again."""
    for path in FORWARDS:
        module, _, old = path.rpartition(".")
        if name == PREFIX + old:
            return replacement(getattr(importlib.import_module(module), old))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _heads(module: Any, x: Tensor) -> Tensor:
    """``[B, L, H * K]`` -> ``[B, H, L, K]``."""
    return x.unflatten(-1, (-1, module.attention_head_size)).transpose(1, 2)


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None = None) -> Tensor:
    padding, additive = _read_additive(mask, q, k)
    return attend(q, k, v, padding=padding, bias=_sum(bias, additive), dropout_p=_dropout_p(module)).flatten(2)


def _read_additive(mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[Padding | None, Tensor | None]:
    """These models add 0 to the scores of real keys; on a device, where a look would wait, the others are taken as hidden."""
    looked_at = mask is None or mask.device.type == "cpu" or mask.requires_grad
    if looked_at or not mask.is_floating_point() or mask.shape[1:3] != (1, 1):
        return read_mask(mask, q, k)
    return kept(mask, "additive padding", lambda: Padding((mask[:, 0, 0] == 0).expand(len(q), -1))), None


def _dropout_p(module: Any) -> float:
    return module.dropout.p if module.dropout.training else 0.0


def _sum(*terms: Tensor | None) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None
