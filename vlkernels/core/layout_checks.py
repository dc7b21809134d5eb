"""What a layout is refused for, and lengths and ids as it keeps them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlkernels.core import checks

MAX_SEGMENTS = 16

MAX_TOKENS = 2**31 - 1

Lengths = Tensor | Sequence[Sequence[int]]


def _whole(length: Any) -> int:
    try:
        return operator.index(length)
    except TypeError:
        raise ValueError(f"lengths must be integers, got {length!r}") from None


def _row(sample: Any) -> list[int]:
    if not isinstance(sample, Iterable):
        raise ValueError(f"lengths must be [B, S]: a sample of one segment is [{sample!r}], got {sample!r}")
    return [_whole(n) for n in sample]


def host_lengths(lengths: Lengths) -> Tensor:
    if isinstance(lengths, Tensor):
        if lengths.device.type != "cpu":
            raise ValueError("lengths must be on the host; for lengths on a device use from_cu_seqlens or take")
        if lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise ValueError(f"lengths must be integers, got {lengths.dtype}")
        host = lengths.to(torch.int64).contiguous()
    else:
        rows = [_row(sample) for sample in lengths]
        widths = {len(row) for row in rows}
        if len(widths) > 1:
            raise ValueError(f"every sample must have the same number of segments, got {sorted(widths)}")
        host = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), widths.pop() if widths else 1)
    if host.dim() != 2 or not 1 <= host.shape[1] <= MAX_SEGMENTS:
        raise ValueError(f"lengths must be [B, S] with 1 <= S <= {MAX_SEGMENTS}, got {list(host.shape)}")
    if host.numel() and int(host.min()) < 0:
        raise ValueError(f"lengths must not be negative, got {int(host.min())}")
    return host


def check_tokens(num_tokens: int) -> None:
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"a layout holds at most 2**31 - 1 tokens, got {num_tokens}")


def check_bounds(cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> None:
    if cu_seqlens.device.type != "cpu":
        torch._assert_async(_bounds_hold(cu_seqlens, max_seqlen, num_tokens))
        return
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(bounds, bounds[1:])]
    if bounds[0] != 0 or bounds[-1] > num_tokens or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to at most num_tokens = {num_tokens}, got {_shortened(bounds)}")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen must be at least the longest sample = {max(lengths)}, got {max_seqlen}")


def _bounds_hold(cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> Tensor:
    """bool on the device: what :func:`check_bounds` wants."""
    lengths = cu_seqlens.diff()
    return (cu_seqlens[0] == 0) & (cu_seqlens[-1] <= num_tokens) & ((lengths >= 0) & (lengths <= max_seqlen)).all()


def _shortened(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"{values[:4]} .. {values[-4:]}"


def host_sample_ids(sample_ids: Tensor | Sequence[int] | None, num_samples: int) -> Tensor:
    if sample_ids is None:
        return torch.arange(num_samples, dtype=torch.int32)
    ids = torch.as_tensor(sample_ids, dtype=torch.int32, device="cpu").clone()
    if ids.shape != (num_samples,):
        raise ValueError(f"sample_ids must be [B] = [{num_samples}], got {list(ids.shape)}")
    return ids


def check_index(index: Tensor, num_samples: int) -> None:
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index must be an integer tensor [B'], got {index.dtype} {list(index.shape)}")
    checks.check_values_between("index", index, 0, num_samples)


def check_joined(parts: Sequence[Any], layouts: Sequence[Any]) -> None:
    """Several layouts of the same samples, and lengths that all samples share."""
    if not layouts:
        raise ValueError(f"there must be a layout among what is joined, got {list(parts)}")
    if any(isinstance(part, int) and part < 0 for part in parts):
        raise ValueError(f"lengths must not be negative, got {[part for part in parts if isinstance(part, int)]}")
    if len({layout.num_samples for layout in layouts}) > 1:
        raise ValueError(f"layouts must have the same samples, got {[layout.num_samples for layout in layouts]} of them")
    checks.check_same_device(**{f"layouts[{i}]": layout.lengths for i, layout in enumerate(layouts)})
    segments = sum(1 if isinstance(part, int) else part.num_segments for part in parts)
    if segments > MAX_SEGMENTS:
        raise ValueError(f"a layout has at most {MAX_SEGMENTS} segments, got {segments}")
