"""Random pairs of a caption and regions, as a packed batch and padded; pair `i` is the same whichever batch it is
in."""

from collections.abc import Sequence

import numpy as np
import torch
import vlkernels as vk

from benchmarks.plain_uniter import IGNORED, Sizes, bert
from benchmarks.uniter_pairs import Pair, random_pair
from engine.batch import Batch, MaskedRegions, MaskedWords, Places, Regions
from engine.models import OneStream
from engine.sections import JointStack

SIZES = Sizes(bert(32, 2, 4, dropout=0.0), vocab_size=120, max_positions=24, feature_values=20, classes=9)
TASKS = ("masked_language", "masked_region_features", "masked_region_classes", "random_matching")


def random_pairs(numbers: Sequence[int], sizes: Sizes = SIZES) -> list[Pair]:
    """Captions of 4 to 11 tokens, 1 to 7 regions."""
    pairs = []
    for number in numbers:
        random = np.random.default_rng(number)
        pairs.append(random_pair((random.integers(4, 12), random.integers(1, 8)), sizes, random))
    return pairs


def region_batch(numbers: Sequence[int], sizes: Sizes = SIZES) -> Batch:
    """A packed batch of these pairs with the fields of every task."""
    return packed(random_pairs(numbers, sizes), numbers)


def packed(pairs: Sequence[Pair], sample_ids: Sequence[int] | None = None) -> Batch:
    """The pairs one behind the other, as the collator packs them."""
    ids = torch.tensor(range(len(pairs)) if sample_ids is None else list(sample_ids), dtype=torch.int32)
    lengths = [[len(pair.text_ids), len(pair.features)] for pair in pairs]
    words = [pair.word_targets != IGNORED for pair in pairs]
    regions = [pair.region_masked for pair in pairs]
    batch = Batch(
        layout=vk.SegmentLayout(lengths, sample_ids=ids),
        text_ids=_joined(pair.text_ids for pair in pairs),
        image=Regions(_joined(pair.features for pair in pairs), _joined(pair.boxes for pair in pairs)),
        labels=torch.arange(len(pairs)),
        sample_ids=ids,
        masked_words=MaskedWords(
            ids=_joined(pair.masked_ids for pair in pairs),
            places=_places(words),
            targets=_joined(pair.word_targets[chosen] for pair, chosen in zip(pairs, words, strict=True)),
        ),
        masked_regions=MaskedRegions(
            places=_places(regions),
            soft_labels=_joined(pair.soft_labels[pair.region_masked] for pair in pairs),
        ),
        own_image=torch.stack([pair.own_image for pair in pairs]),
        counts={"pairs": len(pairs)},
    )
    batch.counts |= {
        "masked_words": len(batch.masked_words.places),
        "masked_regions": len(batch.masked_regions.places),
    }
    return batch


def small_one_stream(
    dropout: float = 0.0, impl: str = "auto", dtype: torch.dtype = torch.float32, sizes: Sizes = SIZES
) -> OneStream:
    """Redrawn, vectors too: at its initialisation a model hides lost biases and swapped norms."""
    stack = sizes.stack
    joint = JointStack(
        width=stack.width, layers=stack.layers, heads=stack.heads, mlp_width=stack.mlp_width, norm="post",
        eps=stack.eps, activation="gelu", dropout=dropout, attention_dropout=dropout,
        max_positions=sizes.max_positions,
    )  # fmt: skip
    model = OneStream(
        joint, sizes.vocab_size, feature_values=sizes.feature_values, classes=sizes.classes, impl=impl
    )
    redraw(model)
    return model.to(dtype)


@torch.no_grad()
def redraw(model: torch.nn.Module) -> None:
    """Matrices with standard deviation 0.25, vectors with 0.5, nothing spared."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(drawn * (0.25 if parameter.dim() >= 2 else 0.5))


def _places(chosen: Sequence[torch.Tensor]) -> Places:
    samples = [torch.full((int(some.sum()),), sample) for sample, some in enumerate(chosen)]
    return Places(torch.cat(samples), torch.cat([some.nonzero()[:, 0] for some in chosen]))


def _joined(tensors) -> torch.Tensor:
    return torch.cat(list(tensors))
