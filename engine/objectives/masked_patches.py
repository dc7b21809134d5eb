"""Masked autoencoding of pictures (MAE)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F

from engine.batch import Batch, OnDevice, Patches, Places, Sample
from engine.corruption.image_tokens import keep_patches
from engine.models.embedding.places import TabledPlaces
from engine.models.embedding.rows import table
from engine.models.passes import drawn_as
from engine.models.transformer import PackedTransformer, SelectedRows, Tokens
from engine.objectives.parts.held_out import Figures, HeldOut, require_some
from engine.objectives.parts.normalization import normalizer, widened
from engine.objectives.parts.objective import Draw, Losses, Objective, Report
from engine.sections import Stack, require, require_positive

EPSILON = 1e-6
"""Added to the variance of a patch."""


@dataclass
class KeptPatches(OnDevice):
    """The patches that are read, and those that are to be predicted."""

    kept: Places
    hidden: Places

    def __len__(self) -> int:
        return len(self.hidden)


@dataclass
class MaskedPatches(Objective):
    """Masked autoencoding: the pixels of hidden patches from the others, which alone are read (MAE).

    Squared error of a patch's pixels, normalised by their own mean and deviation; mean over hidden patches and pixels.
    """

    roles: ClassVar[tuple[str, ...]] = ("image",)

    probability: float = 0.75
    """Share of the patches that are hidden."""
    width: int = 512
    """Hidden size of the decoder."""
    layers: int = 8
    """Its blocks."""
    heads: int = 16
    """Its attention heads."""

    def __post_init__(self) -> None:
        require(
            0 < self.probability < 1,
            f"objectives.masked_patches.probability must be between 0 and 1, got {self.probability}",
        )
        require_positive(self, "objectives.masked_patches", "width", "layers", "heads")

    def check(self, config: Any) -> None:
        super().check(config)
        image = config.model.image
        require(
            image.kind == "patches" and image.class_tokens == 1,
            "objectives.masked_patches needs model.image.kind patches and one class token of model.image, got "
            f"{image.kind} and {image.class_tokens}",
        )

    def prepare(self, sample: Sample, draw: Draw) -> None:
        kept, hidden = keep_patches(len(sample.image), self.probability, draw.random)
        require(len(kept) > 0, f"{len(sample.image)} patches, of which masked_patches keeps none")
        sample.views[self.name] = KeptPatches(Places.of_sample(kept), Places.of_sample(hidden))

    def build_head(self, model: Any) -> nn.Module:
        image = model.options.image
        stack = replace(
            Stack(), width=self.width, layers=self.layers, heads=self.heads, mlp_width=4 * self.width, eps=image.eps,
            activation=image.activation,
        )  # fmt: skip
        return PatchDecoder(stack, image.width, 3 * image.patch_size**2, tuple(image.max_grid), model.impl)

    def __call__(self, model: Any, batch: Batch) -> tuple[Losses, Report]:
        view = batch.views[self.name]
        whole = model.image.embedder.layout(batch.image_layout)
        predicted = model.heads[self.name](self.read(model, batch), batch.image.positions, view, whole)
        targets = normalised(batch.image.values[view.hidden.rows(batch.image_layout)])
        total = F.mse_loss(widened(predicted), targets, reduction="sum") / targets.shape[1]
        return {self.name: total * normalizer(batch, self.name)}, {}

    def read(self, model: Any, batch: Batch) -> Tokens:
        """States of class tokens and kept patches."""
        places = batch.views[self.name].kept
        rows = places.rows(batch.image_layout)
        layout = SelectedRows.of(rows, places.samples, batch.image_layout).layout
        patches = Patches(batch.image.values[rows], batch.image.positions[rows])
        return model.image(patches, drawn_as(layout, batch, self.name), model.rng)

    def measure(self, model: Any, held_out: HeldOut) -> Figures:
        """Squared error, and that of one grey for the whole of each patch, which is the mean of what is predicted."""
        loss, count, grey = 0.0, 0, 0.0
        for batch in held_out.batches(self.name):
            loss += self(model, batch)[0][self.name].item()
            hidden = batch.views[self.name].hidden.rows(batch.image_layout)
            grey += normalised(batch.image.values[hidden]).square().mean(1).sum().item()
            count += len(hidden)
        require_some(count, "hidden patches")
        return {self.name: {"loss": loss / count, "loss_mean_of_patch": grey / count}}


def normalised(pixels: Tensor) -> Tensor:
    """`[M, P]`: every patch with mean 0 and variance 1."""
    pixels = widened(pixels)
    return (pixels - pixels.mean(1, keepdim=True)) * (pixels.var(1, keepdim=True) + EPSILON).rsqrt()


class PatchDecoder(nn.Module):
    """A small transformer over all places of a picture: states where patches were read, one learned row elsewhere."""

    def __init__(self, stack: Stack, width: int, values: int, grid: tuple[int, int], impl: str):
        super().__init__()
        self.narrowing = nn.Linear(width, stack.width)
        self.mask_row = table(1, stack.width)
        self.places = TabledPlaces(grid, stack.width, learned=False, class_tokens=1)
        self.transformer = PackedTransformer(stack, itertools.count(), impl=impl)  # nothing is dropped
        self.pixels = nn.Linear(stack.width, values)
        self.impl = impl

    def forward(self, read: Tokens, positions: Tensor, view: KeptPatches, whole: vk.SegmentLayout) -> Tensor:
        """`[M, P]`: the hidden patches; `whole` is the layout of class tokens and all patches."""
        segments = ((0,), (1,))
        places = whole.starts[:, 0].long(), view.kept.rows(whole, segment=1)
        rows = self.mask_row.expand(whole.num_tokens, -1)
        rows = rows.index_copy(0, vk.put_segments(places, read.layout, segments, impl=self.impl), self.narrowing(read.hidden))
        (waves,), ids = self.places.lookup(positions)
        of_class = ids.new_zeros(whole.num_samples)
        waves = vk.take_rows(waves, vk.put_segments((of_class, ids[:, 0]), whole, segments, impl=self.impl), impl=self.impl)
        hidden = SelectedRows.of(view.hidden.rows(whole, segment=1), view.hidden.samples, whole)
        return self.pixels(self.transformer(Tokens(rows + waves.to(rows.dtype), whole), selected=hidden).hidden)
