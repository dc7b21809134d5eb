"""Compile Triton kernels for a card that is not there, and read what the machine code says about itself."""

from __future__ import annotations

import collections
import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from vlkernels.core.triton_runtime import Launch

WARP_THREADS = 32
REGISTERS = 65536
REGISTER_UNIT = 256  # a warp's registers are given out in such units
MOST_PROGRAMS = 32
SHARED_RESERVED = 1024  # bytes a program's shared memory costs beside its own
LIMITS = {80: (64, 164), 86: (48, 100), 89: (48, 100), 90: (64, 228), 100: (64, 228), 120: (48, 100)}  # warps, KiB shared
OPCODES = (
    "HGMMA", "UTCHMMA", "HMMA", "FFMA", "MUFU", "LDGSTS", "UTMALDG", "LDG", "STG", "LDS", "STS", "LDSM", "STSM", "SHFL", "BAR",
    "LDL", "STL",
)  # fmt: skip
MEASURED = ("registers", "shared_bytes", "stack_bytes", "warps", "programs_per_sm", "occupancy", "instructions", "opcodes")
TENSOR_CORE = ("HGMMA", "UTCHMMA", "HMMA")


class AbsentCard:
    """Enough of a driver for ``JITFunction.warmup``; the architecture is the device number, so each has its own cache."""

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, WARP_THREADS)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cpu


@contextlib.contextmanager
def card(architecture: int) -> Iterator[None]:
    """Launches are compiled for ``architecture`` inside the block; none may run."""
    driver.set_active(AbsentCard(architecture))
    try:
        yield
    finally:
        driver.set_active(None)  # the next launch looks for a card again


def measure(launch: Launch, architecture: int) -> dict[str, Any]:
    """Registers, shared memory, local memory, instructions and occupancy of one kernel; compile inside :func:`card`."""
    compiled = launch.compile()  # what follows is named in MEASURED
    usage, opcodes = _read(compiled.asm["cubin"])
    registers, shared = usage["REG"], compiled.metadata.shared
    programs = resident_programs(architecture, registers, shared, compiled.metadata.num_warps)
    return {
        "registers": registers,
        "shared_bytes": shared,
        "stack_bytes": usage["STACK"],
        "warps": compiled.metadata.num_warps,
        "programs_per_sm": programs,
        "occupancy": round(programs * compiled.metadata.num_warps / LIMITS[architecture][0], 3),
        "instructions": sum(opcodes.values()),
        "opcodes": {name: opcodes[name] for name in OPCODES if opcodes[name]},
    }


def resident_programs(architecture: int, registers: int, shared: int, warps: int) -> int:
    """Programs that fit on a multiprocessor at once (CUDA's occupancy rule)."""
    most_warps, shared_kib = LIMITS[architecture]
    per_warp = -(-registers * WARP_THREADS // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // per_warp // warps
    by_shared = shared_kib * 1024 // (shared + SHARED_RESERVED)
    return min(most_warps // warps, by_registers, by_shared, MOST_PROGRAMS)


def local_memory_accesses(measured: Mapping[str, Any]) -> int:
    return measured["opcodes"].get("LDL", 0) + measured["opcodes"].get("STL", 0)


def tensor_core_instructions(measured: Mapping[str, Any]) -> int:
    return sum(measured["opcodes"].get(name, 0) for name in TENSOR_CORE)


def _read(cubin: bytes) -> tuple[dict[str, int], collections.Counter[str]]:
    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools.cuobjdump.path, "--dump-resource-usage", file.name)
        code = _output(tools.nvdisasm.path, "-c", file.name)
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\d+\s+)?([A-Z0-9_]+)", code, re.M)
    assert opcodes, "nvdisasm does not read this architecture"
    return numbers, collections.Counter(opcodes)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
