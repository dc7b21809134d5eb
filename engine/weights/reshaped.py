"""Weights that a published model keeps in another shape."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from engine.weights.pieces import Piece


class Table(Piece):
    """A table of rows; theirs has leading dimensions of 1, or is a single row without any."""

    def read(self, saved: Mapping[str, Tensor]) -> Tensor:
        found = saved[self.theirs[0]]
        return found.reshape(-1, found.shape[-1])

    def write(self, parameter: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.theirs[0]: parameter.reshape(like[self.theirs[0]].shape)}


class Filters(Piece):
    """A linear map of patches; theirs is a convolution."""

    def read(self, saved: Mapping[str, Tensor]) -> Tensor:
        return saved[self.theirs[0]].flatten(1)

    def write(self, parameter: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.theirs[0]: parameter.reshape(like[self.theirs[0]].shape)}


class Pixels(Piece):
    """Values of a patch: channel by channel here, pixel by pixel in MAE."""

    CHANNELS = 3

    def read(self, saved: Mapping[str, Tensor]) -> Tensor:
        found = saved[self.theirs[0]]
        return found.unflatten(0, (-1, self.CHANNELS)).transpose(0, 1).reshape(found.shape)

    def write(self, parameter: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.theirs[0]: parameter.unflatten(0, (self.CHANNELS, -1)).transpose(0, 1).reshape(parameter.shape)}
