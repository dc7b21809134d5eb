"""A view of all tokens of the texts, for losses that are means over them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.batch import OnDevice


@dataclass
class AllTokens(OnDevice):
    """The texts as they were."""

    ids: Tensor
    """int64 [T]."""

    def __len__(self) -> int:
        return len(self.ids)
