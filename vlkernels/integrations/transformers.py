"""``attn_implementation="vlkernels"`` for Hugging Face transformers, and a class swap for its models that ignore the name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vlkernels.integrations.calls import read_bias, read_mask, refuse
from vlkernels.integrations.padded import attend
from vlkernels.integrations.swap import ORIGINAL, Left, Report, swap
from vlkernels.integrations.transformers_modules import replacement
from vlkernels.integrations.transformers_norms import swap_norms

__all__ = ["attention_forward", "attention_mask", "register", "swap_attention", "swap_norms"]

NAME = "vlkernels"
REGISTRY = "ALL_ATTENTION_FUNCTIONS"  # its name in the modules of transformers that ask it
# Not told by the module: a part of the model asks, another with the same masks does not; the text of BLIP has its own file.
NOT_ASKING = ("BigBirdPegasusConfig", "BlipTextConfig", "GitConfig", "InformerConfig")


def register() -> None:
    """Make ``attn_implementation="vlkernels"`` known to transformers (5.0 or later): the attention and its mask function.

    Example::

        vk.integrations.transformers.register()
        model = AutoModel.from_pretrained(..., attn_implementation="vlkernels")
        model.set_attn_implementation("vlkernels")                       # or on a live model

    A mask of padding stays ``[B, L]``: attention reads the real keys alone. Masks that are more than padding and causality
    (given by the user, sliding windows shorter than the keys, packed position ids) are added to the scores.
    Under a causal mask the rows of padding come out as 0, as from flash-attn (texts to be continued are padded on the left, as
    transformers advises); otherwise they are what sdpa gives. What a query that sees no key reads is 0.
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
        position_bias = read_bias("position_bias", position_bias, query, key)
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
    whom; where it is one row of keys, expanded, it is the padding alone. Attention that asks no registry would add these to its
    scores as numbers, so a model that has it is refused.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    _check_registry_is_asked(others.get("config"))
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


def _check_registry_is_asked(config: Any) -> None:
    kind = type(config)
    modeling = sys.modules.get(kind.__module__.replace("configuration_", "modeling_"))
    # Other people's modules, code from the hub (transformers_modules) excepted, may ask it under another name.
    told = modeling is not None and kind.__module__.startswith("transformers") and not hasattr(modeling, REGISTRY)
    if (told and _defines_attention(modeling)) or kind.__name__ in NOT_ASKING:
        raise ValueError(
            f'the attention of {kind.__name__} asks no registry, so attn_implementation="{NAME}" cannot reach it: '
            'use "eager"; swap_attention(model) then tells what can be replaced'
        )


def _defines_attention(modeling: ModuleType) -> bool:
    """Models whose parts are other models leave attention to those."""
    named = [kind for name, kind in vars(modeling).items() if "Attention" in name and isinstance(kind, type)]
    return any(issubclass(kind, nn.Module) and kind.__module__ == modeling.__name__ for kind in named)


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


def swap_attention(model: nn.Module) -> Report:
    """Put ``vk.attention`` into the attention modules of a live model that call no registry, by changing their class.

    Example::

        model = ViltForMaskedLM.from_pretrained(...)
        print(vk.integrations.transformers.swap_attention(model))        # what was swapped, what was left and why
        vk.integrations.swap.unswap(model)

    ViLT, LayoutLMv2, LayoutLMv3, LXMERT, VisualBERT, BLIP (vision and text), FLAVA. Parameters and the state dict stay as they
    are. ``output_attentions=True`` is refused afterwards; LayoutLMv2 and v3 do not tell their attention
    and return none. On a GPU a mask of keys hides whatever it does not add 0 to, and samples without any key get 0.
    """
    kinds = {type(module) for module in model.modules()}
    report = swap(model, {kind: replacement(kind) for kind in kinds if replacement(kind) is not None})
    named = {entry.name for entry in (*report.swapped, *report.left)}
    others = [Left(n, type(m).__name__, _why_left(m)) for n, m in model.named_modules() if n not in named and _is_attention(m)]
    return Report(report.swapped, (*report.left, *others))


def _is_attention(module: nn.Module) -> bool:
    """An attention that has no other one inside."""
    inner = [m for m in module.modules() if type(m).__name__.endswith("Attention")]
    return inner == [module]


def _why_left(module: nn.Module) -> str:
    if ORIGINAL in vars(module):
        return "it has its new class already"
    if hasattr(sys.modules.get(type(module).__module__), REGISTRY):
        return f'it asks the registry: register(), then model.set_attn_implementation("{NAME}")'
    return "no replacement for it is known"


def _transformers() -> Any:
    import transformers

    if not hasattr(transformers, "AttentionMaskInterface"):
        raise ValueError(f"transformers must be 5.0 or later, got {transformers.__version__}")
    return transformers
