"""The machine code of packing's CUDA kernels: spills, accesses, occupancy."""

import pytest

from tests.architecture.cuda_code import ARCHITECTURES, kernels_named, needs_kernels

offline = pytest.importorskip("benchmarks.offline")

pytestmark = needs_kernels
COPY = r"copy_rows_kernelI(h|t|j|m|5uint4)NS_\d+(JoinSegments|SplitSegments|TakeRows)E"
SUMS = r"\d(take_rows_backward|mean_segment_backward|mean_segment)_kernelI(f|6__half|13__nv_bfloat16)Li(\d+)E"
WIDTHS = {"h": "E.U8", "t": "E.U16", "j": "E", "m": "E.64", "5uint4": "E.128"}
WARPS = 8  # of a block


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def warps_on_a_multiprocessor(architecture, kernel):
    number = int(architecture.rstrip("a"))
    return WARPS * offline.resident_programs(number, kernel.registers, kernel.shared, WARPS)


def test_copies_move_whole_units_four_at_once(architecture):
    found = kernels_named(architecture, COPY)
    assert len(found) == 15
    for kernel, match in found:
        assert kernel.stack == 0, kernel.name
        stores = {unit: kernel.count(f"STG.{width}") + kernel.count(f"ST.{width}") for unit, width in WIDTHS.items()}
        assert stores.pop(match.group(1)) >= 4 and not any(stores.values()), kernel.name
        if match.group(1) == "5uint4":
            assert kernel.count("LDG.E.128") >= 4 and kernel.count("STG.E.128") >= 4, kernel.name


def test_sums_read_16_bytes_and_four_rows_at_once(architecture):
    found = [(kernel, match.group(1)) for kernel, match in kernels_named(architecture, SUMS) if match.group(3) != "1"]
    assert len(found) == 9
    for kernel, op in found:
        assert kernel.stack == 0, kernel.name
        assert kernel.count("LDG.E.128") >= 4, kernel.name
        if op != "mean_segment":  # whose few means are written column by column
            assert kernel.count("STG.E.128") >= 4, kernel.name


def test_enough_bytes_are_asked_for(architecture):
    """Rows of 1,536 bytes by a warp each: 48 KiB on their way to a multiprocessor in a copy."""
    for kernel, _ in kernels_named(architecture, COPY):
        assert warps_on_a_multiprocessor(architecture, kernel) >= 32, kernel.name
    for kernel, _ in kernels_named(architecture, SUMS):
        assert warps_on_a_multiprocessor(architecture, kernel) >= 24, kernel.name
