"""The compiled library: loaded once, after the schemas exist; its absence is a sentence, never an error."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

LIBRARY_PATH = Path(__file__).resolve().parent.parent / "_C.so"
OLDEST_TORCH = (2, 11)


@functools.cache
def load() -> str | None:
    """Load the compiled kernels; ``None`` when they are there, else why not."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        return f"the compiled library needs torch >= 2.11, this is {torch.__version__}"
    if not LIBRARY_PATH.exists():
        return f"the compiled library is not built ({LIBRARY_PATH.name} is missing): run `make setup` with a C++ compiler"
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except OSError as error:
        return f"the compiled library does not load: {error}"
    return None


@functools.cache
def missing(op: str, dispatch_key: str = "CPU") -> str | None:
    """Why ``vlkernels::op`` has no compiled kernel for ``CPU`` or ``CUDA`` here; ``None`` when it has one."""
    reason = load()
    if reason is not None:
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"vlkernels::{op}", dispatch_key):
        return f"the compiled library was built without a {dispatch_key} kernel for {op}"
    return None
