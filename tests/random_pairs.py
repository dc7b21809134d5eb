"""Random pairs of a caption and regions, as a packed batch and padded; pair `i` is the same whichever batch
it is in."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.plain_uniter import Sizes, bert
from benchmarks.uniter_pairs import Pair, packed, random_pair
from engine.batch import IMAGE, TEXT, Batch
from engine.models import VisionLanguageModel
from engine.objectives import Objectives, add_heads
from engine.objectives.masked_language import MaskedLanguage
from engine.objectives.masked_region_classes import MaskedRegionClasses
from engine.objectives.masked_region_features import MaskedRegionFeatures
from engine.objectives.random_matching import RandomMatching
from engine.sections import ImageInput, JointStack, Model, Regions

SIZES = Sizes(bert(32, 2, 4, dropout=0.0), vocab_size=120, max_positions=24, feature_values=20, classes=9)
UNITER = {"types": 2, "image": ImageInput(kind="regions", type_of_text=1)}
"""Options of a joint stream of words and regions."""
TASKS = ("masked_language", "masked_region_features", "masked_region_classes", "random_matching")
FOUR = Objectives(
    masked_language=MaskedLanguage(),
    masked_region_features=MaskedRegionFeatures(),
    masked_region_classes=MaskedRegionClasses(),
    random_matching=RandomMatching(),
)

VIEWS = {None: None, TEXT: "masked_language", IMAGE: "masked_region_features"}
"""What hides tokens of a segment."""


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


def small_stack(sizes: Sizes = SIZES, dropout: float = 0.0) -> JointStack:
    """The engine's section for the same transformer."""
    stack = dataclasses.asdict(sizes.stack)
    return JointStack(
        **stack | {"dropout": dropout, "attention_dropout": dropout},
        max_positions=sizes.max_positions,
        **UNITER,
    )


def one_stream(
    stack: JointStack, vocab_size: int, regions: Regions, impl: str = "auto", initializer_range: float = 0.02
) -> VisionLanguageModel:
    """A model of a joint stream alone."""
    options = Model(image=None, text=None, fusion=None, joint=stack, initializer_range=initializer_range)
    return VisionLanguageModel(options, vocab_size, regions, impl)


def small_one_stream(
    dropout: float = 0.0, impl: str = "auto", dtype: torch.dtype = torch.float32
) -> VisionLanguageModel:
    """Redrawn, vectors too: at its initialisation a model hides lost biases and swapped norms."""
    regions = Regions(SIZES.feature_values, SIZES.classes)
    model = one_stream(small_stack(dropout=dropout), SIZES.vocab_size, regions, impl)
    add_heads(model, FOUR.active)
    redraw(model)
    return model.to(dtype)


@torch.no_grad()
def redraw(model: torch.nn.Module) -> None:
    """Matrices with standard deviation 0.25, vectors with 0.5, nothing spared."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(drawn * (0.25 if parameter.dim() >= 2 else 0.5))
