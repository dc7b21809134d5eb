"""The floor everything stands on: the pins, the compiled library, and an install that cannot fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vlkernels.core import native

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "native"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") and shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")),
    reason="no C++ compiler or no cmake",
)
needs_library = pytest.mark.skipif(native.load() is not None, reason=str(native.load()))


# --- pins -------------------------------------------------------------------------------------------------


def project() -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def locked(python: str) -> dict[str, str]:
    """Package -> version that requirements.lock pins for a Python on Linux."""
    environment = {"python_version": python, "platform_machine": "x86_64"}
    pins = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = canonicalize_name(requirement.name)
            assert name not in pins, f"{name} is pinned twice for Python {python}"
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            pins[name] = pin.version
    return pins


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_what_the_project_needs(python):
    pins, table = locked(python), project()["project"]
    extras = table["optional-dependencies"]
    for text in [*table["dependencies"], *extras["build"], *extras["test"], *extras["uniter"]]:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        assert version and requirement.specifier.contains(version), f"{text}: the lock has {version}"
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_serves_cpu_and_cuda_machines(python):
    cuda = [name for name in locked(python) if re.match(r"nvidia-(?!ml-py)|cuda-", name)]
    assert not cuda, f"torch brings these itself where it needs them: {cuda}"


def test_the_lock_names_no_host():
    assert "://" not in (ROOT / "requirements.lock").read_text()


def test_an_isolated_build_never_fetches_torch():
    assert not [text for text in project()["build-system"]["requires"] if "torch" in text]


# --- the compiled library ---------------------------------------------------------------------------------


def tool_output(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"no {command[0]}")
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


@needs_library
def test_the_library_depends_on_no_python_and_no_cuda():
    dynamic = tool_output("readelf", "-d", native.LIBRARY_PATH)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\]", dynamic))
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libdl.so.2", "librt.so.1"}
    others = {name for name in needed - system if not name.startswith(("ld-linux", "libpthread"))}
    assert others == {"libtorch_cpu.so"}
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


@needs_library
def test_the_library_uses_the_stable_abi_alone():
    undefined = tool_output("nm", "-D", "--undefined-only", native.LIBRARY_PATH)
    mangled = [name for name in undefined.split() if re.match(r"_ZNK?(2at|3c10|5torch|6caffe2)", name)]
    assert not mangled, f"C++ symbols of one torch version: {mangled}"


def shared_inline_functions(objects: list[Path], level: str) -> list[str]:
    """Functions of a CPU kernel that the linker would merge with the copies for other instruction sets."""
    shared = []
    for file in objects:
        for line in tool_output("nm", file).splitlines():
            kind, name = line.split()[-2:]
            if kind in "WVu" and f"3vlk{len(level)}{level}" not in name:
                shared.append(f"{file.name}: {name}")
    return shared


@needs_library
@pytest.mark.parametrize("level", native.CPU_ISA_LEVELS)
def test_no_function_is_shared_between_instruction_sets(level):
    folder = BUILD / "CMakeFiles" / f"cpu_{level}.dir"
    if not folder.exists():
        pytest.skip("this library was compiled elsewhere, or for one instruction set")
    assert not shared_inline_functions(sorted(folder.rglob("*.o")), level)


@needs_compiler
def test_a_shared_inline_function_would_be_found(tmp_path):
    source = tmp_path / "kernel_cpu.cpp"
    source.write_text(
        "__attribute__((noinline)) inline int helper() { return 1; }\n"
        "namespace vlk::avx2 { __attribute__((noinline)) inline int own() { return 2; }\n"
        "int kernel() { return helper() + own(); } }\n"
    )
    subprocess.run(["c++", "-std=c++17", "-c", source, "-o", tmp_path / "kernel.o"], check=True)
    assert shared_inline_functions([tmp_path / "kernel.o"], "avx2") == ["kernel.o: _Z6helperv"]


@needs_library
def test_the_library_says_what_it_is_and_can_run_older_copies():
    best = native.build_info()["cpu_isa"]
    try:
        assert native.limit_cpu_isa("baseline") == native.build_info()["cpu_isa"] == "baseline"
    finally:
        assert native.limit_cpu_isa("avx512") == best
    with pytest.raises(RuntimeError, match="baseline, avx2 or avx512, got sse2"):
        native.limit_cpu_isa("sse2")


# --- CMake ------------------------------------------------------------------------------------------------

PROBE_HEADER = """
    #include "primitives/cpu_isa.h"
    VLK_DECLARE_CPU(int compiled_level();)
"""
PROBE_KERNEL = """
    #include "probe/probe_cpu.h"
    namespace vlk::VLK_ISA {
    int compiled_level() {
    #if defined(__AVX512BW__)
        return 2;
    #elif defined(__AVX2__)
        return 1;
    #else
        return 0;
    #endif
    }
    }
"""
PROBE_BINDING = """
    #include "binding/binding.h"
    #include "probe/probe_cpu.h"
    namespace vlk { namespace {
    int64_t level(const Tensor& rows) {
        std::vector<int64_t> seen(rows.numel(), -1);
        parallel_rows(rows.numel(), 1 << 20, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) seen[i] = VLK_CPU(compiled_level)();
        });
        return std::equal(seen.begin() + 1, seen.end(), seen.begin()) ? seen[0] : -1;
    }
    STABLE_TORCH_LIBRARY_IMPL(vlkernels, CPU, m) { m.impl("compiled_level", TORCH_BOX(&level)); }
    } }
"""
PROBE_RUN = """
    import sys, torch
    library = torch.library.Library("vlkernels", "FRAGMENT")
    library.define("build_info() -> str")
    library.define("limit_cpu_isa(str highest) -> str")
    library.define("compiled_level(Tensor rows) -> int")
    torch.ops.load_library(sys.argv[1])
    ops = torch.ops.vlkernels
    for level in ("baseline", "avx2", "avx512"):
        print(ops.limit_cpu_isa(level), ops.compiled_level(torch.zeros(64)))
"""


@needs_compiler
def test_a_new_op_is_three_files(tmp_path):
    csrc = tmp_path / "csrc"
    for folder, pattern in (("binding", "binding.h"), ("binding", "library.cpp"), ("primitives", "cpu_isa.*")):
        (csrc / folder).mkdir(parents=True, exist_ok=True)
        for file in (ROOT / "csrc" / folder).glob(pattern):
            shutil.copy(file, csrc / folder)
    shutil.copy(ROOT / "csrc" / "primitives" / "dtype.h", csrc / "primitives")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    (csrc / "probe").mkdir()
    (csrc / "probe" / "probe_cpu.h").write_text(textwrap.dedent(PROBE_HEADER))
    (csrc / "probe" / "probe_cpu.cpp").write_text(textwrap.dedent(PROBE_KERNEL))
    (csrc / "binding" / "probe.cpp").write_text(textwrap.dedent(PROBE_BINDING))

    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    build = tmp_path / "build"
    torch_folder = Path(torch.__file__).parent
    for arguments in (["-S", tmp_path, "-B", build, f"-DVLK_TORCH_DIR={torch_folder}"], ["--build", build]):
        result = subprocess.run([cmake, *arguments], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    run = [sys.executable, "-c", textwrap.dedent(PROBE_RUN), build / "_C.so"]
    printed = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()
    assert printed[0] == "baseline 0"
    order = {level: index for index, level in enumerate(native.CPU_ISA_LEVELS)}
    assert all(order[name] == int(level) for name, level in (line.split() for line in printed))


# --- setup.py ---------------------------------------------------------------------------------------------


def build_ext(destination: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    base = {key: value for key, value in os.environ.items() if key not in ("CXX", "VLKERNELS_REQUIRE_BUILD")}
    return subprocess.run(
        [sys.executable, ROOT / "setup.py", "-q", "build_ext", "--build-lib", destination],
        cwd=ROOT, env={**base, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_without_a_compiler_the_install_succeeds_and_says_so(tmp_path):
    result = build_ext(tmp_path, PATH=str(tmp_path))
    assert result.returncode == 0
    assert "NOT built: no C++ compiler" in result.stderr
    assert (tmp_path / "vlkernels" / "_C.missing").read_text().startswith("no C++ compiler")
    assert not (tmp_path / "vlkernels" / "_C.so").exists()


def test_a_required_build_fails_instead(tmp_path):
    result = build_ext(tmp_path, PATH=str(tmp_path), VLKERNELS_REQUIRE_BUILD="1")
    assert result.returncode == 1
    assert "were required and not built: no C++ compiler" in result.stderr


@needs_compiler
def test_a_torch_that_is_too_old_is_named(tmp_path):
    site = tmp_path / "site"
    (site / "torch").mkdir(parents=True)
    (site / "torch" / "__init__.py").touch()
    (site / "torch-2.9.0.dist-info").mkdir()
    (site / "torch-2.9.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n")
    result = build_ext(tmp_path / "wheel", PYTHONPATH=str(site))
    assert result.returncode == 0
    assert "NOT built: torch 2.9.0 is older than 2.11" in result.stderr


def test_every_target_of_the_makefile_is_a_command():
    if shutil.which("make") is None:
        pytest.skip("no make")
    targets = ("pretrain", "test", "test-gpu", "bench", "bench-gpu", "build")
    for target in targets:
        plan = subprocess.run(
            ["make", "--dry-run", "SETUP=0", f"PYTHON={sys.executable}", target],
            cwd=ROOT, check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert ".venv" not in plan.stdout.replace(sys.executable, "python"), plan.stdout


def test_continuous_integration_runs_the_test_target():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("\nmake test")
