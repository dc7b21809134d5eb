"""Builds vlkernels/_C.so through CMake where torch, a C++ compiler and CMake are present.

The install never fails for want of them: everything runs on the reference without the library, and the reason
is announced and kept in vlkernels/_C.missing, where `python -m vlkernels` finds it. VLKERNELS_REQUIRE_BUILD=1
turns any reason into an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "native"
OLDEST_TORCH = (2, 11)
# Finds torch without importing it, which would take seconds.
PROBE = (
    "import importlib.metadata, importlib.util\n"
    "print(importlib.util.find_spec('torch').submodule_search_locations[0])\n"
    "print(importlib.metadata.version('torch'))"
)


class NotBuilt(Exception):
    """Why there is no compiled library."""


def find_torch() -> tuple[str, dict[str, str]]:
    """The folder of the torch package, and the environment in which Python sees it.

    pip hides the installed packages from a build through PYTHONPATH: without it torch comes back into sight.
    """
    plain = dict(os.environ)
    unhidden = {name: value for name, value in plain.items() if name != "PYTHONPATH"}
    for environment in (plain, unhidden):
        probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment)
        if probe.returncode == 0:
            folder, version = probe.stdout.split("\n")[:2]
            if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
                raise NotBuilt(f"torch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}")
            return folder, environment
    raise NotBuilt("this Python has no torch (install it first, then vlkernels with --no-build-isolation)")


def find_tool(*names: str, why: str) -> str:
    beside_python = str(Path(sys.executable).parent)
    for name in names:
        found = shutil.which(name, path=os.pathsep.join([beside_python, os.environ.get("PATH", os.defpath)]))
        if found:
            return found
    raise NotBuilt(why)


def build_library(destination: Path) -> None:
    compilers = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    find_tool(*compilers, why=f"no C++ compiler (looked for {', '.join(compilers)})")
    cmake = find_tool("cmake", why="no cmake (pip install cmake)")
    torch_folder, environment = find_torch()
    with one_build_at_a_time():
        for line in configure(cmake, torch_folder, environment).splitlines():
            if line.startswith("-- vlkernels: "):
                print(line.removeprefix("-- "))
        jobs = str(os.cpu_count() or 1)
        run([cmake, "--build", str(BUILD), "--parallel", jobs], environment)
        install(BUILD / "_C.so", destination)


def configure(cmake: str, torch_folder: str, environment: dict[str, str]) -> str:
    command = [cmake, "-S", str(ROOT), "-B", str(BUILD), f"-DVLK_TORCH_DIR={torch_folder}"]
    if (BUILD / "CMakeCache.txt").exists():
        try:
            return run(command, environment)
        except NotBuilt:
            shutil.rmtree(BUILD)  # the tree has moved, or a compiler is gone: begin again
    with contextlib.suppress(NotBuilt):  # CMake's default, make, does as well
        command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', why='no ninja')}"]
    return run(command, environment)


def install(built: Path, destination: Path) -> None:
    if destination.exists() and destination.read_bytes() == built.read_bytes():
        return
    # Replaced, never rewritten: a running process has the old file mapped.
    fresh = destination.with_suffix(f".{os.getpid()}.tmp")
    shutil.copy2(built, fresh)
    fresh.replace(destination)


@contextlib.contextmanager
def one_build_at_a_time() -> Iterator[None]:
    BUILD.parent.mkdir(exist_ok=True)
    with open(BUILD.parent / "native.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: list[str], environment: dict[str, str]) -> str:
    result = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if result.returncode != 0:
        raise NotBuilt(f"`{' '.join(command)}` failed:\n{result.stdout.strip()}")
    return result.stdout


def announce(reason: str) -> None:
    """Say it where it is seen: pip swallows a successful build's output, but lately forwards its warnings."""
    message = (
        f"the compiled kernels were NOT built: {reason}\n"
        "*** Everything works on the reference implementations, more slowly. `make build` tries again."
    )
    warnings.warn(message, stacklevel=1)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(f"\n*** vlkernels: {message}\n")


class BuildNative(build_ext):
    """Puts _C.so, or _C.missing with the reason, into the package: here if in place, else in the wheel."""

    def package_folder(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib)) / "vlkernels"

    def run(self) -> None:
        package = self.package_folder()
        package.mkdir(parents=True, exist_ok=True)
        library, missing = package / "_C.so", package / "_C.missing"
        try:
            build_library(library)
        except NotBuilt as reason:
            if os.environ.get("VLKERNELS_REQUIRE_BUILD") == "1":
                message = f"vlkernels: the compiled kernels were required and not built: {reason}"
                raise SystemExit(message) from None
            library.unlink(missing_ok=True)
            missing.write_text(f"{reason}\n")
            announce(str(reason))
            return
        missing.unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.package_folder().glob("_C.*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("vlkernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},  # no Python ABI in it: one wheel for all of them
)
