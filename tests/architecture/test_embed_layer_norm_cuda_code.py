"""The machine code of embed_layer_norm's CUDA kernels: registers, spills, 16-byte accesses, occupancy."""

import re

import pytest

from tests.architecture.cuda_code import ARCHITECTURES, kernels_named, needs_kernels

offline = pytest.importorskip("benchmarks.offline")

pytestmark = needs_kernels
OWN = r"embed_layer_norm_|table_|long_rows_|find_rows_|count_digits_|move_pairs_|running_sums_"
ELEMENT = r"(f|6__half|13__nv_bfloat16)"
HELD = rf"embed_layer_norm_(forward|backward)_kernelI{ELEMENT}Li(\d+)ELi(\d+)E"
WIDE = rf"embed_layer_norm_backward_wide_kernelI{ELEMENT}Li(\d+)E"
TABLES = rf"(table_rows|table_pieces|long_rows)_kernelI{ELEMENT}Li(\d+)E"
NARROW = ("LDG.E.U16", "LDG.E.S16", "STG.E.U16", "LDG.E.U8")


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def held(architecture, direction, element, columns, vectors):
    wanted = (direction, element, str(columns), str(vectors))
    (found,) = [kernel for kernel, match in kernels_named(architecture, HELD) if match.groups() == wanted]
    return found


def test_nothing_spills(architecture):
    kernels = [kernel for kernel, _ in kernels_named(architecture, OWN)]
    assert len(kernels) == 71
    assert not [kernel.name for kernel in kernels if kernel.stack]


def test_rows_move_by_16_bytes(architecture):
    """The forward reads a row of a table and writes y; the backward reads dy too, and writes dz. Parameters come on top."""
    seen = 0
    for kernel, match in kernels_named(architecture, HELD):
        if match.group(3) == "1":
            continue
        vectors, seen = int(match.group(4)), seen + 1
        reads = 1 if match.group(1) == "forward" else 2
        assert kernel.count("LDG.E.128") >= reads * vectors and kernel.count("STG.E.128") >= vectors, kernel.name
        assert not [opcode for opcode in NARROW if kernel.count(opcode)], kernel.name
    assert seen == 26


@pytest.mark.parametrize("pattern, count, least", [(WIDE, 3, 2), (TABLES, 9, 1)])
def test_wide_rows_and_slabs_move_by_16_bytes(architecture, pattern, count, least):
    """What is read of a wide row: dy and a table's row; what a warp sums: tokens' rows, or pieces."""
    kernels = [kernel for kernel, match in kernels_named(architecture, pattern) if match.groups()[-1] != "1"]
    assert len(kernels) == count
    for kernel in kernels:
        assert kernel.count("LDG.E.128") >= least and kernel.count("STG.E.128") >= 1, kernel.name
        assert not [opcode for opcode in NARROW if kernel.count(opcode)], kernel.name


@pytest.mark.parametrize("element, columns, vectors", [("f", 4, 6), ("13__nv_bfloat16", 8, 3), ("6__half", 8, 3)])
def test_rows_of_768_find_room(architecture, element, columns, vectors):
    """Five blocks of the forward on a multiprocessor, and all of the backward's 264 at once on 132 of them."""
    number = int(architecture.rstrip("a"))
    forward, backward = (held(architecture, way, element, columns, vectors) for way in ("forward", "backward"))
    assert offline.resident_programs(number, forward.registers, forward.shared, 4) >= 5
    assert offline.resident_programs(number, backward.registers, backward.shared + 4 * 768 * 4, 4) >= 2


def test_a_multiprocessor_sums_many_table_rows_at_once(architecture):
    """The rows of a table are read with four accesses under way in each of 32 warps or more."""
    for kernel, match in kernels_named(architecture, TABLES):
        if match.group(1) == "table_rows":
            assert offline.resident_programs(int(architecture.rstrip("a")), kernel.registers, kernel.shared, 8) >= 4
