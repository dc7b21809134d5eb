"""What model code hands to an attention function beside q, k and v: masks of every form, and words that must not be lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlkernels.integrations.padded import Padding, kept

# Arguments that models hand over and that mean something only when they are set.
_NOT_SERVED = {
    "softcap": "it caps no scores",
    "s_aux": "it has no attention sinks",
    "sinks": "it has no attention sinks",
    "indices": "it selects no keys by index",
    "block_indices": "it selects no keys by index",
    "head_mask": "it masks no heads",
    "layer_head_mask": "it masks no heads",
    "cache": "it reads no paged cache",
}


def read_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Padding | None, Tensor | None]:
    """A mask as (padding, bias): bool or integer ``[B, Lk]``, or anything that broadcasts to ``[B, H, Lq, Lk]``."""
    if mask is None:
        return None, None
    real = _real_keys(mask)
    if real is not None:
        # Some models make a mask of padding for other queries than they call with: only its keys count.
        _check_broadcasts("attention_mask", real, "[B, Lk]", (query.shape[0], key.shape[2]))
        return kept(mask, ("padding", len(query)), lambda: Padding(real.bool().expand(len(query), -1))), None
    additive = read_bias("attention_mask", mask, query, key)
    padding = kept(mask, ("values", len(query)), lambda: _padding_by_value(mask, len(query)))
    if padding is not None:
        return padding, None
    if mask.dtype == torch.bool:
        scores = kept(mask, query.dtype, lambda: torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf))
        additive = scores.expand_as(additive)
    return None, additive


def read_bias(name: str, bias: Any, query: Tensor, key: Tensor) -> Tensor:
    """What is added to the scores, one for every pair: ``[B or 1, H or 1, Lq, Lk]``; or a bool mask of that shape."""
    _check_broadcasts(name, bias, "[B, H, Lq, Lk]", (*query.shape[:3], key.shape[2]))
    if not (bias.is_floating_point() or bias.dtype == torch.bool):
        raise ValueError(f"{name} by pairs must be bool or floating, got {_dtype(bias)}")
    return bias.expand(-1, -1, query.shape[2], -1)


def _real_keys(mask: Any) -> Tensor | None:
    """``[B or 1, Lk]`` if the mask hides the same keys from every query and head, which its shape or its strides tell."""
    if not isinstance(mask, Tensor) or mask.is_floating_point():
        return None
    if mask.dim() == 2:
        return mask
    if mask.dim() == 4 and mask.numel() and all(mask.shape[d] == 1 or mask.stride(d) == 0 for d in (1, 2)):
        return mask[:, 0, 0]
    return None


def _padding_by_value(mask: Tensor, batch: int) -> Padding | None:
    """The padding that an additive mask is no more than; looked for on a CPU, where its values cost no wait.

    A sample without any key is none: the finite values that hide its keys then leave it a softmax over all of them.
    """
    if mask.device.type != "cpu" or not mask.is_floating_point() or mask.requires_grad or torch.compiler.is_compiling():
        return None
    row = mask[:, :1, :1]
    hidden = row <= torch.finfo(mask.dtype).min / 2
    if not (hidden | (row == 0)).all() or hidden.all(-1).any() or not torch.equal(mask, row.expand_as(mask)):
        return None
    return Padding(hidden[:, 0, 0].logical_not().expand(batch, -1))


def _check_broadcasts(name: str, tensor: Any, symbols: str, wanted: tuple[int, ...]) -> None:
    shape = tuple(getattr(tensor, "shape", ()))
    if len(shape) != len(wanted) or any(n not in (1, w) for n, w in zip(shape, wanted)) or shape[-1] != wanted[-1]:
        raise ValueError(f"{name} must broadcast to {symbols} = {list(wanted)}, got {_dtype(tensor)} {list(shape)}")


def _dtype(tensor: Any) -> str:
    return str(getattr(tensor, "dtype", type(tensor).__name__)).removeprefix("torch.")


def refuse(arguments: Mapping[str, Any]) -> None:
    """Raise for what a model asks and this attention would silently leave out."""
    if arguments.get("output_attentions"):
        raise ValueError('vk.attention stores no probabilities for output_attentions=True: use attn_implementation="eager"')
    for name, reason in _NOT_SERVED.items():
        if arguments.get(name) is not None:
            raise ValueError(f"vk.attention does not serve {name}: {reason}")
