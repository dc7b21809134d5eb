"""UNITER-base (Chen et al. 2020): one stream of words and regions. A step of masked language, its most frequent task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from torch import Tensor, nn

from benchmarks.plain_uniter import PaddedBatch, PlainUniter, Sizes
from benchmarks.steps import hugging_face
from benchmarks.steps.system import HUGGING_FACE, Products, System, load, redraw
from benchmarks.uniter_pairs import Pair, coco_like_lengths, packed, pad, random_pair
from engine.batch import IMAGE, Batch
from engine.models import VisionLanguageModel
from engine.objectives import Objectives, PretrainingModule, add_heads
from engine.objectives.masked_language import MaskedLanguage
from engine.objectives.masked_region_classes import MaskedRegionClasses
from engine.objectives.masked_region_features import MaskedRegionFeatures
from engine.objectives.random_matching import RandomMatching
from engine.sections import ImageInput, JointStack, Model, Regions

OBJECTIVES = Objectives(
    masked_language=MaskedLanguage(),
    masked_region_features=MaskedRegionFeatures(),
    masked_region_classes=MaskedRegionClasses(),
    random_matching=RandomMatching(),
)
TASK, TASKS_OF_THE_ENGINE = "mlm", ("masked_language",)


def engine_name(name: str) -> str:
    """The packed model's parameter for one of the plain model's."""
    for plain, engine in (
        ("text_embedder.words.weight", "joint.text.words"),
        ("text_embedder.positions.weight", "joint.text.positions"),
        ("text_embedder.types.weight", "joint.text.types"),
        ("text_embedder.", "joint.text."),
        ("region_embedder.", "joint.image."),
        ("pooler.", "joint.pooling.dense."),
        ("masked_language_head.", "heads.masked_language."),
        ("region_feature_head.", "heads.masked_region_features."),
        ("region_class_head.0.", "heads.masked_region_classes."),
        ("region_class_head.1.", "heads.masked_region_classes.classifier."),
        ("matching_head.", "heads.random_matching."),
    ):
        if name.startswith(plain):
            return engine + name.removeprefix(plain)
    return f"joint.{name}"


def load_engine_weights(plain: PlainUniter, engine: VisionLanguageModel) -> None:
    ours = dict(engine.named_parameters())
    weights = {name: ours.pop(engine_name(name)) for name, _ in plain.named_parameters()}
    assert not ours, f"the plain model has no place for {', '.join(ours)}"
    load(plain, weights)


class PackedUniter(PretrainingModule):
    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch)[0]


class PaddedUniter(nn.Module):
    def __init__(self, model: PlainUniter):
        super().__init__()
        self.model = model

    def forward(self, batch: PaddedBatch) -> Tensor:
        return sum(self.model(batch, TASK).values())


class Uniter(System):
    name = "UNITER-base"
    lengths_are = "COCO-like: 10 to 20 words, uniform, and two specials; 10 to 100 regions, 40 on average, Beta(2, 4)"

    def __init__(self, sizes: Sizes, pairs: int, token_budget: int):
        self.sizes, self.pairs, self.token_budget = sizes, pairs, token_budget
        self.layers = f"{sizes.stack.layers} of 12 layers"

    def lengths(self, samples: int, random: np.random.Generator) -> Tensor:
        return coco_like_lengths(samples, random)

    def sample(self, lengths: Sequence[int], random: np.random.Generator) -> Pair:
        return random_pair(lengths, self.sizes, random)

    def packed(self, samples: Sequence[Pair]) -> Batch:
        batch = packed(samples)
        batch.task = TASKS_OF_THE_ENGINE
        return batch

    def padded(self, samples: Sequence[Pair]) -> PaddedBatch:
        return pad(samples)

    def model(self) -> PackedUniter:
        sizes = self.sizes
        image = ImageInput(kind="regions", type_of_text=1)
        stack = JointStack(**asdict(sizes.stack), max_positions=sizes.max_positions, types=2, image=image)
        roles = Model(image=None, text=None, fusion=None, joint=stack)
        model = VisionLanguageModel(roles, sizes.vocab_size, Regions(sizes.feature_values, sizes.classes))
        add_heads(model, OBJECTIVES.active)
        return PackedUniter(redraw(model), OBJECTIVES.active)

    def peer(self, name: str, ours: PackedUniter) -> nn.Module:
        plain = PlainUniter(self.sizes)
        load_engine_weights(plain, ours.model)
        if name == HUGGING_FACE:
            blocks = dict(plain.transformer.named_parameters())
            layers = hugging_face.quietly(hugging_face.BertLayers, self.sizes.stack)
            plain.transformer = load(layers, hugging_face.named("encoder.", hugging_face.bert_weights(blocks)))
        return PaddedUniter(plain)

    def flops(self, batch: Batch) -> float:
        sizes, lengths = self.sizes, batch.layout.lengths.cpu()
        width, words = sizes.stack.width, len(batch.views["masked_language"].targets)
        embedded = 2 * int(lengths[:, IMAGE].sum()) * (sizes.feature_values + 7) * width
        head = 2 * words * width * (width + sizes.vocab_size)
        return 3 * (embedded + Products(sizes.stack)(lengths.sum(1)) + head)

    def tokens(self, batch: Batch) -> tuple[int, int]:
        return batch.layout.num_tokens, batch.layout.num_samples

    def padded_tokens(self, batch: PaddedBatch) -> int:
        return len(batch.text_ids) * batch.joint_length
