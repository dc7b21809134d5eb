"""The machine code of patchify's CUDA kernels: spills, accesses, occupancy."""

import pytest

from tests.architecture.cuda_code import ARCHITECTURES, kernels_named, needs_kernels

offline = pytest.importorskip("benchmarks.offline")

pytestmark = needs_kernels
FORWARD = r"\dpatchify_kernelI(h?)(f|6__half|13__nv_bfloat16)\w*?Li(\d+)E"
BACKWARD = r"\dpatchify_backward_kernelI()(f|6__half|13__nv_bfloat16)Li(\d+)E"
WARPS = 8  # of a block


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def test_pixels_move_by_16_bytes_four_at_once(architecture):
    found = kernels_named(architecture, FORWARD) + kernels_named(architecture, BACKWARD)
    assert len(found) == 18 + 9
    for kernel, match in found:
        are_bytes, element, pixels = match.groups()
        assert kernel.stack == 0, kernel.name
        if int(pixels) * (4 if element == "f" else 2) == 16:
            assert kernel.count("STG.E.128") >= 4, kernel.name
            assert are_bytes or kernel.count("LDG.E.128") >= 4, kernel.name


@pytest.mark.parametrize("pattern, warps", [(FORWARD, 32), (BACKWARD, 24)], ids=["forward", "backward"])
def test_enough_bytes_are_asked_for(architecture, pattern, warps):
    """Each of the warps on a multiprocessor asks for up to 2 KiB at once."""
    number = int(architecture.rstrip("a"))
    for kernel, _ in kernels_named(architecture, pattern):
        assert WARPS * offline.resident_programs(number, kernel.registers, kernel.shared, WARPS) >= warps, kernel.name
