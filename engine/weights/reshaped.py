"""Weights that a published model keeps in another shape."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from engine.weights.pieces import Piece

CHANNELS = 3


class Table(Piece):
    """A table of rows; theirs have leading dimensions of 1."""

    def read(self, saved: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([saved[name].flatten(0, -2) for name in self.theirs])

    def write(self, parameter: Tensor) -> dict[str, Tensor]:
        return {name: part[None] for name, part in super().write(parameter).items()}


class Row(Piece):
    """A table of one row, or a number in a list of its own; theirs has one dimension less."""

    def read(self, saved: Mapping[str, Tensor]) -> Tensor:
        return saved[self.theirs[0]][None]

    def write(self, parameter: Tensor) -> dict[str, Tensor]:
        return {self.theirs[0]: parameter[0]}


class Biases(Piece):
    """Vectors; theirs have two leading dimensions of 1."""

    def read(self, saved: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([saved[name].flatten() for name in self.theirs])

    def write(self, parameter: Tensor) -> dict[str, Tensor]:
        return {name: part[None, None] for name, part in super().write(parameter).items()}


class LastRow(Piece):
    """A table whose last row is a vector of its own."""

    def read(self, saved: Mapping[str, Tensor]) -> Tensor:
        table, row = (saved[name] for name in self.theirs)
        return torch.cat((table, row[None]))

    def write(self, parameter: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.theirs, (parameter[:-1], parameter[-1]), strict=True))


class AgainstNothing(Piece):
    """A map to two logits, of no and of yes; theirs is to what yes has more."""

    def read(self, saved: Mapping[str, Tensor]) -> Tensor:
        found = saved[self.theirs[0]]
        return torch.cat((torch.zeros_like(found), found))

    def write(self, parameter: Tensor) -> dict[str, Tensor]:
        return {self.theirs[0]: parameter[1:] - parameter[:1]}


class Filters(Piece):
    """A linear map of square patches; theirs is a convolution."""

    def read(self, saved: Mapping[str, Tensor]) -> Tensor:
        return saved[self.theirs[0]].flatten(1)

    def write(self, parameter: Tensor) -> dict[str, Tensor]:
        side = math.isqrt(parameter.shape[1] // CHANNELS)
        return {self.theirs[0]: parameter.reshape(-1, CHANNELS, side, side)}


class BlueFirst(Piece):
    """Filters of pictures; theirs read blue, green, red."""

    def read(self, saved: Mapping[str, Tensor]) -> Tensor:
        return saved[self.theirs[0]].flip(1)

    def write(self, parameter: Tensor) -> dict[str, Tensor]:
        return {self.theirs[0]: parameter.flip(1)}


class Pixels(Piece):
    """Values of a patch: channel by channel here, pixel by pixel in MAE."""

    def read(self, saved: Mapping[str, Tensor]) -> Tensor:
        found = saved[self.theirs[0]]
        return found.unflatten(0, (-1, CHANNELS)).transpose(0, 1).reshape(found.shape)

    def write(self, parameter: Tensor) -> dict[str, Tensor]:
        return {self.theirs[0]: parameter.unflatten(0, (CHANNELS, -1)).transpose(0, 1).reshape(parameter.shape)}
