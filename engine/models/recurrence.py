"""A recurrent network over packed texts."""

from __future__ import annotations

import vlkernels as vk
from torch import nn

from engine.models.transformer import SelectedRows, Tokens
from engine.sections import Stack


class PackedGru(nn.Module):
    """torch's GRU: the state of a token knows its text up to there.

    Texts are padded for it and packed again: it reads forwards, so that what stands behind an end changes nothing before.
    """

    def __init__(self, stack: Stack, in_width: int, impl: str):
        super().__init__()
        self.gru = nn.GRU(in_width, stack.width, stack.layers, batch_first=True)
        self.impl = impl

    def forward(self, tokens: Tokens, selected: SelectedRows | None = None) -> Tokens:
        """States of all tokens, or of the selected ones."""
        states, _ = self.gru(*vk.unpack(tokens.hidden, tokens.layout, impl=self.impl))
        packed = vk.pack([states], tokens.layout, impl=self.impl)
        if selected is None:
            return Tokens(packed, tokens.layout)
        return Tokens(vk.take_rows(packed, selected.index, impl=self.impl), selected.layout)
