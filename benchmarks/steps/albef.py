"""ALBEF-base (Li et al. 2021): two towers, and a fusion encoder that reads the image by cross-attention.

Contrastive loss, matching with hard negatives and masked language on one batch, as the engine has them: without the momentum
model and its queue, and the image's feature is a mean of its patches in place of a class token. The peer is the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.plain_quickstart import PaddedPairs, PlainModel
from benchmarks.steps.system import HUGGING_FACE, PADDED, Products, System, load, long_tailed, redraw
from benchmarks.uniter_pairs import CLS, FIRST_WORD, MASK, SEP, chosen_at_random
from engine.batch import IMAGE, TEXT, Batch, MaskedWords, Patches, Places, Sample, Words
from engine.data import collate
from engine.models import VisionLanguageModel
from engine.objectives import Objectives, PretrainingModule, add_heads
from engine.objectives.contrastive import Contrastive
from engine.objectives.masked_language import MaskedLanguage
from engine.objectives.matching import Matching, draw_negatives
from engine.sections import FusionStack, ImageStack, Model, TextStack

OBJECTIVES = Objectives(
    contrastive=Contrastive(), matching=Matching(negatives="local"), masked_language=MaskedLanguage()
)
MOST_WORDS, SPECIALS = 28, 2


def base(width: int, layers: tuple[int, int, int], heads: int, patch: int = 16, grid: int = 16) -> Model:
    """ViT and the two halves of BERT."""
    sizes: dict[str, Any] = {"width": width, "heads": heads, "mlp_width": 4 * width}
    bert = sizes | {"norm": "post", "eps": 1e-12, "activation": "gelu", "dropout": 0.1, "attention_dropout": 0.1}
    image, text, fusion = layers
    return Model(
        image=ImageStack(
            **sizes, layers=image, norm="pre", eps=1e-6, activation="gelu", patch_size=patch, max_grid=(grid, grid)
        ),
        text=TextStack(**bert, layers=text, max_positions=512),
        fusion=FusionStack(**bert, layers=fusion),
        projection_dim=256,
    )


@dataclass(frozen=True)
class Shape:
    """ALBEF-base, 256 x 256 pixels, unless said otherwise."""

    model: Model = field(default_factory=lambda: base(768, (12, 6, 6), 12))
    vocab_size: int = 30_522


class Summed(nn.Module):
    """The sum of a model's losses."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Any, **options: Any) -> Tensor:
        return sum(self.model(batch, **options).values())


class PackedAlbef(PretrainingModule):
    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch)[0]


class Albef(System):
    name = "ALBEF-base"
    lengths_are = (
        "256 patches of an image; captions of web pages and COCO: log-normal, median 10 tokens, sigma 0.5, at most 28, "
        "and two specials"
    )

    def __init__(self, shape: Shape, pairs: int):
        self.shape, self.pairs = shape, pairs
        model = shape.model
        self.layers = f"{model.image.layers}, {model.text.layers} and {model.fusion.layers} of 12, 6 and 6 layers"

    def lengths(self, samples: int, random: np.random.Generator) -> Tensor:
        words = SPECIALS + long_tailed(samples, 10, 0.5, MOST_WORDS, random)
        rows, columns = self.shape.model.image.max_grid
        return torch.from_numpy(np.stack((words, np.full(samples, rows * columns)), axis=1))

    def sample(self, lengths: Sequence[int], random: np.random.Generator) -> Sample:
        words = random.integers(FIRST_WORD, self.shape.vocab_size, int(lengths[TEXT]) - SPECIALS)
        ids = np.concatenate(([CLS], words, [SEP]))
        chosen = 1 + chosen_at_random(len(words), random).nonzero()[0]
        masked = ids.copy()
        masked[chosen] = MASK
        values = random.standard_normal((int(lengths[IMAGE]), 3 * self.shape.model.image.patch_size**2), np.float32)
        grid = np.indices(self.shape.model.image.max_grid, dtype=np.int32).reshape(2, -1).T
        hidden = MaskedWords(torch.from_numpy(masked), Places.of_sample(chosen), torch.from_numpy(ids[chosen]))
        return Sample(
            text=Words(ids, np.arange(len(ids))),
            image=Patches(torch.from_numpy(values), torch.from_numpy(grid)),
            identity=int(random.integers(2**31)),
            views={"masked_language": hidden},
        )

    def packed(self, samples: Sequence[Sample]) -> Batch:
        return collate(list(samples), range(len(samples)))

    def padded(self, samples: Sequence[Sample]) -> PaddedPairs:
        return PaddedPairs.of(self.packed(samples))

    def model(self) -> PackedAlbef:
        model = VisionLanguageModel(self.shape.model, self.shape.vocab_size)
        add_heads(model, OBJECTIVES.active)
        return PackedAlbef(redraw(model), OBJECTIVES.active)

    def peer(self, name: str, ours: nn.Module) -> nn.Module:
        if name == HUGGING_FACE:
            raise ValueError("transformers has no ALBEF")
        assert name == PADDED
        plain = Summed(PlainModel(self.shape.model, self.shape.vocab_size))
        return load(plain, dict(ours.named_parameters()))

    def agreeing(self, ours: PackedAlbef, batch: Batch) -> dict[str, Any]:
        return {"negatives": draw_negatives(ours.model, batch, None, 1.0)}

    def flops(self, batch: Batch) -> float:
        """A hard negative has the length of the text whose place it takes."""
        model, lengths = self.shape.model, batch.layout.lengths.cpu()
        text, image, pairs = lengths[:, TEXT], lengths[:, IMAGE], len(lengths)
        width, words = model.text.width, len(batch.views["masked_language"].targets)
        embedded = 2 * int(image.sum()) * 3 * model.image.patch_size**2 * model.image.width
        source = 4 * int(image.sum()) * model.image.width * width * model.fusion.layers
        fused = Products(model.fusion)(text) + Products(model.fusion).cross(text, image)
        features = 2 * pairs * model.projection_dim * (model.image.width + width) + 2 * pairs**2 * model.projection_dim
        heads = 12 * pairs * width + 2 * words * width * (width + self.shape.vocab_size)
        towers = Products(model.image)(image) + 2 * Products(model.text)(text)
        return 3 * (embedded + towers + source + 4 * fused + features + heads)

    def tokens(self, batch: Batch) -> tuple[int, int]:
        return batch.layout.num_tokens, batch.layout.num_samples

    def padded_tokens(self, batch: PaddedPairs) -> int:
        return batch.text_ids.numel() + batch.patches.shape[0] * batch.patches.shape[1]
