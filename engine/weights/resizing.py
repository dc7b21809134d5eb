"""Tables whose rows are others than in the folder they come from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.models.embedding.places import TabledPlaces
from engine.sections import ImageInput
from engine.weights.family import WORD_HEADS

BY_ROW = (".words", ".positions", ".types")
"""Tables that may have another number of rows."""
WORD_BIASES = tuple(f"{head}.bias" for head in (*WORD_HEADS, "heads.distillation.teacher.words"))
PLACES = ".places.table"


class Grid(NamedTuple):
    """Rows and columns of places, and the rows of a table before them."""

    rows: int
    columns: int
    before: int = 0

    @classmethod
    def of_ours(cls, places: TabledPlaces, table: Tensor) -> Grid:
        return cls((len(table) - places.first) // places.grid_columns, places.grid_columns, places.first)

    @classmethod
    def of_theirs(cls, settings: Mapping[str, Any], table: Tensor) -> Grid:
        """Of a config.json with image_size and patch_size, or of ours; else a square behind a class token or none."""
        size, patch = settings.get("image_size"), settings.get("patch_size")
        if (grid := settings.get("max_grid")) is not None:
            return cls(*grid, len(table) - math.prod(grid))
        if size is None or patch is None:
            side = math.isqrt(len(table))
            return cls(side, side, len(table) - side**2)
        height, width = (size, size) if isinstance(size, int) else size
        rows, columns = height // patch, width // patch
        return cls(rows, columns, len(table) - rows * columns)


def of_grid(stack: Any, grid: tuple[int, int]) -> Any:
    """The section of a role whose patches are a grid of this size."""
    if isinstance(stack, ImageInput):
        return dataclasses.replace(stack, max_grid=grid) if stack.kind == "patches" else stack
    return dataclasses.replace(stack, image=of_grid(stack.image, grid)) if getattr(stack, "image", None) is not None else stack


def rows_of_grid(table: Tensor, places: TabledPlaces, grid: tuple[int, int]) -> Tensor:
    """What a smaller grid takes up of a table of places."""
    rows, columns = grid
    taken = table[places.first :].unflatten(0, (-1, places.grid_columns))[:rows, :columns]
    return torch.cat((table[: places.first], taken.flatten(0, 1)))


def fits(name: str, wanted: torch.Size, got: torch.Size) -> bool:
    """Whether a table of a folder can stand for ours."""
    by_row = name.endswith((*BY_ROW, PLACES)) or name in WORD_BIASES
    return got[1:] == wanted[1:] if by_row else got == wanted


def holds_words(name: str) -> bool:
    """Whether the rows of a parameter are those of the vocabulary."""
    return name.endswith(".words") or name in WORD_BIASES


def copy_rows(name: str, found: Tensor, target: Tensor) -> str | None:
    """Fill the rows in common; a note where these are not all."""
    rows = min(len(found), len(target))
    target[:rows] = found[:rows]
    if len(found) == len(target):
        return None
    return f"{name} the first {rows} rows (it has {len(target)}, the file {len(found)})"


def copy_places(
    name: str, found: Tensor, target: Tensor, theirs: Grid, ours: Grid, taken: tuple[int, int]
) -> str | None:
    """Fill a table of places; of another grid by bicubic interpolation, as ViT is trained on at other sizes: the places that
    pictures take up, `taken` of them."""
    both = min(theirs.before, ours.before)
    target[:both] = found[:both]
    places, wanted = found[theirs.before :], target[ours.before :]
    if theirs[:2] == ours[:2]:
        wanted.copy_(places)
        return None
    if theirs[:2] != taken:
        picture = places.T.reshape(1, -1, *theirs[:2]).float()
        places = F.interpolate(picture, taken, mode="bicubic", align_corners=False)[0].flatten(1).T
    wanted.unflatten(0, ours[:2])[: taken[0], : taken[1]] = places.unflatten(0, taken).to(target.dtype)
    done = "taken as they are" if theirs[:2] == taken else f"interpolated from {theirs.rows} x {theirs.columns}"
    kept = "" if taken == ours[:2] else f" of {ours.rows} x {ours.columns}"
    return f"{name} {done} to {taken[0]} x {taken[1]}{kept} places"
