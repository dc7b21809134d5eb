"""The machine code of layer_norm's CUDA kernels: registers, spills, 16-byte accesses, occupancy."""

import pytest

from tests.architecture.cuda_code import ARCHITECTURES, kernels_named, needs_kernels

offline = pytest.importorskip("benchmarks.offline")

pytestmark = needs_kernels
OWN = r"^_ZN3vlk\d+"  # layer_norm's, and not another op's that ends on the same words
HELD = OWN + r"layer_norm_(forward|backward)_kernelI(f|6__half|13__nv_bfloat16)Li(\d+)ELi(\d+)E"
WIDE = OWN + r"layer_norm_backward_wide_kernelI(f|6__half|13__nv_bfloat16)Li(\d+)E"


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def held(architecture, direction, element, columns, vectors):
    wanted = (direction, element, str(columns), str(vectors))
    (found,) = [kernel for kernel, match in kernels_named(architecture, HELD) if match.groups() == wanted]
    return found


def test_nothing_spills(architecture):
    kernels = [kernel for kernel, _ in kernels_named(architecture, OWN + "layer_norm_|partial_rows_kernel")]
    assert kernels and not [kernel.name for kernel in kernels if kernel.stack]


def test_rows_move_by_16_bytes(architecture):
    """A row held by the forward: x, residual; z, y. By the backward: dy, z, dsum; dz, dx. Parameters come on top."""
    seen = 0
    for kernel, match in kernels_named(architecture, HELD):
        if match.group(3) == "1":
            continue
        vectors, seen = int(match.group(4)), seen + 1
        reads, writes = (2, 2) if match.group(1) == "forward" else (3, 2)
        assert kernel.count("LDG.E.128") >= reads * vectors, kernel.name
        assert kernel.count("STG.E.128") >= writes * vectors, kernel.name
        for narrow in ("LDG.E.U16", "LDG.E.S16", "STG.E.U16", "LDG.E.U8"):
            assert kernel.count(narrow) == 0, f"{kernel.name}: {narrow}"
    assert seen == 26


def test_wide_rows_move_by_16_bytes(architecture):
    wide = [kernel for kernel, match in kernels_named(architecture, WIDE) if match.group(2) != "1"]
    assert len(wide) == 3
    for kernel in wide:
        assert kernel.count("LDG.E.128") >= 5 and kernel.count("STG.E.128") >= 2, kernel.name
        assert kernel.count("LDG.E.U16") == kernel.count("STG.E.U16") == 0, kernel.name


@pytest.mark.parametrize("element, columns, vectors", [("f", 4, 6), ("13__nv_bfloat16", 8, 3), ("6__half", 8, 3)])
def test_rows_of_768_find_room(architecture, element, columns, vectors):
    """Five blocks of the forward on a multiprocessor, and all of the backward's 264 at once on 132 of them."""
    number = int(architecture.rstrip("a"))
    forward, backward = (held(architecture, way, element, columns, vectors) for way in ("forward", "backward"))
    assert offline.resident_programs(number, forward.registers, forward.shared, 4) >= 5
    dynamic = 4 * 768 * 4
    assert offline.resident_programs(number, backward.registers, backward.shared + dynamic, 4) >= 2
