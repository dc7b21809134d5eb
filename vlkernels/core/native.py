"""The compiled library: loaded once, after the schemas exist; its absence is a sentence, never an error."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

LIBRARY_PATH = Path(__file__).resolve().parent.parent / "_C.so"
WHY_NOT_BUILT_PATH = LIBRARY_PATH.with_suffix(".missing")  # setup.py's reason, when there was one
OLDEST_TORCH = (2, 11)
CPU_ISA_LEVELS = ("baseline", "avx2", "avx512")

_LIBRARY = torch.library.Library("vlkernels", "FRAGMENT")
_LIBRARY.define("build_info() -> str")
_LIBRARY.define("limit_cpu_isa(str highest) -> str")


@functools.cache
def load() -> str | None:
    """Load the compiled kernels; ``None`` when they are there, else why not."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        return f"the compiled library needs torch >= 2.11, this is {torch.__version__}"
    if not LIBRARY_PATH.exists():
        reason = WHY_NOT_BUILT_PATH.read_text().splitlines()[0] if WHY_NOT_BUILT_PATH.exists() else "_C.so is missing"
        return f"the compiled library is not built ({reason}): run `make setup`"
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except OSError as error:
        return f"the compiled library does not load: {error}"
    return None


@torch.compiler.assume_constant_result  # a graph takes the answer: it cannot trace a look at the disk
def missing(op: str, dispatch_key: str = "CPU") -> str | None:
    """Why ``vlkernels::op`` has no compiled kernel for ``CPU`` or ``CUDA`` here; ``None`` when it has one."""
    return _missing(op, dispatch_key)


@functools.cache
def _missing(op: str, dispatch_key: str) -> str | None:
    reason = load()
    if reason is not None:
        return reason
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"vlkernels::{op}", dispatch_key):
        why = f" ({build_info()['cuda_missing']})" if dispatch_key == "CUDA" and build_info()["cuda_missing"] else ""
        return f"the compiled library was built without a {dispatch_key} kernel for {op}{why}"
    if dispatch_key == "CUDA" and torch.cuda.is_available():
        return not_compiled_for(torch.cuda.get_device_capability(), build_info()["cuda_architectures"].split())
    return None


def not_compiled_for(capability: tuple[int, int], architectures: list[str]) -> str | None:
    """Why machine code for these architectures does not run on a card of this compute capability; ``None`` when it does.

    Code runs on later cards of the same generation; with an ``a`` behind the number on that one alone.
    """
    for architecture in architectures:
        major, minor = divmod(int(architecture.rstrip("a")), 10)
        if capability == (major, minor) or (architecture.isdigit() and capability[0] == major and capability[1] > minor):
            return None
    return f"the CUDA kernels are compiled for sm_{', sm_'.join(architectures)}, the card is sm_{capability[0]}{capability[1]}"


def build_info() -> dict[str, str]:
    """What was compiled, and the instruction set the CPU kernels use here; empty without the compiled library."""
    return {} if load() is not None else json.loads(torch.ops.vlkernels.build_info())


def limit_cpu_isa(highest: str) -> str:
    """Run the CPU kernels of an older machine, so that a test can compare every copy; returns the level in use."""
    return torch.ops.vlkernels.limit_cpu_isa(highest)

