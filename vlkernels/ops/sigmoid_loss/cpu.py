"""The compiled pass over a tile of similarities, csrc/sigmoid_loss."""

from __future__ import annotations

from vlkernels.core import library

# Pairs of equal id are positive. Returns the tile's sums of losses, of their derivatives by logits times similarities, and of
# derivatives: [3]. With ``gradient`` the derivatives take the place of the similarities, without it the latter two sums are 0.
weigh_pairs = library.define(
    "weigh_pairs(Tensor(a!) tile, Tensor row_ids, Tensor column_ids, Tensor scale, Tensor bias, bool gradient) -> Tensor",
    fake=lambda tile, *_: tile.new_empty(3),
)
