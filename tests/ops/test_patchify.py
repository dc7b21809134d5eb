"""What is special to patchify: it is a convolution, it reads no padding, any layout; and what its users get wrong."""

import pytest
import torch

import vlkernels as vk
from vlkernels.core import native
from vlkernels.core.spec import InputMaker
from vlkernels.ops.patchify import benchmarks, functional
from vlkernels.testing.contract import poisoned_memory

HERE = ("reference",) if native.missing("patchify") else ("cpp", "reference")


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("side, patch_size", [((32, 48), 16), ((30, 45), 14), ((7, 9), 3)])
def test_a_linear_map_of_patches_is_the_convolution(impl, side, patch_size):
    """Value and gradients; what is left at the right and the bottom is dropped alike."""
    conv = torch.nn.Conv2d(3, 20, patch_size, stride=patch_size, dtype=torch.float32)
    images = torch.randn(2, 3, *side, requires_grad=True)
    layout = vk.SegmentLayout([[(side[0] // patch_size) * (side[1] // patch_size)]] * 2)
    patches = vk.patchify(images, layout, patch_size, impl=impl)
    mine = torch.nn.functional.linear(patches, conv.weight.flatten(1), conv.bias)
    true = conv(images).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn_like(true)
    for found, expected in zip(*(torch.autograd.grad(t, (images, conv.weight), cotangent) for t in (mine, true))):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", HERE)
def test_images_of_their_own_sizes_are_what_they_are_alone(impl):
    sizes = [[16, 40], [8, 8], [0, 24], [31, 9]]
    counts = [(h // 8) * (w // 8) for h, w in sizes]
    layout = vk.SegmentLayout([[3, n, 1] for n in counts], capacity=60)
    images = torch.full((4, 3, 31, 40), torch.nan)
    for image, (h, w) in zip(images, sizes):
        image[:, : h // 8 * 8, : w // 8 * 8] = torch.randn(3, h // 8 * 8, w // 8 * 8)
    images.requires_grad_()
    with poisoned_memory():
        patches = vk.patchify(images, layout, 8, sizes=torch.tensor(sizes), segment=1, impl=impl)
        (gradient,) = torch.autograd.grad(patches.sum(), images)
    alone = [
        vk.patchify(images[b : b + 1, :, :h, :w], vk.SegmentLayout([[n]]), 8, impl=impl)
        for b, ((h, w), n) in enumerate(zip(sizes, counts))
    ]
    assert torch.equal(patches, torch.cat(alone))
    assert torch.equal(gradient, images.isfinite().float())


@pytest.mark.parametrize("impl", HERE)
def test_bytes_are_normalized_as_torchvision_does(impl):
    images, mean, std = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    layout = vk.SegmentLayout([[4], [4]])
    by_hand = (images.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    expected = vk.patchify(by_hand, layout, 4, impl="reference")
    torch.testing.assert_close(vk.patchify(images, layout, 4, mean=mean, std=std, impl=impl), expected)
    half = vk.patchify(images, layout, 4, mean=mean, std=std, dtype=torch.bfloat16, impl=impl)
    torch.testing.assert_close(half, expected.bfloat16(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("impl", ("reference", *HERE[:-1]))
def test_bytes_without_channels_are_rows_of_nothing(impl):
    images = torch.zeros(2, 0, 4, 4, dtype=torch.uint8)
    assert vk.patchify(images, vk.SegmentLayout([[4], [4]]), 2, impl=impl).shape == (8, 0)


def test_bytes_become_float64_without_float32_between():
    images, layout = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16), vk.SegmentLayout([[1]])
    patches = vk.patchify(images, layout, 16, mean=(0.48,), std=(0.27,), dtype=torch.float64)
    expected = (torch.arange(256, dtype=torch.float64) / 255 - 0.48) / 0.27
    torch.testing.assert_close(patches[0], expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("shape, patch_size", [((2, 1, 4, 4), 4), ((1, 1, 3, 5), 1), ((1, 3, 8, 8), 8)])
def test_patches_do_not_share_the_memory_of_the_images(impl, shape, patch_size):
    """Where they lie in the order of the images too."""
    images = torch.randn(shape)
    kept = images.clone()
    layout = vk.SegmentLayout([[shape[2] // patch_size * (shape[3] // patch_size)]] * shape[0])
    vk.patchify(images, layout, patch_size, impl=impl).zero_()
    assert torch.equal(images, kept)


@pytest.mark.parametrize("impl", HERE)
def test_any_strides_are_served(impl):
    images = torch.randn(2, 8, 12, 3).permute(0, 3, 1, 2)
    layout = vk.SegmentLayout([[6], [6]])
    assert torch.equal(vk.patchify(images, layout, 4, impl=impl), vk.patchify(images.contiguous(), layout, 4, impl=impl))


@pytest.mark.skipif("cpp" not in HERE, reason="needs the compiled library")
@pytest.mark.parametrize("level", native.CPU_ISA_LEVELS)
def test_results_do_not_depend_on_threads_or_instruction_set(level):
    images, layout = torch.randn(4, 3, 64, 64).bfloat16().requires_grad_(), vk.SegmentLayout([[16]] * 4)

    def results():
        patches = vk.patchify(images, layout, 16, mean=(0.5,) * 3, std=(0.5,) * 3, impl="cpp")
        return patches, torch.autograd.grad(patches, images, patches.detach())[0]

    threads, expected = torch.get_num_threads(), results()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            native.limit_cpu_isa(level)
            assert all(torch.equal(a, b) for a, b in zip(results(), expected))
    finally:
        native.limit_cpu_isa(native.CPU_ISA_LEVELS[-1])
        torch.set_num_threads(threads)


def test_more_channels_than_the_kernels_normalize():
    """Hyperspectral images: the reference serves, and copies without normalization are the kernel's."""
    images, layout = torch.randn(1, 20, 4, 4), vk.SegmentLayout([[4]])
    with vk.recorded() as served:
        patches = vk.patchify(images, layout, 2)
        vk.patchify(images, layout, 2, mean=[0.0] * 20, std=[1.0] * 20)
    assert [impl for _, impl in served] == [HERE[0], "reference"] and patches.shape == (4, 80)


def test_long_lines_that_are_only_permuted_on_a_cpu_are_left_to_pytorch():
    """The kernels serve what is indexed or normalized, short lines, and whoever asks for them."""
    images, layout, sizes = torch.randn(2, 3, 64, 64), vk.SegmentLayout([[4], [4]]), torch.full((2, 2), 64)
    taken = vk.SegmentLayout([[4], [9]]).take(torch.tensor([0, 0]))  # 18 rows, ten of nobody
    with vk.recorded() as served:
        vk.patchify(images, layout, 32)
        vk.patchify(images, layout, 32, sizes=sizes)
        vk.patchify(images, layout, 32, mean=[0.0] * 3, std=[1.0] * 3)
        vk.patchify(images.byte(), layout, 32)
        vk.patchify(images, taken, 32)
        vk.patchify(images[..., :32, :32], layout, 16)
        vk.patchify(images, layout, 32, impl=HERE[0])
    assert [impl for _, impl in served] == ["reference", *[HERE[0]] * 6]


@pytest.mark.parametrize("make", [benchmarks._equal(3), benchmarks._native(3)], ids=["equal", "native"])
def test_peers_compute_the_same(make):
    """What the benchmarks compare with is the same function."""
    arguments = make(InputMaker(torch.float32))
    for peer in benchmarks.PEERS.values():
        torch.testing.assert_close(peer(**arguments), functional.patchify(**arguments))


@pytest.mark.skipif("cpp" not in HERE, reason="needs the compiled library")
def test_the_raw_op_reads_no_foreign_memory():
    images, starts = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, dtype=torch.int32)
    sizes, lengths = torch.tensor([[8, 8]], dtype=torch.int32), torch.full((1, 1), 16, dtype=torch.int32)
    patches = torch.ops.vlkernels.patchify(images, sizes, starts, lengths, 2, [], [], torch.float32, 16)
    assert torch.equal(patches[:, 0], torch.tensor([1.0] * 4 + [0.0] * 12))
    assert not torch.ops.vlkernels.patchify(images, -sizes, starts, lengths, 2, [], [], torch.float32, 16).any()
    assert not torch.ops.vlkernels.patchify_backward(torch.ones(16, 4), -sizes, starts, lengths, 2, [], [1, 1, 4, 4]).any()
    with pytest.raises(RuntimeError, match="images of bytes need a scale"):
        torch.ops.vlkernels.patchify(images.byte(), sizes, starts, lengths, 2, [], [], torch.float32, 16)
    with pytest.raises(RuntimeError, match="grad must have 24 elements, got 8"):
        torch.ops.vlkernels.patchify_backward(torch.ones(2, 4), None, starts, lengths, 2, [], [1, 3, 4, 4])


def mistakes():
    images, layout = torch.randn(2, 3, 8, 12), vk.SegmentLayout([[2, 6], [1, 6]])
    sizes = torch.tensor([[8, 12], [8, 12]])

    def call(images=images, layout=layout, patch_size=4, **options):
        return lambda: vk.patchify(images, layout, patch_size, **{"segment": 1, **options})

    return [
        (call(images[0]), r"images must be \[B, C, H, W\] = \[2, any, any, any\], got \[3, 8, 12\]"),
        (call(images[:1]), r"images must be .* = \[2, any, any, any\], got \[1, 3, 8, 12\]"),
        (call(images.long()), "images must be one of uint8, float64, float32, bfloat16, float16, got int64"),
        (call(patch_size=0), "patch_size must be an integer from 1 to 4096, got 0"),
        (call(patch_size=(4, 4)), r"patch_size must be an integer from 1 to 4096, got \(4, 4\)"),
        (call(patch_size=2**40), f"patch_size must be an integer from 1 to 4096, got {2**40}"),
        (call(layout=layout.lengths), "layout must be a SegmentLayout, got a Tensor"),
        (call(images.numpy()), "images must be a Tensor, got a ndarray"),
        (call(sizes=[[8, 12], [8, 12]]), "sizes must be a Tensor, got a list"),
        (call(mean=0.5, std=0.5), "mean must be a tuple or list of floats, got a float"),
        (call(mean=(0.5, 0.5, "0.5"), std=(0.5,) * 3), r"mean must be a tuple or list of floats, got \(0.5, 0.5, '0.5'\)"),
        (call(images[:, :, :1, :1].byte().expand(2, 3, 2**16, 2**16), patch_size=1), f"of {2**16} x {2**16} has {2**32}, the layout 6"),
        (call(segment=2), "segment must be an index below 2, got 2"),
        (call(segment=0), "image 0 of 8 x 12 has 6, the layout 2"),
        (call(patch_size=5), "image 0 of 8 x 12 has 2, the layout 6"),
        (call(sizes=sizes[:1]), r"sizes must be \[B, 2\] = \[2, 2\], got \[1, 2\]"),
        (call(sizes=sizes.float()), "sizes must be one of int64, int32, got float32"),
        (call(sizes=sizes + 4), r"heights must lie in \[0, 9\), got values from 12 to 12"),
        (call(sizes=sizes - torch.tensor([[0, 0], [4, 0]])), "image 1 of 4 x 12 has 3, the layout 6"),
        (call(mean=(0.5,) * 3), "mean and std must be given together"),
        (call(mean=(0.5,), std=(0.5,)), "mean must have one value per channel = 3, got 1"),
        (call(mean=(0.5,) * 3, std=(0.5, 0.0, 0.5)), "std must not be 0"),
        (call(dtype=torch.bfloat16), "dtype must be float32 for these images, got torch.bfloat16"),
        (call(images.byte(), dtype=torch.int32), "dtype must be one of float64, .* for these images, got torch.int32"),
        (call(images.double(), impl="cpp"), 'cannot run with impl="cpp"'),
        (call(images.to("meta")), "all tensors must be on one device, got images on meta, layout on cpu"),
    ]


@pytest.mark.parametrize("call, message", mistakes())
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
