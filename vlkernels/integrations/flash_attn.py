"""The functions of flash-attn under their own names, over ``vk.attention``: its dtypes, CPU and CUDA, differentiable lse.

What is not served raises one line. Rows that see nothing give 0, and lse -inf.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.mask import SegmentMask
from vlkernels.integrations.padded import kept, whole_layout
from vlkernels.ops.attention import attention, attention_qkvpacked

# Self-attention and cross-attention alike: the ends are aligned.
CAUSAL = SegmentMask.causal()

Result = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """``[Tq, H, K]`` of packed q ``[Tq, H, K]`` and k, v ``[Tk, Hkv, K]``; causal aligns the ends (bottom-right).

    With ``return_attn_probs``: ``(out, lse [H, Tq], None)``, the probabilities themselves being never stored.
    """
    causal = _served(causal, window_size, softcap, alibi_slopes, block_table)
    layout = _layout("cu_seqlens_q", cu_seqlens_q, max_seqlen_q, q.shape[0])
    kv_layout = None if cu_seqlens_k is cu_seqlens_q else _layout("cu_seqlens_k", cu_seqlens_k, max_seqlen_k, k.shape[0])
    options = _options(causal, dropout_p, softmax_scale, deterministic)
    return _result(attention(q, k, v, layout=layout, kv_layout=kv_layout, **options), return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_varlen_func` of qkv ``[T, 3, H, K]``, with one gradient for it."""
    causal = _served(causal, window_size, softcap, alibi_slopes)
    options = _options(causal, dropout_p, softmax_scale, deterministic)
    layout = _layout("cu_seqlens", cu_seqlens, max_seqlen, qkv.shape[0])
    return _result(attention_qkvpacked(qkv, layout=layout, **options), return_attn_probs)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """``[B, Lq, H, K]`` of q ``[B, Lq, H, K]`` and k, v ``[B, Lk, Hkv, K]``; with ``return_attn_probs`` lse ``[B, H, Lq]``."""
    causal = _served(causal, window_size, softcap, alibi_slopes)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be [B, L, H, K], got {list(x.shape)}")
    batch, queries = q.shape[:2]
    layout, kv_layout = whole_layout(batch, queries, q.device), whole_layout(k.shape[0], k.shape[1], k.device)
    options = _options(causal, dropout_p, softmax_scale, deterministic)
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    out, lse = attention(*rows, layout=layout, kv_layout=None if kv_layout is layout else kv_layout, **options)
    return _result((out.view(q.shape), lse.unflatten(1, (batch, queries)).transpose(0, 1)), return_attn_probs)


def _served(
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    block_table: Tensor | None = None,
) -> bool:
    """Whether the call is causal; raises for what has no kernel here."""
    window = tuple(window_size) if isinstance(window_size, (tuple, list)) else window_size
    if window not in ((-1, -1), (-1, 0)):
        raise ValueError(f"window_size must be (-1, -1), or (-1, 0) for causal, got {window}")
    if softcap:
        raise ValueError(f"softcap must be 0, got {softcap}")
    for name, given in (("alibi_slopes", alibi_slopes), ("block_table", block_table)):
        if given is not None:
            raise ValueError(f"{name} must be None: it is not served")
    return causal or window == (-1, 0)


def _layout(name: str, cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> SegmentLayout:
    """One layout for one ``cu_seqlens``: the layers of a model share what kernels make from it."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"{name} must be a Tensor, got a {type(cu_seqlens).__name__}")

    def make() -> SegmentLayout:
        # A layout of views would keep the tensor alive that it is kept for.
        return SegmentLayout.from_cu_seqlens(cu_seqlens.clone(), max_seqlen=int(max_seqlen), num_tokens=tokens)

    return kept(cu_seqlens, ("layout", int(max_seqlen), tokens), make)


def _options(causal: bool, dropout_p: float, softmax_scale: float | None, deterministic: bool) -> dict[str, Any]:
    mask = CAUSAL if causal else None
    return {
        "mask": mask, "dropout_p": dropout_p, "softmax_scale": softmax_scale, "deterministic": deterministic, "return_lse": True
    }  # fmt: skip


def _result(found: tuple[Tensor, Tensor], return_attn_probs: bool) -> Result:
    out, lse = found
    return (out, lse, None) if return_attn_probs else out
