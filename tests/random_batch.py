"""Batches of random pairs for tests: pair `i` has the same values whichever batch it is in."""

import numpy as np
import torch

from engine.batch import Batch, MaskedWords, Patches, Places, Sample, Words
from engine.data import collate
from engine.models import VisionLanguageModel
from engine.objectives import Objectives, add_heads
from engine.objectives.contrastive import Contrastive
from engine.objectives.masked_language import MaskedLanguage
from engine.objectives.matching import Matching
from engine.sections import FusionStack, ImageStack, Model, TextStack

VOCAB = 40
PATCH = 4
GRID = (3, 4)
MASK_ID = 3
THREE = Objectives(contrastive=Contrastive(), matching=Matching(), masked_language=MaskedLanguage())


def random_sample(number: int) -> Sample:
    """Ragged grids, ragged captions, one to three masked words; pairs 0 and 5 share an image label."""
    random = np.random.default_rng(number)
    rows, columns = random.integers(1, GRID[0] + 1), random.integers(1, GRID[1] + 1)
    text_ids = random.integers(4, VOCAB, random.integers(4, 12)).astype(np.int64)
    text_ids[0], text_ids[-1] = 1, 2
    chosen = np.sort(random.choice(np.arange(1, len(text_ids) - 1), random.integers(1, 3), replace=False))
    masked_ids = text_ids.copy()
    masked_ids[chosen] = MASK_ID
    targets = torch.from_numpy(text_ids[chosen])
    return Sample(
        text=Words(text_ids, np.arange(len(text_ids))),
        image=random_patches(rows, columns, random),
        identity=0 if number == 5 else number,
        views={"masked_language": MaskedWords(torch.from_numpy(masked_ids), Places.of_sample(chosen), targets)},
    )


def random_patches(rows: int, columns: int, random: np.random.Generator) -> Patches:
    values = random.standard_normal((rows * columns, 3 * PATCH**2)).astype(np.float32)
    positions = np.indices((rows, columns), dtype=np.int32).reshape(2, -1).T
    return Patches(torch.from_numpy(values), torch.from_numpy(positions))


def random_batch(numbers: range) -> Batch:
    return collate([random_sample(number) for number in numbers], numbers)


def small_config(dropout: float = 0.0, cross_every: int = 1) -> Model:
    sizes = {
        "width": 32,
        "layers": 2,
        "heads": 2,
        "mlp_width": 48,
        "dropout": dropout,
        "attention_dropout": dropout,
    }
    return Model(
        image=ImageStack(**sizes, patch_size=PATCH, max_grid=GRID),
        text=TextStack(**sizes, max_positions=16),
        fusion=FusionStack(**sizes, cross_every=cross_every),
        projection_dim=24,
    )


def small_model(
    dropout: float = 0.0, impl: str = "auto", dtype: torch.dtype = torch.float32
) -> VisionLanguageModel:
    """Redrawn so that every parameter matters: at its initialisation a model hides lost biases and swapped
    norms."""
    torch.manual_seed(3)
    model = VisionLanguageModel(small_config(dropout), VOCAB, impl=impl)
    add_heads(model, THREE.active)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() >= 2 else 0.4))
    return model.to(dtype)
