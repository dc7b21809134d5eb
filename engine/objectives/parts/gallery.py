"""Held-out pairs, encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import vlkernels as vk
from torch import Tensor

from engine.batch import Batch
from engine.models import VisionLanguageModel
from engine.models.transformer import Tokens


@dataclass(frozen=True)
class Gallery:
    """Pairs that are ranked against each other: image `i` and text `i` belong together, and so do equal
    labels."""

    images: Tokens
    texts: Tokens
    image_features: Tensor
    text_features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def related(self) -> Tensor:
        """bool `[N, N]`: text `j` is a right answer for image `i`."""
        return self.labels[:, None] == self.labels[None, :]

    @property
    def similarity(self) -> Tensor:
        """`[N, N]` cosine of image `i` and text `j`."""
        return self.image_features.float() @ self.text_features.float().T


def encode_gallery(model: VisionLanguageModel, batches: Iterable[Batch]) -> Gallery:
    """Both towers over all batches."""
    images, texts, image_features, text_features, labels = [], [], [], [], []
    for batch in batches:
        with model.passes_shared():
            images.append(model.image_states(batch))
            texts.append(model.text_states(batch) if model.fusion is None else model.before_fusion(batch))
            image_features.append(model.image_features(batch))
            text_features.append(model.text_features(batch))
        labels.append(batch.labels)
    return Gallery(
        images=concatenate(images),
        texts=concatenate(texts),
        image_features=torch.cat(image_features),
        text_features=torch.cat(text_features),
        labels=torch.cat(labels),
    )


def concatenate(streams: Sequence[Tokens]) -> Tokens:
    """Streams one behind the other."""
    hidden = torch.cat([tokens.hidden for tokens in streams])
    lengths = torch.cat([tokens.layout.lengths for tokens in streams]).cpu()
    return Tokens(hidden, vk.SegmentLayout(lengths).to(hidden.device))
