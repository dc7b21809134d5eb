"""How one of our parameters is made of the tensors of a published model, and the other way round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """One of our parameters: their tensors, equally many rows each, laid one behind the other."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    """Theirs are stored as [in, out], or a table as [head, bucket]."""

    def read(self, saved: Mapping[str, Tensor]) -> Tensor:
        """Our parameter out of their tensors."""
        found = [saved[name] for name in self.theirs]
        return torch.cat([self._turned(tensor) for tensor in found])

    def write(self, parameter: Tensor) -> dict[str, Tensor]:
        """Their tensors out of our parameter."""
        parts = parameter.chunk(len(self.theirs))
        return {name: self._turned(part) for name, part in zip(self.theirs, parts, strict=True)}

    def _turned(self, tensor: Tensor) -> Tensor:
        return tensor.T if self.transposed and tensor.dim() == 2 else tensor


def linear(ours: str, *theirs: str, biased: bool = True, transposed: bool = False) -> Iterator[Piece]:
    """Weight and bias of a map, or of a norm: of `ours`, made of the modules `theirs`."""
    yield Piece(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), transposed)
    if biased:
        yield Piece(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs))


def beneath(ours: str, theirs: str, pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same of two modules that are parts of larger ones; an empty name is the model itself."""
    for piece in pieces:
        own = f"{ours}.{piece.ours}" if ours else piece.ours
        yield piece._replace(ours=own, theirs=tuple(f"{theirs}.{name}" if theirs else name for name in piece.theirs))
