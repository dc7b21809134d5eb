"""The norms of transformers that are classes of its own, over ``vk.rms_norm``; transformers is imported where it is needed.

Its models hold copies of two RMSNorms, T5's and Llama's, under some hundred names: a class is known by its code.
"""

from __future__ import annotations

import functools
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from vlkernels.integrations.swap import Left, Report, swap
from vlkernels.ops.layer_norm import FusedLayerNorm, FusedRMSNorm, rms_norm

PREFIX = "Fused"


class Replacement:
    """A pickled or copied module finds its class again by the class it replaces, which is its last base."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return _blank, (type(self).__bases__[-1],), vars(self)


class T5Norm(Replacement):
    """It returns float32, or the dtype of a half-precision weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        half = self.weight.dtype in (torch.float16, torch.bfloat16)
        return _scaled(self, hidden_states, self.weight.dtype if half else torch.promote_types(self.weight.dtype, torch.float32))


class LlamaNorm(Replacement):
    """It returns the wider dtype of data and weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _scaled(self, hidden_states, torch.promote_types(hidden_states.dtype, self.weight.dtype))


def swap_norms(model: nn.Module) -> Report:
    """Put ``vk.layer_norm`` and ``vk.rms_norm`` into the norms of a live model of transformers, by changing their class.

    Example::

        model = T5ForConditionalGeneration.from_pretrained(...)
        print(vk.integrations.transformers.swap_norms(model))            # what was swapped, what was left and why
        vk.integrations.swap.unswap(model)

    ``nn.LayerNorm``, ``nn.RMSNorm``, and the RMSNorms of T5, Llama and the models that have theirs word for word. Parameters,
    the state dict and the dtype of the output stay as they are; half types are rounded once, after the weight.
    """
    kinds = {type(module) for module in model.modules()}
    report = swap(model, {kind: new for kind in kinds if (new := replacement(kind)) is not None})
    named = {entry.name for entry in (*report.swapped, *report.left)}
    others = [Left(n, type(m).__name__, _why_left(m)) for n, m in model.named_modules() if n not in named and _is_norm(m)]
    return Report(report.swapped, (*report.left, *others))


@functools.cache
def replacement(old: type[nn.Module]) -> type[nn.Module] | None:
    """``old`` with another ``forward``, if there is one for it."""
    if old in (nn.LayerNorm, nn.RMSNorm):
        return FusedLayerNorm if old is nn.LayerNorm else FusedRMSNorm
    if issubclass(old, Replacement):
        return None
    for forward, known in _known_forwards():
        if _same_code(getattr(old.forward, "__code__", None), known):
            return type(PREFIX + old.__name__, (forward, old), {"__module__": __name__, "__doc__": forward.__doc__})
    return None


@functools.cache
def _known_forwards() -> tuple[tuple[type[Replacement], CodeType], ...]:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    return (T5Norm, T5LayerNorm.forward.__code__), (LlamaNorm, LlamaRMSNorm.forward.__code__)


def _same_code(code: CodeType | None, known: CodeType) -> bool:
    return code is not None and all(getattr(code, part) == getattr(known, part) for part in ("co_code", "co_consts", "co_names"))


def _scaled(module: Any, hidden_states: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(hidden_states.dtype, module.weight.dtype)
    return rms_norm(hidden_states.to(wide), module.weight.to(wide), eps=module.variance_epsilon).to(dtype)


def _blank(old: type[nn.Module]) -> nn.Module:
    return object.__new__(replacement(old))


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm", "LayerNorm2d"))


def _why_left(module: nn.Module) -> str:
    fused = isinstance(module, (Replacement, FusedLayerNorm, FusedRMSNorm))
    return "it has its new class already" if fused else "no replacement for it is known"
