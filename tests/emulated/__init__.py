"""CUDA kernels on the CPU: compiles a module of csrc/emulator when a test asks for it, and calls its kernels with tensors.

Beside it, a file per op stands for what ``csrc/binding/<op>.cpp`` does on a card: allocate, and launch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import mmap
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vlkernels.core import native
from vlkernels.core.dispatch import Implementation

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
SANITIZERS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
SANITIZED = os.environ.get("VLKERNELS_SANITIZED") == "1"  # set by sanitized_environment()


def refusal() -> str | None:
    """Why nothing can be emulated on this machine; ``None`` when it can."""
    if shutil.which("c++") is None:
        return "no C++ compiler: the CUDA kernels are not emulated"
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "the emulator of CUDA kernels switches stacks on Linux on x86-64 only"
    if importlib.util.find_spec("pybind11") is None:
        return "no pybind11: the CUDA kernels are not emulated"
    return None


@functools.cache
def module(source: Path, include: Path = CSRC, flags: tuple[str, ...] = ()) -> ModuleType:
    """The Python module that ``source`` defines as ``VLK_MODULE``, compiled unless it has been before."""
    if reason := refusal():
        pytest.skip(reason)
    flags += SANITIZERS if SANITIZED else ()
    name = f"emulated_{source.stem}_{_content(source, include, flags)}"
    library = ROOT / "build" / "emulator" / f"{name}.so"
    if not library.exists():
        _compile(source, include, (*flags, f"-DVLK_MODULE={name}"), library)
    spec = importlib.util.spec_from_file_location(name, library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def mutant(op: str, folder: Path, changes: Iterable[tuple[str, str, str]]) -> ModuleType:
    """The module of ``op`` from a copy of the sources in ``folder``, changed: (file, what it holds, what it holds instead)."""
    shutil.copytree(CSRC, folder)
    for name, before, after in changes:
        text = (folder / name).read_text()
        assert before in text, f"{name} does not hold {before!r} any more: renew the mutant"
        (folder / name).write_text(text.replace(before, after, 1))
    return module(folder / "emulator" / f"{op}.cpp", folder, ("-O0",))


def sanitized_environment() -> dict[str, str]:
    """For a process whose modules are compiled with sanitizers, which must be there before Python."""
    if reason := refusal():
        pytest.skip(reason)
    found = [subprocess.check_output(["c++", f"-print-file-name={n}"], text=True).strip() for n in ("libasan.so", "libubsan.so")]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("the C++ compiler has no sanitizers")
    preload = {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    return {**os.environ, **preload, "VLKERNELS_SANITIZED": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _content(source: Path, include: Path, flags: tuple[str, ...]) -> str:
    """A hash of everything that goes into a module."""
    digest = hashlib.sha256(repr((FLAGS, flags, sys.version)).encode())
    headers = (path for path in include.rglob("*") if path.suffix in (".h", ".cuh"))
    for path in (source, *sorted(headers)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(source: Path, include: Path, flags: tuple[str, ...], library: Path) -> None:
    import pybind11

    library.parent.mkdir(parents=True, exist_ok=True)
    fresh = library.with_suffix(f".{os.getpid()}.tmp")  # another worker may compile the same
    headers = (include, pybind11.get_include(), sysconfig.get_paths()["include"])
    command = ["c++", *FLAGS, *flags, *(f"-I{folder}" for folder in headers), str(source), "-o", str(fresh)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"
    fresh.replace(library)


def fields(**values: Any) -> dict[str, Any]:
    """What a module takes: addresses for tensors, pairs for parameters (``(tensor,)``), numbers as they are."""
    given = {}
    for name, value in values.items():
        if isinstance(value, tuple):
            (parameter,) = value
            if parameter is not None:
                given[name] = (parameter.data_ptr(), DTYPES[parameter.dtype])
        elif isinstance(value, Tensor):
            given[name] = value.data_ptr()
        elif isinstance(value, torch.dtype):
            given[name] = DTYPES[value]
        elif value is not None:
            given[name] = value
    return given


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, functional: ModuleType, kernels: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """``impl="cuda"`` of an op serves CPU tensors inside the block: its raw ops, by their names, run these functions."""
    native.load()  # its kernels first: those that are registered last serve
    cuda = Implementation("cuda", devices=("cpu",))
    monkeypatch.setattr(functional, "IMPLEMENTATIONS", (cuda, *functional.IMPLEMENTATIONS))
    library = torch.library.Library("vlkernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel takes another's place is the purpose
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def sparse(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory before they are written."""
    element = torch.empty(0, dtype=dtype).element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, rows * width * element, flags=flags), dtype=dtype).view(rows, width)
