"""How one of our parameters is made of the tensors of a published model, and the other way round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """One of our parameters: their tensors laid one behind the other."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    """Theirs are stored as [in, out], or a table as [head, bucket]."""

    def read(self, saved: Mapping[str, Tensor]) -> Tensor:
        """Our parameter out of their tensors."""
        found = [saved[name] for name in self.theirs]
        found = [tensor.T if self.transposed and tensor.dim() == 2 else tensor for tensor in found]
        return torch.cat([tensor.flatten() if tensor.dim() == 3 else tensor for tensor in found])

    def write(self, parameter: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors out of our parameter, in the shapes of those of `like`."""
        shapes = [like[name].shape for name in self.theirs]
        rows = [shape[-1] if len(shape) != 2 or self.transposed else shape[0] for shape in shapes]
        parts = parameter.split(rows)
        return {
            name: (part.T if self.transposed and part.dim() == 2 else part).reshape(shape)
            for name, part, shape in zip(self.theirs, parts, shapes, strict=True)
        }


def linear(ours: str, *theirs: str, biased: bool = True, transposed: bool = False) -> Iterator[Piece]:
    """Weight and bias of a map, or of a norm: of `ours`, made of the modules `theirs`."""
    yield Piece(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), transposed)
    if biased:
        yield Piece(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs))


def beneath(ours: str, theirs: str, pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same of two modules that are parts of larger ones."""
    for piece in pieces:
        yield piece._replace(ours=f"{ours}.{piece.ours}", theirs=tuple(f"{theirs}.{name}" for name in piece.theirs))
