"""Images of any sizes, cut into patches, in packed order."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from vlkernels.core import checks, dispatch, native
from vlkernels.core.dispatch import Facts, Implementation
from vlkernels.core.layout import SegmentLayout
from vlkernels.ops.patchify import raw_ops, reference
from vlkernels.ops.patchify.reference import output_dtype

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_NORMALIZED_CHANNELS = 16
LARGEST_PATCH = 4096
LONG_LINE = 32  # pixels: from here on PyTorch's strided copy is the faster one on a CPU; MATH.md has the numbers


def _kernel_supports(facts: Facts) -> str | None:
    if facts["dtype"] not in KERNEL_DTYPES:
        return f"it writes float32, bfloat16 and float16, asked for {facts['dtype']}"
    if facts["is_normalized"] and facts["channels"] > MOST_NORMALIZED_CHANNELS:
        return f"it normalizes up to {MOST_NORMALIZED_CHANNELS} channels, the images have {facts['channels']}"
    if facts["only_permuted"]:
        return f"on a CPU PyTorch permutes lines of {LONG_LINE} pixels faster where nothing is indexed or normalized"
    return None


IMPLEMENTATIONS = (
    Implementation(
        "cuda",
        devices=("cuda",),
        available=functools.partial(native.missing, "patchify", "CUDA"),
        supports=_kernel_supports,
    ),
    Implementation(
        "cpp",
        devices=("cpu",),
        available=functools.partial(native.missing, "patchify", "CPU"),
        supports=_kernel_supports,
    ),
    Implementation("reference"),
)


def patchify(
    images: Tensor,
    layout: SegmentLayout,
    patch_size: int,
    *,
    sizes: Tensor | None = None,
    segment: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """The patches of every image, row by row of its grid, as the packed rows of one segment of the layout.

    ``linear(patchify(images, layout, p), conv.weight.flatten(1), conv.bias)`` is ``conv(images)`` for a convolution with
    kernel and stride ``p``: the patch embedding of ViT, CLIP, ViLT and NaViT, without padding and without the convolution.
    A class token is best a segment of its own, so that ``put_segments`` places it.

    Example:
        >>> import torch, vlkernels as vk
        >>> images, sizes = torch.randn(2, 3, 32, 64), torch.tensor([[32, 64], [16, 32]])
        >>> layout = vk.SegmentLayout([[5, 8], [7, 2]])  # text beside (32 // 16) * (64 // 16) and 1 * 2 patches
        >>> patches = vk.patchify(images, layout, 16, sizes=sizes, segment=1)
        >>> patches.shape
        torch.Size([10, 768])
        >>> torch.equal(patches[9], images[1, :, :16, 16:32].flatten())
        True

    Args:
        images: ``[B, C, H, W]``: floating, or uint8, whose pixels are divided by 255.
        layout: ``B`` samples on the device of the images; its segment has ``(height // p) * (width // p)`` rows.
        patch_size: ``p``; what is left at the right and the bottom is dropped, as a convolution does.
        sizes: int32 or int64 ``[B, 2]``: height and width of each image at the top left of its ``[H, W]``; the rest is never
            read. ``None``: all are ``H x W``.
        segment: which one of the layout.
        mean, std: of each channel: pixels become ``(pixel - mean) / std``.
        dtype: of the patches of uint8 images, float32 by default; floating images keep theirs.
        impl: ``"auto"``, ``"cuda"``, ``"cpp"`` or ``"reference"``.

    Returns:
        ``[rows, C * p * p]``, channel by channel, in the rows that ``take_segments(x, layout, (segment,))`` has; those that
        belong to nobody are zero.

    Gradients: to floating images, zero where there was no patch; every pixel is written once.
    Numerics: bits are copied; normalized in float32 (float64 for float64) and rounded once.
    Memory: the result; nothing is kept for the backward but sizes and layout.
    Errors: ``ValueError`` where shapes, dtypes, devices, sizes or lengths disagree (values: on the CPU; elsewhere a
        device-side assertion).
    Source: the patch embedding of ViT; several native resolutions in one sequence are NaViT's.
    """
    out_dtype = _check_images(images, layout, patch_size, segment, dtype)
    _check_statistics(images.shape[1], mean, std)
    packed = layout.select((segment,))
    _check_sizes(images, sizes, layout, segment, patch_size)
    is_normalized = mean is not None or images.dtype == torch.uint8
    may_permute = impl == "auto" and not is_normalized and sizes is None and patch_size >= LONG_LINE
    only_permuted = may_permute and _fill_the_rows(images, packed, patch_size)
    facts = {"dtype": out_dtype, "channels": images.shape[1], "is_normalized": is_normalized, "only_permuted": only_permuted}
    options = {"sizes": sizes, "segment": segment, "mean": mean, "std": std, "dtype": out_dtype}
    if dispatch.resolve("patchify", impl, IMPLEMENTATIONS, images.device, facts) == "reference":
        return reference.patchify(images, layout, patch_size, **options)
    sizes = None if sizes is None else sizes.to(torch.int32).contiguous()
    scale, shift = _affine(images, mean, std) if is_normalized else ([], [])
    return raw_ops.patchify(
        images.contiguous(), sizes, packed.starts, packed.lengths, patch_size, scale, shift, out_dtype, packed.num_tokens
    )


def _fill_the_rows(images: Tensor, packed: SegmentLayout, patch_size: int) -> bool:
    """Whether images that fill their tensor, on a CPU, leave no row to nobody: then nothing is indexed."""
    if torch.compiler.is_compiling() or images.device.type != "cpu":
        return False
    return packed.num_tokens == len(images) * _patches_of(images, patch_size)


def _patches_of(images: Tensor, patch_size: int) -> int:
    """Of each image that fills its tensor."""
    return (images.shape[2] // patch_size) * (images.shape[3] // patch_size)


def _affine(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[list[float], list[float]]:
    """Normalization as ``pixel * scale + shift``."""
    one = 255.0 if images.dtype == torch.uint8 else 1.0
    if mean is None or std is None:
        return [1.0 / one] * images.shape[1], [0.0] * images.shape[1]
    return [1.0 / (one * s) for s in std], [-m / s for m, s in zip(mean, std)]


def _check_images(
    images: Tensor, layout: SegmentLayout, patch_size: int, segment: int, dtype: torch.dtype | None
) -> torch.dtype:
    if not isinstance(layout, SegmentLayout):
        raise ValueError(f"layout must be a SegmentLayout, got a {type(layout).__name__}")
    checks.check_dtype("images", images, (torch.uint8, *checks.FLOATING_DTYPES))
    checks.check_shape("images", images, "[B, C, H, W]", (layout.num_samples, None, None, None))
    checks.check_same_device(images=images, layout=layout.starts)
    if not isinstance(patch_size, int) or not 1 <= patch_size <= LARGEST_PATCH:
        raise ValueError(f"patch_size must be an integer from 1 to {LARGEST_PATCH}, got {patch_size!r}")
    if not isinstance(segment, int) or not 0 <= segment < layout.num_segments:
        raise ValueError(f"segment must be an index below {layout.num_segments}, got {segment!r}")
    allowed = checks.FLOATING_DTYPES if images.dtype == torch.uint8 else (images.dtype,)
    if dtype is not None and dtype not in allowed:
        raise ValueError(f"dtype must be {checks.listed(allowed)} for these images, got {dtype}")
    return output_dtype(images, dtype)


def _check_statistics(channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    if (mean is None) != (std is None):
        raise ValueError("mean and std must be given together")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and not isinstance(values, (tuple, list)):
            raise ValueError(f"{name} must be a tuple or list of floats, got a {type(values).__name__}")
        if values is not None and not all(isinstance(v, numbers.Real) for v in values):
            raise ValueError(f"{name} must be a tuple or list of floats, got {values!r}")
        if values is not None and len(values) != channels:
            raise ValueError(f"{name} must have one value per channel = {channels}, got {len(values)}")
    if std is not None and any(s == 0 for s in std):
        raise ValueError(f"std must not be 0, got {list(std)}")


def _check_sizes(images: Tensor, sizes: Tensor | None, layout: SegmentLayout, segment: int, patch_size: int) -> None:
    height, width = images.shape[2:]
    if sizes is not None:
        checks.check_integer("sizes", sizes)
        checks.check_shape("sizes", sizes, "[B, 2]", (len(images), 2))
        checks.check_same_device(images=images, sizes=sizes)
        checks.check_values_between("heights", sizes[:, 0], 0, height + 1)
        checks.check_values_between("widths", sizes[:, 1], 0, width + 1)
    if torch.compiler.is_compiling() or (sizes is None and _all_have(layout, segment, _patches_of(images, patch_size))):
        return
    lengths = layout.lengths[:, segment]
    if sizes is None:
        expected = torch.full_like(lengths, _patches_of(images, patch_size), dtype=torch.int64)
    else:
        expected = (sizes // patch_size).prod(1)
    agree = expected == lengths
    if lengths.device.type != "cpu":
        torch._assert_async(agree.all())
    elif not agree.all():
        b = int(agree.logical_not().nonzero()[0])
        size = [height, width] if sizes is None else sizes[b].tolist()
        raise ValueError(
            f"the segment must have as many rows as an image has patches: image {b} of {size[0]} x {size[1]} has "
            f"{int(expected[b])}, the layout {int(lengths[b])}"
        )


def _all_have(layout: SegmentLayout, segment: int, rows: int) -> bool:
    """Whether the host knows that every sample has so many rows of the segment."""
    total, longest = layout.segment_totals[segment], layout.max_segment_lengths[segment]
    return layout.exact and total == layout.num_samples * rows and longest == rows
