"""Attention over padded ``[B, H, L, K]`` tensors, as model code calls it; the padding becomes a layout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vlkernels.core.layout import MAX_SEGMENTS, SegmentLayout, lasting
from vlkernels.core.mask import SegmentMask
from vlkernels.ops.attention import attention
from vlkernels.ops.packing import take_rows

CAUSAL = SegmentMask.causal()

Made = TypeVar("Made")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    padding: Padding | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``[B, Lq, H, K]`` from q ``[B, H, Lq, K]`` and k, v ``[B, Hkv, Lk, K]``; a query that sees nothing gives 0.

    ``padding`` hides keys; every query is computed. With ``causal`` the queries are the last of the keys' own positions: they
    see what is before them, and those in the padding, which nobody reads, are left out and give 0.
    ``bias`` ``[B or 1, H or 1, Lq, Lk]`` is added by padded positions.
    """
    q, k, v = _as_autocast_does(q, k, v)
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    options = {"softmax_scale": softmax_scale, "dropout_p": dropout_p}
    if padding is None:
        out = attention(*rows, **_whole(batch, queries, keys, causal, q.device), bias=bias, **options)
    elif bias is None:
        out = _real_rows(*rows, padding, queries, causal, options)
    elif padding.has_runs() and (queries == keys or not causal):
        out = attention(*rows, **padding.runs(queries, causal), bias=bias, **options)
    else:
        hidden = padding.hide(bias)
        out = attention(*rows, **_whole(batch, queries, keys, causal, q.device), bias=hidden, **options)
    return out.unflatten(0, (batch, queries))


class Padding:
    """Which keys ``real`` (bool ``[B, Lk]``, True: is there) keeps, in the forms that attention reads; made once per mask."""

    def __init__(self, real: Tensor):
        self.real = real.clone()  # a view would keep the mask alive that this is kept for
        self._rows: dict[int, InPlace | Packed] = {}
        self._runs: dict[tuple[int, bool], dict[str, Any]] = {}

    def rows(self, last: int) -> InPlace | Packed:
        """The real ones of the last positions: gathered, unless the host sees that they stand at the front."""
        if last not in self._rows:
            self._rows[last] = lasting(lambda: _find_rows(self.real[:, self.real.shape[1] - last :]))
        return self._rows[last]

    def has_runs(self) -> bool:
        """Whether the keys are few alternating runs of hidden and real ones, which keep the positions that a bias counts by.

        On a device this waits for their lengths, once per mask: a bias that takes the padding in would be an array
        ``[B, H, Lq, Lk]`` in every layer.
        """
        if torch.compiler.is_compiling() or _is_captured(self.real.device):
            return False
        return self._run_layout is not None

    @functools.cached_property
    def _run_layout(self) -> SegmentLayout | None:
        lengths = _run_lengths(self.real)
        if lengths.shape[1] > MAX_SEGMENTS:
            return None
        return lasting(lambda: SegmentLayout(lengths).to(self.real.device))

    def runs(self, queries: int, causal: bool) -> dict[str, Any]:
        """Layouts and table for tensors that keep their padding; queries see the real keys, or those before them."""
        key = queries, causal
        if key not in self._runs:
            keys = self._run_layout
            if causal:
                self._runs[key] = {"layout": keys, "mask": _real_and_before(keys.num_segments)}
            else:
                layout = whole_layout(keys.num_samples, queries, keys.device)
                self._runs[key] = {"layout": layout, "kv_layout": keys, "mask": _real(keys.num_segments)}
        return self._runs[key]

    def hide(self, bias: Tensor) -> Tensor:
        return torch.where(self.real[:, None, None, :], bias, -torch.inf)


class InPlace:
    """Real rows at the front of every sample of a padded tensor, read where they are."""

    def __init__(self, lengths: Tensor, length: int):
        self.layout = SegmentLayout.padded(lengths, length)

    def take(self, x: Tensor) -> Tensor:
        return x

    def put(self, x: Tensor) -> Tensor:
        return x


class Packed:
    """The real rows of a padded tensor, gathered without asking the host anything; -1 is nobody."""

    def __init__(self, real: Tensor):
        batch, length = real.shape
        flat = real.flatten()
        order = torch.argsort(flat.logical_not(), stable=True)
        self._rows = torch.where(flat[order], order, -1)
        self._places = torch.where(flat, flat.cumsum(0) - 1, -1)
        bounds = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        self.layout = SegmentLayout.from_cu_seqlens(bounds, max_seqlen=length, num_tokens=batch * length)

    def take(self, x: Tensor) -> Tensor:
        return take_rows(x, self._rows)

    def put(self, x: Tensor) -> Tensor:
        return take_rows(x, self._places)


def _find_rows(real: Tensor) -> InPlace | Packed:
    if real.device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = real.sum(1)
        if torch.equal(real, torch.arange(real.shape[1]) < lengths[:, None]):
            return InPlace(lengths, real.shape[1])
    return Packed(real)


def _real_rows(
    q: Tensor, k: Tensor, v: Tensor, padding: Padding, queries: int, causal: bool, options: dict[str, Any]
) -> Tensor:
    """Attention to the real keys alone; with ``causal`` from the real queries alone."""
    keys = padding.rows(padding.real.shape[1])
    k, v = keys.take(k), keys.take(v)
    if not causal:
        layout = whole_layout(len(padding.real), queries, q.device)
        return attention(q, k, v, layout=layout, kv_layout=keys.layout, **options)
    own = padding.rows(queries)
    kv_layout = None if own is keys else keys.layout
    return own.put(attention(own.take(q), k, v, layout=own.layout, kv_layout=kv_layout, mask=CAUSAL, **options))


def _whole(batch: int, queries: int, keys: int, causal: bool, device: torch.device) -> dict[str, Any]:
    """Nothing is padded; a causal table aligns the ends."""
    layout = whole_layout(batch, queries, device)
    kv_layout = None if queries == keys else whole_layout(batch, keys, device)
    return {"layout": layout, "kv_layout": kv_layout, "mask": CAUSAL if causal else None}


def whole_layout(batch: int, length: int, device: torch.device) -> SegmentLayout:
    """``[B, L]`` tensors without padding; kept, so that calls of one shape share what is made from it."""
    if torch.compiler.is_compiling() or _is_captured(device):
        return _new_whole_layout(batch, length, device)
    return _kept_whole_layout(batch, length, device)


def _new_whole_layout(batch: int, length: int, device: torch.device) -> SegmentLayout:
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    return SegmentLayout.from_cu_seqlens(bounds, max_seqlen=length, num_tokens=batch * length)


@functools.lru_cache(maxsize=64)
def _kept_whole_layout(batch: int, length: int, device: torch.device) -> SegmentLayout:
    return lasting(lambda: _new_whole_layout(batch, length, device))


@functools.cache
def _real(runs: int) -> SegmentMask:
    """One query segment over runs of keys, of which every second one is real."""
    return SegmentMask([["full" if c % 2 else "none" for c in range(runs)]])


@functools.cache
def _real_and_before(runs: int) -> SegmentMask:
    def cell(row: int, column: int) -> str:
        return "none" if not row % 2 or not column % 2 or column > row else "causal" if column == row else "full"

    return SegmentMask([[cell(r, c) for c in range(runs)] for r in range(runs)])


def _run_lengths(real: Tensor) -> Tensor:
    """int ``[B, R]`` on the host: hidden, real, hidden, ... keys of every sample, zeros where a sample has fewer runs."""
    run = real.cpu().int().diff(dim=1, prepend=torch.zeros(len(real), 1, dtype=torch.int32)).ne(0).cumsum(1)
    runs = max(2, int(run.max()) + 1 if run.numel() else 0)
    return torch.zeros(len(real), runs, dtype=torch.int64).scatter_add_(1, run, torch.ones_like(run))


def _as_autocast_does(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``F.scaled_dot_product_attention`` runs in autocast's dtype."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device_type)) for x in tensors)


def _is_captured(device: torch.device) -> bool:
    """A captured graph is replayed with other masks in the same tensors: it makes everything itself, and leaves nothing."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def kept(source: Tensor, name: Hashable, make: Callable[[], Made]) -> Made:
    """``make()``, kept while ``source`` lives unchanged: the layers of a model share what is made from one mask."""
    if torch.compiler.is_compiling() or _changes_uncounted(source) or source.requires_grad or _is_captured(source.device):
        return make()
    version, made = _made.get(source, (None, None))
    if version != source._version:
        version, made = _made[source] = source._version, {}
    if name not in made:
        made[name] = lasting(make)
    return made[name]


def _changes_uncounted(source: Tensor) -> bool:
    """Whether PyTorch would not see a write: in inference mode, or into memory that is another library's (NumPy's)."""
    return source.is_inference() or not source.untyped_storage().resizable()
