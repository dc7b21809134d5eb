"""What is made from tensors and kept while they live unchanged, so that the layers of a model share it.

It is kept only where nothing but PyTorch, which counts the changes of a tensor, can write those tensors, and where its own
memory is nobody else's:

* for an eager call. A compiled graph uses a buffer again for another value, the same tensor of the same version;
* on the default stream of the device. CUDA graphs are captured, and warmed up with memory that belongs to them, on other
  streams; a replay writes the captured tensors without counting. So neither goes into a graph what was made outside, nor the
  reverse, and what was made on a stream is read on it;
* for tensors that count their changes: those of inference mode do not.

Elsewhere it is made anew. Not seen are writes that PyTorch does not count: through ``tensor.data``, by a collective, or by the
replay of a graph into tensors that eager calls read too; such a call takes a fresh copy of them.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlkernels.core import library
from vlkernels.core.layout import lasting

Made = TypeVar("Made")

MOST_KEPT = 64
DEFAULT_STREAM = 0

# Threads share it, for a backward runs in its own. A fork inherits it, but no lock that a thread it lacks may hold.
_made: dict[tuple[Any, ...], tuple[tuple[weakref.ref[Tensor] | None, ...], Any]] = {}
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(before=lambda: _lock.acquire(), after_in_parent=lambda: _lock.release(), after_in_child=_renew_lock)


def kept(name: tuple[Any, ...], tensors: Sequence[Tensor | None], make: Callable[[], Made]) -> Made:
    """``make()``, or what it gave for the same name and the same tensors, unchanged."""
    present = [t for t in tensors if t is not None]
    if not _may_keep(present):
        return make()
    key = (*name, *(None if t is None else (id(t), t._version) for t in tensors))
    found = _made.get(key)
    if found is not None and all(t is None or r() is t for r, t in zip(found[0], tensors)):
        return found[1]
    made = lasting(make)
    with _lock:
        _made[key] = tuple(None if t is None else weakref.ref(t) for t in tensors), made
        if len(_made) > MOST_KEPT:
            del _made[next(iter(_made))]
    return made


def _may_keep(tensors: Sequence[Tensor]) -> bool:
    if not library.eager_call or any(t.is_inference() for t in tensors):
        return False
    device = tensors[0].device
    return device.type != "cuda" or torch.cuda.current_stream(device).cuda_stream == DEFAULT_STREAM
