"""The machine code of packing's CUDA kernels."""

import pytest

from tests.architecture.cuda_code import ARCHITECTURES, matching, needs_kernels

pytestmark = [needs_kernels, pytest.mark.parametrize("architecture", ARCHITECTURES)]

COPY = r"copy_rows_kernelI(h|t|j|m|5uint4)NS_\d+(JoinSegments|SplitSegments|TakeRows)E"
SUMS = r"(take_rows_backward|mean_segment_backward|mean_segment)_kernelI(f|6__half|13__nv_bfloat16)Li(\d+)E"
ACCESS = {"h": "U8", "t": "U16", "j": "", "m": "64", "5uint4": "128"}
WARPS = 8  # of a block


def opcode(kind, unit):
    return f"{kind}.E.{ACCESS[unit]}".rstrip(".")


def test_copies_are_by_the_whole_unit_and_four_at_once(architecture):
    found = matching(architecture, COPY)
    assert len(found) == 15
    for kernel, (unit, _) in found:
        assert kernel.stack == 0, kernel.name
        assert kernel.count(opcode("STG", unit)) >= 4, kernel.name
        for other in ACCESS:
            if other != unit:
                assert kernel.count(opcode("STG", other)) == 0, kernel.name
        if unit == "5uint4":
            assert kernel.count("LDG.E.128") >= 4, kernel.name


def test_sums_read_16_bytes_and_four_rows_at_once(architecture):
    found = [(kernel, op) for kernel, (op, _, columns) in matching(architecture, SUMS) if columns != "1"]
    assert len(found) == 9
    for kernel, op in found:
        assert kernel.stack == 0, kernel.name
        assert kernel.count("LDG.E.128") >= 4, kernel.name
        if op != "mean_segment":  # whose few means are written column by column
            assert kernel.count("STG.E.128") >= 4, kernel.name


def test_enough_bytes_are_asked_for(architecture):
    """Rows of 1,536 bytes, by a warp each: at least 32 of them, 48 KiB, on their way to a multiprocessor."""
    for kernel, (unit, *_) in matching(architecture, COPY):
        assert kernel.resident_blocks(WARPS) * WARPS >= 32, kernel.name
    for kernel, _ in matching(architecture, SUMS):
        assert kernel.resident_blocks(WARPS) * WARPS >= 24, kernel.name
