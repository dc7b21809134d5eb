"""The machine code of the CUDA kernels in the compiled library: registers, spills, 16-byte accesses, occupancy."""

import re
import subprocess

import pytest

from vlkernels.core import native

triton = pytest.importorskip("triton")

from benchmarks import offline  # noqa: E402

ARCHITECTURES = native.build_info().get("cuda_architectures", "").split()
WHY_NONE = native.load() or native.build_info()["cuda_missing"]
pytestmark = pytest.mark.skipif(not ARCHITECTURES, reason=f"no CUDA kernels: {WHY_NONE}")

HELD = re.compile(r"layer_norm_(forward|backward)_kernelI(f|6__half|13__nv_bfloat16)Li(\d+)ELi(\d+)E")
WIDE = re.compile(r"layer_norm_backward_wide_kernelI(f|6__half|13__nv_bfloat16)Li(\d+)E")


class Kernel:
    def __init__(self, name, usage, code):
        self.name, self.code = name, code
        self.registers, self.stack, self.shared = (int(usage[key]) for key in ("REG", "STACK", "SHARED"))

    def count(self, opcode):
        return len(re.findall(rf"\b{re.escape(opcode)}(?![.\w])", self.code))


def output(tool, *arguments, folder=None):
    result = subprocess.run([tool.path, *map(str, arguments)], capture_output=True, text=True, cwd=folder)
    if result.returncode != 0:
        pytest.skip(f"triton's {tool.path.rsplit('/', 1)[1]} does not read this code: {result.stderr.strip()[:200]}")
    return result.stdout


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request, tmp_path_factory):
    """The kernels for one architecture, by their mangled names."""
    folder, tools = tmp_path_factory.mktemp(request.param), triton.knobs.nvidia
    output(tools.cuobjdump, "--extract-elf", f"sm_{request.param}", native.LIBRARY_PATH, folder=folder)
    found = {}
    for cubin in folder.glob(f"*sm_{request.param}.cubin"):
        usage = output(tools.cuobjdump, "--dump-resource-usage", cubin)
        code = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\t\.section|\Z)", output(tools.nvdisasm, "-c", cubin), re.M | re.S))
        for name, line in re.findall(r"Function (\w+):\n\s*(.*)", usage):
            found[name] = Kernel(name, dict(re.findall(r"(\w+):(\d+)", line)), code[name])
    assert found
    found["architecture"] = int(request.param.rstrip("a"))
    return found


def all_of(kernels):
    return [kernel for kernel in kernels.values() if isinstance(kernel, Kernel)]


def held(kernels, direction, element, columns, vectors):
    (found,) = [
        kernel
        for kernel in all_of(kernels)
        if (match := HELD.search(kernel.name)) and match.groups() == (direction, element, str(columns), str(vectors))
    ]
    return found


def test_nothing_spills(kernels):
    spilling = [kernel.name for kernel in all_of(kernels) if kernel.stack]
    assert not spilling


def test_rows_move_by_16_bytes(kernels):
    """A row held by the forward: x, residual; z, y. By the backward: dy, z, dsum; dz, dx. Parameters come on top."""
    seen = 0
    for kernel in all_of(kernels):
        match = HELD.search(kernel.name)
        if match is None or match.group(3) == "1":
            continue
        vectors, seen = int(match.group(4)), seen + 1
        reads, writes = (2, 2) if match.group(1) == "forward" else (3, 2)
        assert kernel.count("LDG.E.128") >= reads * vectors, kernel.name
        assert kernel.count("STG.E.128") >= writes * vectors, kernel.name
        for narrow in ("LDG.E.U16", "LDG.E.S16", "STG.E.U16", "LDG.E.U8"):
            assert kernel.count(narrow) == 0, f"{kernel.name}: {narrow}"
    assert seen == 26


def test_wide_rows_move_by_16_bytes(kernels):
    wide = [kernel for kernel in all_of(kernels) if (match := WIDE.search(kernel.name)) and match.group(2) != "1"]
    assert len(wide) == 3
    for kernel in wide:
        assert kernel.count("LDG.E.128") >= 5 and kernel.count("STG.E.128") >= 2, kernel.name
        assert kernel.count("LDG.E.U16") == kernel.count("STG.E.U16") == 0, kernel.name


@pytest.mark.parametrize("element, columns, vectors", [("f", 4, 6), ("13__nv_bfloat16", 8, 3), ("6__half", 8, 3)])
def test_rows_of_768_find_room(kernels, element, columns, vectors):
    """Five blocks of the forward on a multiprocessor, and all of the backward's 264 at once on 132 of them."""
    architecture = kernels["architecture"]
    forward, backward = (held(kernels, way, element, columns, vectors) for way in ("forward", "backward"))
    assert offline.resident_programs(architecture, forward.registers, forward.shared, 4) >= 5
    dynamic = 4 * 768 * 4
    assert offline.resident_programs(architecture, backward.registers, backward.shared + dynamic, 4) >= 2
