"""LayerNorm and RMSNorm of a fused sum, as their definitions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.random import Rng, dropout_scale, keep_mask, resolve_rng


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    return_sum: bool = False,
    **fused: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    z = fused_sum(x, **fused)
    return _with_sum(normalized(z, weight, bias, eps), z, x, return_sum)


def rms_norm(
    x: Tensor, weight: Tensor | None, *, eps: float = 1e-6, return_sum: bool = False, **fused: Any
) -> Tensor | tuple[Tensor, Tensor]:
    z = fused_sum(x, **fused)
    return _with_sum(scaled(z, weight, eps), z, x, return_sum)


def fused_sum(
    x: Tensor,
    *,
    residual: Tensor | None = None,
    linear_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    row_scale: Tensor | None = None,
    rng: Rng | None = None,
    stream: int = 0,
    layout: SegmentLayout | None = None,
) -> Tensor:
    """``residual + row_scale * dropout(x + linear_bias)``, rounded once; ``x`` itself when nothing is fused."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x
    if linear_bias is not None:
        z = z.to(wide) + linear_bias
    if dropout_p > 0:
        z = torch.where(kept(x, dropout_p, rng, stream, layout), z.to(wide) * dropout_scale(dropout_p), 0)
    if row_scale is not None:
        z = z.to(wide) * row_scale.reshape(*x.shape[:-1], 1)
    if residual is not None:
        z = residual + z
    return z.to(x.dtype)


def _with_sum(y: Tensor, z: Tensor, x: Tensor, return_sum: bool) -> Tensor | tuple[Tensor, Tensor]:
    if not return_sum:
        return y
    return y, z.clone() if z is x else z


def kept(x: Tensor, p: float, rng: Rng | None, stream: int, layout: SegmentLayout | None) -> Tensor:
    """bool, like ``x``: rows are keyed by the layout, or by (sample 0, their index)."""
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    columns = torch.arange(width, device=x.device)
    state = resolve_rng(rng, x.device)
    if layout is None:
        mask = keep_mask(state, stream, 0, torch.arange(rows, device=x.device)[:, None], columns, p)
    else:
        keys = layout.token_keys()
        mask = keep_mask(state, stream, keys[:, :1], keys[:, 1:], columns, p)
    return mask.view(x.shape)


def normalized(z: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """PyTorch's LayerNorm (statistics in float32 or wider) for any mix of dtypes of data and parameters."""
    parameters = [p for p in (weight, bias) if p is not None]
    if all(p.dtype == z.dtype for p in parameters):
        return F.layer_norm(z, z.shape[-1:], weight, bias, eps)
    wide = torch.promote_types(z.dtype, torch.float32)
    weight, bias = (p if p is None else p.to(wide) for p in (weight, bias))
    return F.layer_norm(z.to(wide), z.shape[-1:], weight, bias, eps).to(z.dtype)


def scaled(z: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The rows over their root mean square, times the weight: in float32 or wider, rounded once."""
    wide = torch.promote_types(z.dtype, torch.float32)
    rows = z.to(wide)
    y = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(z.dtype)
