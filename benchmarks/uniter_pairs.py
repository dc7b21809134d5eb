"""What UNITER's step is timed on: pairs as long as COCO's, in random batches or in UNITER's own.

    rows = coco_like_lengths(8192, generator)
    for index in token_bucket_batches(rows.sum(1), 10_240, generator): ...
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import vlkernels as vk
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.plain_transformer import attention_mask, padding_mask
from benchmarks.plain_uniter import IGNORED, PaddedBatch, Sizes
from engine.batch import TEXT, Batch, MaskedRegions, MaskedWords, Places, Regions, Text

CLS, SEP, MASK, FIRST_WORD = 101, 102, 103, 104
FEWEST_REGIONS, MOST_REGIONS = 10, 100
MASKED = 0.15
BUCKET = 8192
MULTIPLE = 8


@dataclass(frozen=True)
class Pair:
    """One caption and one image, fields as in `PaddedBatch` without its padding."""

    text_ids: Tensor
    features: Tensor
    boxes: Tensor
    masked_ids: Tensor
    word_targets: Tensor
    region_masked: Tensor
    soft_labels: Tensor
    own_image: Tensor


def coco_like_lengths(pairs: int, random: np.random.Generator) -> Tensor:
    """`[pairs, 2]`: tokens of a caption (10 to 20 words, uniform, and two specials) and regions of an image
    (Beta(2, 4) stretched over 10 to 100, hence 40 on average, most often 32, and a long tail)."""
    words = random.integers(10, 21, pairs)
    regions = FEWEST_REGIONS + (MOST_REGIONS - FEWEST_REGIONS) * random.beta(2, 4, pairs)
    return torch.from_numpy(np.stack((words + 2, regions.round().astype(np.int64)), axis=1))


def random_batches(pairs: int, pairs_per_batch: int, random: np.random.Generator) -> list[Tensor]:
    """Shuffled; what fills no batch is dropped."""
    full = pairs - pairs % pairs_per_batch
    return list(torch.from_numpy(random.permutation(pairs)[:full]).view(-1, pairs_per_batch))


def token_bucket_batches(lengths: Tensor, token_budget: int, random: np.random.Generator) -> list[Tensor]:
    """UNITER's batches: buckets of 8,192 shuffled pairs, sorted by length; as many pairs, in eights, as the
    budget holds when all are padded to the longest.

    As released: the longest is the bucket's, not the batch's, and the last batch of a bucket is dropped.
    """
    batches = []
    for bucket in torch.from_numpy(random.permutation(len(lengths))).split(BUCKET):
        bucket = bucket[lengths[bucket].argsort(descending=True, stable=True)]
        longest = int(lengths[bucket[0]])
        pairs = token_budget // longest // MULTIPLE * MULTIPLE
        if pairs == 0:
            expected = f"{MULTIPLE} pairs of {longest} tokens"
            raise ValueError(f"token_budget must hold {expected}, got {token_budget}")
        batches += bucket.split(pairs)[:-1]
    return [batches[i] for i in random.permutation(len(batches))]


def random_pair(length: Sequence[int], sizes: Sizes, random: np.random.Generator) -> Pair:
    """Values without meaning; shapes and masks as in pretraining, with a masked word and region at least."""
    tokens, regions = (int(n) for n in length)
    words = torch.from_numpy(random.integers(FIRST_WORD, sizes.vocab_size, tokens - 2))
    chosen = torch.from_numpy(chosen_at_random(tokens - 2, random))
    x1, y1 = random.random((2, regions)) * 0.5
    w, h = 0.05 + random.random((2, regions)) * 0.4
    boxes = np.stack((x1, y1, x1 + w, y1 + h, w, h, w * h), axis=1).astype(np.float32)
    class_scores = random.standard_normal((regions, sizes.classes), np.float32)
    return Pair(
        text_ids=with_specials(words, CLS, SEP),
        features=torch.from_numpy(random.standard_normal((regions, sizes.feature_values), np.float32)),
        boxes=torch.from_numpy(boxes),
        masked_ids=with_specials(words.masked_fill(chosen, MASK), CLS, SEP),
        word_targets=with_specials(words.masked_fill(~chosen, IGNORED), IGNORED, IGNORED),
        region_masked=torch.from_numpy(chosen_at_random(regions, random)),
        soft_labels=torch.from_numpy(class_scores).softmax(-1),
        own_image=torch.tensor(int(random.random() < 0.5)),
    )


def chosen_at_random(count: int, random: np.random.Generator) -> np.ndarray:
    chosen = random.random(count) < MASKED
    if not chosen.any():
        chosen[random.integers(count)] = True
    return chosen


def with_specials(words: Tensor, first: int, last: int) -> Tensor:
    return torch.cat((torch.tensor([first]), words, torch.tensor([last])))


def pad(pairs: Sequence[Pair], multiple: int = 1) -> PaddedBatch:
    """Captions and regions to the longest of each, pairs to the longest pair rounded up to a `multiple`."""
    text_lengths = torch.tensor([len(pair.text_ids) for pair in pairs])
    region_counts = torch.tensor([len(pair.features) for pair in pairs])
    lengths = text_lengths + region_counts
    joint_length = -(-int(lengths.max()) // multiple) * multiple

    def padded(name: str, value: int = 0) -> Tensor:
        return pad_sequence([getattr(pair, name) for pair in pairs], batch_first=True, padding_value=value)

    word_targets = padded("word_targets", IGNORED)
    ragged = ("text_ids", "masked_ids", "features", "boxes", "region_masked", "soft_labels")
    return PaddedBatch(
        text_lengths=text_lengths,
        region_counts=region_counts,
        joint_length=joint_length,
        visible=attention_mask(padding_mask(lengths, joint_length)),
        word_targets=word_targets,
        word_places=(word_targets != IGNORED).nonzero().T,
        own_image=torch.stack([pair.own_image for pair in pairs]),
        **{name: padded(name) for name in ragged},
    )


def packed(pairs: Sequence[Pair], sample_ids: Sequence[int] | None = None) -> Batch:
    """The pairs one behind the other, as the collator packs them."""
    ids = torch.tensor(range(len(pairs)) if sample_ids is None else list(sample_ids), dtype=torch.int32)
    lengths = [[len(pair.text_ids), len(pair.features)] for pair in pairs]
    words = [pair.word_targets != IGNORED for pair in pairs]
    regions = [pair.region_masked for pair in pairs]
    layout = vk.SegmentLayout(lengths, sample_ids=ids)
    masked_words = MaskedWords(
        ids=joined(pair.masked_ids for pair in pairs),
        places=places_of(words),
        targets=joined(pair.word_targets[chosen] for pair, chosen in zip(pairs, words, strict=True)),
    )
    masked_regions = MaskedRegions(
        places=places_of(regions),
        soft_labels=joined(pair.soft_labels[pair.region_masked] for pair in pairs),
    )
    views = {
        "masked_language": masked_words,
        "masked_region_features": masked_regions,
        "masked_region_classes": masked_regions,
    }
    return Batch(
        layout=layout,
        text=Text(joined(pair.text_ids for pair in pairs), layout.select((TEXT,))),
        image=Regions(joined(pair.features for pair in pairs), joined(pair.boxes for pair in pairs)),
        labels=torch.arange(len(pairs)),
        sample_ids=ids,
        views={**views, "random_matching": torch.stack([pair.own_image for pair in pairs])},
        counts={"pairs": len(pairs), **{name: len(view) for name, view in views.items()}},
    )


def places_of(chosen: Sequence[Tensor]) -> Places:
    samples = [torch.full((int(some.sum()),), sample) for sample, some in enumerate(chosen)]
    return Places(torch.cat(samples), torch.cat([some.nonzero()[:, 0] for some in chosen]))


def joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(tensors))
