"""Dropout by itself, where no fused op does it on its way."""

from __future__ import annotations

import vlkernels as vk
from torch import Tensor


def drop(x: Tensor, p: float, layout: vk.SegmentLayout, rng: vk.Rng | None, stream: int, impl: str) -> Tensor:
    """The rows of `layout`, each value kept or dropped by its sample, position and column: no norm is asked for, so of the
    fused call the sum alone is taken."""
    return vk.layer_norm(x, None, None, dropout_p=p, layout=layout, rng=rng, stream=stream, return_sum=True, impl=impl)[1]
