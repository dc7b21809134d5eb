"""The machine code of the CUDA kernels in the compiled library; a test file per op reads what it says about its kernels."""

import functools
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from vlkernels.core import native

triton = pytest.importorskip("triton")

ARCHITECTURES = native.build_info().get("cuda_architectures", "").split()
WHY_NONE = native.load() or native.build_info()["cuda_missing"]
needs_kernels = pytest.mark.skipif(not ARCHITECTURES, reason=f"no CUDA kernels: {WHY_NONE}")


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


@functools.cache
def all_kernels(architecture):
    """Every kernel of the library for one architecture, such as "90a"."""
    tools, found = triton.knobs.nvidia, []
    with tempfile.TemporaryDirectory() as folder:
        output(tools.cuobjdump, "--extract-elf", f"sm_{architecture}", native.LIBRARY_PATH, folder=folder)
        for cubin in Path(folder).glob(f"*sm_{architecture}.cubin"):
            usage = output(tools.cuobjdump, "--dump-resource-usage", cubin)
            text = output(tools.nvdisasm, "-c", cubin)
            code = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\t\.section|\Z)", text, re.M | re.S))
            for name, line in re.findall(r"Function (\w+):\n\s*(.*)", usage):
                found.append(Kernel(name, dict(re.findall(r"(\w+):(\d+)", line)), code[name]))
    assert found
    return found


def kernels_named(architecture, pattern):
    """Those whose mangled name holds ``pattern``, with the match."""
    return [(kernel, match) for kernel in all_kernels(architecture) if (match := re.search(pattern, kernel.name))]
