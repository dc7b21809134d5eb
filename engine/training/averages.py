"""Momentum copies follow their sources, on what each rank holds of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.models.momentum import MomentumCopy

Pieces = Callable[[nn.Parameter], list[Tensor]]


class Averages:
    """Updates every `MomentumCopy` of a module.

    `pieces` gives what this rank holds of a parameter, alike for a copy and its source, so nothing is gathered. Where the
    weights are of half precision each piece has a float32 master: `0.005 * (source - copy)` is most often less than half
    the spacing of bfloat16 around the copy, which would never move.
    """

    def __init__(self, module: nn.Module, pieces: Pieces):
        copies = [part for part in module.modules() if isinstance(part, MomentumCopy)]
        self.moving = [part for part in copies if part.momentum < 1]
        self.pieces = pieces
        self.masters: list[list[Tensor]] = [[] for _ in self.moving]

    @torch.no_grad()
    def follow(self) -> None:
        """One step of every copy."""
        for part, masters in zip(self.moving, self.masters, strict=True):
            held = [zip(self.pieces(own), self.pieces(source), strict=True) for own, source in part.parameter_pairs()]
            own, sources = map(list, zip(*(pair for pairs in held for pair in pairs), strict=True))
            if all(piece.dtype == torch.float32 for piece in own):
                move(own, sources, part.momentum)
            else:
                masters[:] = masters or [piece.float() for piece in own]
                move(masters, sources, part.momentum)
                torch._foreach_copy_(own, masters)
            for buffer, source in part.buffer_pairs():
                buffer.copy_(source)


def move(averages: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    torch._foreach_mul_(averages, momentum)
    torch._foreach_add_(averages, sources, alpha=1 - momentum)
