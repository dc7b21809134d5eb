"""impl "triton" of the sigmoid loss: what the driver asks of two blocks, as launches and products."""

from __future__ import annotations

import torch
from torch import Tensor

from vlkernels.core import similarity, triton_runtime
from vlkernels.core.exchange import Block
from vlkernels.core.similarity import Wave
from vlkernels.ops.sigmoid_loss.gpu import launches
from vlkernels.ops.sigmoid_loss.gpu.launches import Logits


class Tiles:
    """A wave of pairs at a time; see ``driver.Tiles``."""

    def __init__(self, scale: Tensor, bias: Tensor, labels: Tensor | None):
        self._logits = Logits(scale, bias, labels)
        self._architecture = triton_runtime.architecture(scale.device)

    def meet(
        self, images: Block, texts: Block, sums: Tensor | None, toward_image: Tensor | None, toward_text: Tensor | None
    ) -> None:
        scale, gradient = self._logits.scale, toward_image is not None or toward_text is not None
        sizes = launches.tile_sizes(images, self._architecture)
        # Waves add up in float64: a batch of a million pairs has 65,000.
        total = scale.new_zeros(3, dtype=torch.float64)

        def weigh(wave: Wave) -> None:
            parts = scale.new_zeros(3, wave.programs(sizes))
            launches.pairs_launch(self._logits, images, texts, wave, parts, gradient, self._architecture).run()
            total.add_(parts.sum(1, dtype=total.dtype))

        with torch.cuda.device_of(scale):
            similarity.differentiate(weigh, images.features, texts.features, toward_image, toward_text)
        if sums is not None:
            sums += total
