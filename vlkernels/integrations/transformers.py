"""``attn_implementation="vlkernels"`` for Hugging Face transformers, and a class swap for its models that ignore the name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlkernels.integrations.padded import Padding, attend, kept

NAME = "vlkernels"

# Arguments that models hand over and that mean something only when they are set.
_NOT_SERVED = {
    "softcap": "it caps no scores",
    "s_aux": "it has no attention sinks",
    "head_mask": "it masks no heads",
    "layer_head_mask": "it masks no heads",
    "cache": "it reads no paged cache",
}


def register() -> None:
    """Make ``attn_implementation="vlkernels"`` known to transformers (5.0 or later): the attention and its mask function.

    Example::

        vk.integrations.transformers.register()
        model = AutoModel.from_pretrained(..., attn_implementation="vlkernels")
        model.set_attn_implementation("vlkernels")                       # or on a live model

    A mask of padding stays ``[B, L]``: attention reads the real keys alone. Masks that are more than padding and causality
    (given by the user, sliding windows shorter than the keys, packed position ids) are added to the scores.
    Under a causal mask the rows of padding come out as 0, as from flash-attn; otherwise they are what sdpa gives.
    """
    transformers = _transformers()
    transformers.AttentionInterface.register(NAME, attention_forward)
    transformers.AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: q ``[B, H, Lq, K]``, k and v ``[B, Hkv, Lk, K]`` -> ``([B, Lq, H, K], None)``."""
    refuse(others)
    padding, bias = read_mask(attention_mask, query, key)
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    causal = _is_causal(module, query, key, attention_mask, is_causal)
    out = attend(query, key, value, padding=padding, causal=causal, bias=bias, softmax_scale=scaling, dropout_p=dropout)
    return out, None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **others: Any,
) -> Tensor | None:
    """The mask that ``attention_forward`` is given: what it says is all in its shape, so a model may slice or expand it.

    ``None``: nothing is hidden but by causality. bool ``[B, Lk]``: padding of a causal mask. bool ``[B, 1, Lq, Lk]``: who sees
    whom; where it is one row of keys, expanded, it is the padding alone.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    end = kv_offset + kv_length
    covers_keys = attention_mask is None or attention_mask.shape[1] >= end
    unlimited = local_size is None or kv_length < local_size
    known = (causal_mask_function, bidirectional_mask_function) if local_size is None else (mask_function,)
    if covers_keys and unlimited and (mask_function is None or mask_function in known):
        real = None if attention_mask is None else attention_mask[:, kv_offset:end]
        if allow_is_bidirectional_skip:
            return None if real is None else real[:, None, None, :].expand(-1, -1, q_length, -1)
        # The queries of a static cache are not the last of its keys.
        if allow_is_causal_skip and not isinstance(q_offset, Tensor) and q_offset + q_length == end:
            if real is not None or q_length in (1, kv_length):
                return real
            return torch.ones(1, kv_length, dtype=torch.bool, device=others.get("device")).expand(batch_size, -1)
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function or causal_mask_function, attention_mask=attention_mask, local_size=local_size,
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **others,
    )  # fmt: skip


def read_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Padding | None, Tensor | None]:
    """A mask as (padding, bias): bool or integer ``[B, Lk]``, or anything that broadcasts to ``[B, H, Lq, Lk]``."""
    if mask is None:
        return None, None
    real = _real_keys(mask)
    _check_mask(mask, (query.shape[0], *([] if real is not None else query.shape[1:3]), key.shape[2]), real)
    if real is not None:
        return kept(mask, ("padding", len(query)), lambda: Padding(real.bool().expand(len(query), -1))), None
    additive = mask
    if mask.dtype == torch.bool:
        additive = kept(mask, query.dtype, lambda: torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf))
    return None, additive.expand(-1, -1, query.shape[2], -1)


def _real_keys(mask: Any) -> Tensor | None:
    """``[B or 1, Lk]`` if the mask hides the same keys from every query and head, which its shape or its strides tell."""
    if not isinstance(mask, Tensor) or mask.is_floating_point():
        return None
    if mask.dim() == 2:
        return mask
    if mask.dim() == 4 and mask.numel() and all(mask.shape[d] == 1 or mask.stride(d) == 0 for d in (1, 2)):
        return mask[:, 0, 0]
    return None


def _check_mask(mask: Any, wanted: tuple[int, ...], real: Tensor | None) -> None:
    # Some models make a mask of padding for other queries than they call with: only its keys count.
    shape = tuple(getattr(mask if real is None else real, "shape", ()))
    if len(shape) != len(wanted) or any(n not in (1, w) for n, w in zip(shape, wanted)) or shape[-1] != wanted[-1]:
        symbols = "[B, Lk]" if real is not None else "[B, H, Lq, Lk]"
        kind = str(getattr(mask, "dtype", type(mask).__name__)).removeprefix("torch.")
        raise ValueError(f"attention_mask must broadcast to {symbols} = {list(wanted)}, got {kind} {list(shape)}")


def refuse(arguments: dict[str, Any]) -> None:
    """Raise for what a model asks and this attention would silently leave out."""
    if arguments.get("output_attentions"):
        raise ValueError(f'attn_implementation="{NAME}" has no output_attentions=True: probabilities are never stored; use "eager"')
    for name, reason in _NOT_SERVED.items():
        if arguments.get(name) is not None:
            raise ValueError(f'attn_implementation="{NAME}" does not take {name}: {reason}')


def _is_causal(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None) -> bool:
    """The call's word, else the module's; one query sees every key, and a mask by pairs has causality in it."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == 1 or (mask is not None and mask.dim() == 4):
        return False
    causal = _says_causal(module) if is_causal is None else bool(is_causal)
    if causal and mask is None and queries != keys:
        raise ValueError(f"causal attention of {queries} queries to {keys} keys needs a mask: which of the keys come first?")
    return causal


def _says_causal(module: nn.Module) -> bool:
    if type(module).__name__ == "BridgeTowerSelfAttention":  # always marked causal, which eager, its only own way, ignores
        return module.config.is_decoder
    return getattr(module, "is_causal", True)


def _transformers() -> Any:
    import transformers

    if not hasattr(transformers, "AttentionMaskInterface"):
        raise ValueError(f"transformers must be 5.0 or later, got {transformers.__version__}")
    return transformers
