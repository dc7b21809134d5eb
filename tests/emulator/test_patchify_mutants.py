"""Faults put into the CUDA sources of patchify, each of which a run in the emulator must show."""

import pytest
import torch

import vlkernels as vk
from tests import emulated
from tests.emulated import patchify as emulated_patchify

pytestmark = pytest.mark.skipif(emulated.refusal() is not None, reason=str(emulated.refusal()))

# Only float32, so that a mutant compiles in seconds; a block's rows take turns.
THINNER = [
    ("primitives/row_copy_plan.h", "most_copy_blocks = 2112;", "most_copy_blocks = 1;"),
    ("primitives/device_vector.cuh", "        case Dtype::bfloat16: return work(bfloat16{});\n", "        default: return;\n"),
    ("primitives/device_vector.cuh", "        case Dtype::float16: return work(float16{});\n", ""),
]
GRID, PLAN, KERNELS = "patchify/patchify.h", "patchify/patchify_plan.h", "patchify/patchify.cuh"
MUTANTS = {
    "columns of the padded image": (GRID, "t = row - grid.starts[image], columns = columns_of(grid, image);",
                                    "t = row - grid.starts[image], columns = grid.width / grid.patch;"),
    "a patch behind the last of its row": (GRID, "int64_t count = columns;", "int64_t count = columns + 1;"),
    "a line of the patch before": (GRID, "line.channel * grid.patch + line.y - down * grid.patch)",
                                   "line.channel * grid.patch + line.y)"),
    "an access over the end of a line": (PLAN, "grid.patch % pixels == 0 && grid.width % pixels == 0", "grid.width % pixels == 0"),
    "the first channel's scale for all": (KERNELS, "const float scale = normalize.scale[channel];", "const float scale = normalize.scale[0];"),
    "rows of nobody that are shifted": (KERNELS, "corner < 0 ? Vector<Out, V>{} : patches", "patches"),
}  # fmt: skip


def results(patch_size, impl):
    """Patches and gradient of images of their own sizes beside other segments, normalized, with rows of nobody."""
    torch.manual_seed(patch_size)
    p, shape = patch_size, (4, 3, 3 * patch_size + 2, 4 * patch_size + 4)
    sizes = torch.tensor([[3 * p, 4 * p], [2 * p + 1, p], [0, p], [p, 3 * p]])
    layout = vk.SegmentLayout([[b, n] for b, n in enumerate((sizes // p).prod(1).tolist())]).take(torch.arange(4))
    images = torch.randn(shape, requires_grad=True)
    options = {"sizes": sizes, "segment": 1, "mean": (0.5, -0.25, 1.0), "std": (0.5, 2.0, 4.0)}
    patches = vk.patchify(images, layout, p, impl=impl, **options)
    return patches, *torch.autograd.grad(patches, images, torch.randn(patches.shape))


def is_right(module, monkeypatch):
    """Four pixels at once, two, and one."""
    for patch_size in (8, 6, 5):
        with monkeypatch.context() as patch:
            patch.setattr(emulated_patchify, "kernels", lambda: module)
            with emulated_patchify.serving(patch):
                found = results(patch_size, "cuda")
        expected = results(patch_size, "reference")
        if not all(torch.allclose(f, e, rtol=1e-5, atol=1e-5) for f, e in zip(found, expected, strict=True)):
            return False
    return True


def test_the_sources_are_right_as_they_are(tmp_path, monkeypatch):
    assert is_right(emulated.mutant("patchify", tmp_path / "csrc", THINNER), monkeypatch)


@pytest.mark.parametrize("fault", MUTANTS)
def test_a_fault_is_seen(fault, tmp_path, monkeypatch):
    assert not is_right(emulated.mutant("patchify", tmp_path / "csrc", [*THINNER, MUTANTS[fault]]), monkeypatch)
