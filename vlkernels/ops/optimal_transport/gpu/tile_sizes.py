"""Tiles of the transport kernels: pure functions of dtype, architecture and the longest sides, rounded up to powers of two."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vlkernels.core.triton_runtime import family

SMALLEST_TILE = 16
MOST_RESIDENT = 2**13  # values of a float32 matrix of which the registers of a program hold three
MOST_IMAGES = 1024


class Tile(NamedTuple):
    """Texts and images of a tile, width taken at a time, warps of a program, stages of its software pipeline."""

    texts: int
    images: int
    depth: int
    warps: int
    stages: int


def power_of_two(length: int) -> int:
    return max(SMALLEST_TILE, 1 << (length - 1).bit_length())


def is_resident(longest_text: int, longest_image: int) -> bool:
    """Whether the matrices of every sample fit into the registers of a program."""
    return power_of_two(longest_text) * power_of_two(longest_image) <= MOST_RESIDENT


def plan_tile(longest_text: int, longest_image: int, dtype: torch.dtype, architecture: int) -> Tile:
    """What the plan is made in: the whole of it where it is resident, else some texts with all images."""
    images = power_of_two(longest_image)
    texts = min(power_of_two(longest_text), max(SMALLEST_TILE, MOST_RESIDENT // images))
    warps = max(1, texts * images // 1024)
    return Tile(texts, images, 32 if dtype == torch.float32 else 64, warps, 1 if family(architecture) == 86 else 2)


class GradientTile(NamedTuple):
    """Rows of a side, rows of the other one and width taken at a time; warps and stages."""

    rows: int
    others: int
    depth: int
    warps: int
    stages: int


def gradient_tile(longest: int, architecture: int) -> GradientTile:
    """Taken from compiles for absent cards: nothing spills in bfloat16."""
    rows, card = min(64, power_of_two(longest)), family(architecture)
    return GradientTile(rows, min(32, rows), 64 if card in (90, 100) else 32, 4, 1 if card == 86 else 2)
