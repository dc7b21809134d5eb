"""The CUDA kernels of patchify, run thread by thread on the CPU from the sources and by the plan of the launcher."""

import mmap

import pytest
import torch

import vlkernels as vk
from tests import emulated
from tests.emulated import patchify as emulated_patchify
from vlkernels.core import dispatch
from vlkernels.core.spec import Case
from vlkernels.ops.patchify.spec import MEAN, SPECS, STD
from vlkernels.testing import contract

pytestmark = pytest.mark.skipif(emulated.refusal() is not None, reason=str(emulated.refusal()))
(SPEC,) = SPECS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def emulator(monkeypatch):
    with emulated_patchify.serving(monkeypatch):
        module = emulated_patchify.kernels()
        yield module
        module.run_in_order()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
def test_contract(case, dtype):
    contract.verify(SPEC, case, dtype, "cuda")


def native(patch_size, width, is_byte=False, shift=0):
    """Images of different sizes whose tensor begins `shift` elements off a boundary."""

    def make(fill):
        shape, sizes = (3, 3, 2 * patch_size + 1, width), [[2 * patch_size, width], [patch_size, width], [2 * patch_size + 1, patch_size]]
        layout = fill.layout([[(h // patch_size) * (w // patch_size)] for h, w in sizes])
        drawn = fill.integers(0, 256, shape).to(torch.uint8) if is_byte else fill.normal(*shape)
        whole = torch.empty(drawn.numel() + shift, dtype=drawn.dtype)
        whole[shift:] = drawn.detach().flatten()
        images = whole[shift:].view(shape).requires_grad_(not is_byte)
        chosen = {"dtype": fill.dtype, "mean": MEAN, "std": STD} if is_byte else {}
        return {"images": images, "layout": layout, "patch_size": patch_size, "sizes": torch.tensor(sizes), **chosen}

    return Case(f"{patch_size} of {width}", make)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_byte", [False, True])
@pytest.mark.parametrize("patch_size, width, shift", [(16, 64, 0), (16, 62, 0), (14, 42, 0), (32, 96, 0), (16, 64, 1), (16, 64, 2), (13, 40, 0)])
def test_every_width_of_an_access(patch_size, width, shift, is_byte, dtype):
    contract.verify(SPEC, native(patch_size, width, is_byte, shift), dtype, "cuda")


@pytest.mark.parametrize("seed", range(1, 4))
def test_the_order_of_threads_does_not_change_a_bit(emulator, seed):
    case = native(8, 40)
    in_order = contract.run(SPEC.functional, case, torch.bfloat16, impl="cuda")
    emulator.shuffle(seed)
    shuffled = contract.run(SPEC.functional, case, torch.bfloat16, impl="cuda")
    for name, tensor in in_order.named().items():
        assert torch.equal(tensor, shuffled.named()[name]), name


def test_more_rows_than_the_grid_takes_at_once():
    """Patches of four pixels by a thread each, lines of 64 by 32: teams take turns at both."""
    images = torch.randn(90, 1, 256, 64, requires_grad=True)
    layout = vk.SegmentLayout([[128 * 32]] * 90)
    patches = vk.patchify(images, layout, 2, impl="cuda")
    expected = vk.patchify(images, layout, 2, impl="reference")
    assert torch.equal(patches, expected)
    grad = torch.randn_like(patches)
    (found,), (true,) = (torch.autograd.grad(out, images, grad) for out in (patches, expected))
    assert torch.equal(found, true)


def test_sizes_that_lie_are_not_read():
    """On a card sizes and lengths are not looked at before: patches outside of the images come out as zeros."""
    images, sizes = torch.ones(1, 1, 4, 4), torch.tensor([[8, 8]], dtype=torch.int32)
    starts, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.full((1, 1), 16, dtype=torch.int32)
    patches = emulated_patchify.patchify(images, sizes, starts, lengths, 2, [], [], torch.float32, 16)
    assert torch.equal(patches[:, 0], torch.tensor([1.0] * 4 + [0.0] * 12))
    assert not emulated_patchify.patchify(images, -sizes, starts, lengths, 2, [], [], torch.float32, 16).any()
    gradient = emulated_patchify.patchify_backward(torch.ones(3, 4), sizes, starts, lengths, 2, [], [1, 1, 4, 4])
    assert torch.equal(gradient[0, 0, ::2, ::2], torch.tensor([[1.0, 1.0], [1.0, 0.0]]))


def test_the_emulator_is_what_serves(monkeypatch):
    images, layout = torch.randn(1, 1, 4, 4), vk.SegmentLayout([[4]])
    with dispatch.recorded() as served:
        vk.patchify(images, layout, 2)
    assert served == [("patchify", "cuda")]
    monkeypatch.setattr(emulated_patchify, "kernels", lambda: pytest.fail("called"))
    with pytest.raises(pytest.fail.Exception, match="called"):
        vk.patchify(images, layout, 2)


def sparse(*shape):
    """Zeros that take no memory before they are written."""
    numel, flags = torch.Size(shape).numel(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, 2 * numel, flags=flags), dtype=torch.bfloat16).view(shape)


def test_more_elements_than_31_bits_count(emulator):
    """The last image of many: its patches and its lines lie behind 2**31 elements."""
    batch, side, patch_size = 2752, 512, 16
    images, gradient = sparse(batch, 3, side, side), sparse(batch, 3, side, side)
    assert images.numel() > 2**31
    images[-1] = torch.randn(3, side, side)
    rows = (side // patch_size) ** 2
    starts, lengths = torch.arange(batch, dtype=torch.int32) * rows, torch.full((batch,), rows, dtype=torch.int32)
    given = emulated_patchify.grid(images.shape, None, starts, lengths, patch_size, batch * rows)
    patches = sparse(batch * rows, 768)
    no_scale = emulated.fields(dtype=torch.bfloat16, scale=[], shift=[], patches=patches)
    emulator.only_blocks(2100, 2112)  # the last ones of both directions
    emulator.patchify(given | no_scale | emulated.fields(images=images))
    assert torch.equal(patches[-1], images[-1, :, -16:, -16:].flatten())
    emulator.patchify_backward(given | no_scale | emulated.fields(images=gradient))
    assert torch.equal(gradient[-1, -1, -1, -16:], images[-1, -1, -1, -16:])
