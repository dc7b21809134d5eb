"""The variable-length attention of other libraries behind one signature. Nothing is imported before it is asked for."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

OLDEST_ARCHITECTURE = (8, 0)


class Library(NamedTuple):
    """``attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal, scale, deterministic, lse) -> (out, lse or None)``.

    Causal aligns the ends. ``lse`` is ``[H, Tq]`` and has no gradient. ``unsteady()``: ``None``, or why gradients may differ
    from run to run even when asked for ``deterministic``.
    """

    name: str
    attend: Callable[..., tuple[Tensor, Tensor | None]]
    grouped_heads: bool = True
    unsteady: Callable[[], str | None] = lambda: None


@functools.lru_cache(maxsize=1)
def best() -> Library:
    """The library that serves impl="flash": flash-attn where it is installed, else PyTorch's own."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    for load in (*([flash_attn_3] if hopper else []), flash_attn_2):
        try:
            return load()
        except ImportError:
            continue
    return torch_varlen()


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """Why no library can run here; ``None`` when one can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < OLDEST_ARCHITECTURE:
        return "it needs an sm_80 device or a newer one"
    try:
        best()
    except ImportError as reason:
        return str(reason)
    return None


def flash_attn_2() -> Library:
    return Library("flash-attn 2", dao_attend(importlib.import_module("flash_attn").flash_attn_varlen_func))


def flash_attn_3() -> Library:
    return Library("flash-attn 3", dao_attend(importlib.import_module("flash_attn_interface").flash_attn_varlen_func))


def flash_attn_4() -> Library:
    return Library("flash-attn 4", dao_attend(importlib.import_module("flash_attn.cute").flash_attn_varlen_func))


def torch_varlen() -> Library:
    module = importlib.import_module("torch.nn.attention.varlen")
    if "window_size" not in inspect.signature(module.varlen_attn).parameters:
        raise ImportError(f"it needs flash-attn, or PyTorch 2.11 for varlen_attn; this is PyTorch {torch.__version__}")
    grouped = "enable_gqa" in inspect.signature(module.varlen_attn).parameters
    return Library("varlen_attn", torch_attend(module.varlen_attn, module.AuxRequest), grouped, _torch_unsteady)


def dao_attend(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """``flash_attn_varlen_func`` of flash-attn 2, 3 or 4: the same names for what is asked, another one for lse."""
    wants_lse = next(name for name in ("return_lse", "return_attn_probs") if name in inspect.signature(function).parameters)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
        causal: bool, scale: float, deterministic: bool, lse: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        given = function(
            q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
            softmax_scale=scale, causal=causal, deterministic=deterministic, **({wants_lse: True} if lse else {}),
        )  # fmt: skip
        # Some versions return more than was asked for.
        out = given[0] if isinstance(given, tuple) else given
        return out, given[1] if lse else None

    return attend


def torch_attend(function: Callable[..., Any], request: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """PyTorch's ``varlen_attn``; whether it is deterministic is said by PyTorch's global mode."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
        causal: bool, scale: float, deterministic: bool, lse: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        window = (-1, 0) if causal else (-1, -1)
        aux = request(lse=True) if lse else None
        given = function(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window, return_aux=aux, **grouped)
        return given if lse else (given, None)

    return attend


def _torch_unsteady() -> str | None:
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return None
    return "varlen_attn repeats its gradients under torch.use_deterministic_algorithms(True) only"
