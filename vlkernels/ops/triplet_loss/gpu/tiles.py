"""impl "triton" of the triplet loss: what the driver asks of two blocks, as launches and products."""

from __future__ import annotations

import torch
from torch import Tensor

from vlkernels.core import similarity, triton_runtime
from vlkernels.core.exchange import Block
from vlkernels.core.similarity import Wave
from vlkernels.ops.triplet_loss.driver import Hardest
from vlkernels.ops.triplet_loss.gpu import launches

MAGNITUDE = 0x7FFFFFFF


class Tiles:
    """Nothing is kept from visit to visit; see ``driver.Tiles``."""

    def __init__(self, labels: Tensor | None, like: Tensor):
        self._labels = labels
        self._architecture = triton_runtime.architecture(like.device)

    def hardest(self, images: Block, texts: Block, of_images: Hardest, of_texts: Hardest) -> None:
        sides = (images, of_images), (texts, of_texts)
        ranks = tuple(ranked(found.similarity[side.span], found.place[side.span]) for side, found in sides)
        with torch.cuda.device_of(images.features):
            launches.hardest_launch(images, texts, self._labels, ranks, self._architecture).run()
        for (side, found), of_side in zip(sides, ranks, strict=True):
            found.similarity[side.span], found.place[side.span] = unranked(of_side)

    def push_hardest(
        self,
        images: Block,
        texts: Block,
        of_images: Hardest,
        of_texts: Hardest,
        toward_image: Tensor | None,
        toward_text: Tensor | None,
    ) -> None:
        in_texts, in_images = _places(images, of_images, texts), _places(texts, of_texts, images)
        with torch.cuda.device_of(images.features):
            if toward_image is not None:
                _gather(toward_image, texts, in_texts, in_images)
            if toward_text is not None:
                _gather(toward_text, images, in_images, in_texts)

    def summed(
        self,
        images: Block,
        texts: Block,
        least: Tensor,
        value: Tensor | None,
        pushes: Tensor | None,
        toward_image: Tensor | None,
        toward_text: Tensor | None,
    ) -> None:
        gradient = toward_image is not None or toward_text is not None
        sizes = launches.tile_sizes(images, self._architecture)
        counts = tuple(least.new_zeros(len(side.features), dtype=torch.int32) for side in (images, texts))
        # Waves add up in float64: a batch of a million pairs has 65,000.
        total = least.new_zeros((), dtype=torch.float64)

        def weigh(wave: Wave) -> None:
            parts = least.new_empty(wave.programs(sizes))
            launches.exceeding_launch(
                images, texts, self._labels, least, wave, counts, parts, gradient, self._architecture
            ).run()
            total.add_(parts.sum(dtype=total.dtype))

        with torch.cuda.device_of(least):
            similarity.differentiate(weigh, images.features, texts.features, toward_image, toward_text)
        if value is not None:
            value += total
        if pushes is not None:
            for side, of_side in zip((images, texts), counts, strict=True):
                pushes[side.span] += of_side


def ranked(similarities: Tensor, places: Tensor) -> Tensor:
    """int64 in the order of float32 similarities, of equal ones the first place the largest."""
    bits = similarities.view(torch.int32)
    return ((bits ^ ((bits >> 31) & MAGNITUDE)).long() << 32) | (places ^ MAGNITUDE)


def unranked(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """The float32 similarities and the places of :func:`ranked`."""
    ordered = (ranks >> 32).int()
    return (ordered ^ ((ordered >> 31) & MAGNITUDE)).view(torch.float32), (ranks & MAGNITUDE) ^ MAGNITUDE


def _places(rows: Block, hardest: Hardest, others: Block) -> Tensor:
    """Where the hardest negatives of the rows that push lie in ``others``; -1 for rows that push none of these."""
    place = hardest.place[rows.span] - others.start
    here = (place >= 0) & (place < len(others.features)) & (hardest.push[rows.span] > 0)
    return torch.where(here, place, -1)


def _gather(toward: Tensor, features: Block, places: Tensor, destinations: Tensor) -> None:
    """``toward[i]`` += the feature at ``places[i]`` and every feature j whose ``destinations[j]`` is i; -1 is none."""
    ordered, order = destinations.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(len(toward) + 1, device=toward.device))
    launches.gather_launch(toward, features.features, places, order, bounds).run()
