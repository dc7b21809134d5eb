"""SOHO's visual dictionary: every cell of a picture beside the code nearest to it."""

from __future__ import annotations

import torch
import vlkernels as vk
from torch import Tensor, nn

from engine.models.batch_norm import BatchNorm
from engine.models.codebook import Codebook
from engine.models.transformer import Linear


class VisualDictionary(nn.Module):
    """Normalised cells and a linear map of their codes, mixed by a gate that reads both."""

    def __init__(self, num_codes: int, width: int, impl: str):
        super().__init__()
        self.norm = BatchNorm(width)
        self.codebook = Codebook(num_codes, width)
        self.code_map = Linear(width, width, impl)
        self.gate, self.gate_norm = nn.Linear(2 * width, 2, bias=False), BatchNorm(2)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, D]`: the mixture; int64 `[N]`: the code of every cell."""
        cells = self.norm(rows)
        codes, index = self.codebook(cells)
        codes = self.code_map(codes)
        of_code, of_cell = self.gate_norm(self.gate(torch.cat((codes, cells), dim=1))).softmax(1).split(1, dim=1)
        return of_code * codes + of_cell * cells, index


def cells_of_one_code(codes: Tensor, drawn: Tensor, layout: vk.SegmentLayout) -> Tensor:
    """bool `[N]`: the cells that have the code of the drawn cell of their picture, so that no copy of it is left to read.

    `drawn` `[B]` are rows of the pictures, which `layout` [B, 1] tells.
    """
    return codes == codes[drawn][layout.token_sample()]
