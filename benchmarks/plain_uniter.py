"""UNITER in plain, padded PyTorch: the peer of the engine's step, and an oracle for its losses.

Chen et al., 2020, "UNITER: UNiversal Image-TExt Representation Learning". Text and regions are embedded into
one padded tensor, gathered so that padding stands at the end only, and read by BERT.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.plain_transformer import HeadTransform, TiedHead, Transformer, padding_mask
from engine.batch import OnDevice
from engine.sections import Stack

TASKS = ("mlm", "mrfr", "mrc", "mrc_kl", "itm")
IGNORED = -100
TEXT_TYPE, IMAGE_TYPE = 0, 1
BOX_VALUES = 7
ALIGNMENT_WEIGHT = 0.1


def bert(width: int, layers: int, heads: int, dropout: float = 0.1) -> Stack:
    return Stack(
        width=width, layers=layers, heads=heads, mlp_width=4 * width,
        norm="post", eps=1e-12, activation="gelu", dropout=dropout, attention_dropout=dropout,
    )  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """UNITER-base unless said otherwise."""

    stack: Stack = field(default_factory=lambda: bert(768, 12, 12))
    vocab_size: int = 28_996
    max_positions: int = 512
    feature_values: int = 2048
    classes: int = 1601


@dataclass(frozen=True)
class PaddedBatch(OnDevice):
    """B pairs of a caption and an image's regions, zeros behind each; a task reads the fields it needs."""

    text_lengths: Tensor
    """int64 [B], at most L."""
    region_counts: Tensor
    """int64 [B], at most R."""
    joint_length: int
    """Length that a caption and its regions are padded to together."""
    visible: Tensor | None
    """bool [B, 1, 1, joint_length]: what is no padding; none where nothing is."""
    text_ids: Tensor
    """int64 [B, L]: [CLS] caption [SEP]."""
    features: Tensor
    """float32 [B, R, F]."""
    boxes: Tensor
    """float32 [B, R, 7]: x1, y1, x2, y2, w, h as shares of the image's sides, and w * h."""
    masked_ids: Tensor | None = None
    """int64 [B, L]: the captions after masked-language corruption."""
    word_targets: Tensor | None = None
    """int64 [B, L]: the id that stood there, `IGNORED` where nothing is predicted."""
    word_places: Tensor | None = None
    """int64 [2, M]: the samples and positions where something is predicted."""
    region_masked: Tensor | None = None
    """bool [B, R]: what MRFR and MRC hide and predict."""
    soft_labels: Tensor | None = None
    """float32 [B, R, C]: the detector's distribution over its classes; class 0 is the background."""
    own_image: Tensor | None = None
    """int64 [B]: 1 where the image is the caption's own, 0 where it was replaced."""

    @property
    def real_words(self) -> Tensor:
        return padding_mask(self.text_lengths, self.text_ids.shape[1])

    @property
    def real_regions(self) -> Tensor:
        return padding_mask(self.region_counts, self.features.shape[1])


class TextEmbedder(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.stack.width
        self.words = nn.Embedding(sizes.vocab_size, width)
        self.positions = nn.Embedding(sizes.max_positions, width)
        self.types = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, sizes.stack.eps)
        self.dropout = nn.Dropout(sizes.stack.dropout)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.positions.weight[: ids.shape[1]] + self.types.weight[TEXT_TYPE]
        return self.dropout(self.norm(x))


class RegionEmbedder(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        width, eps = sizes.stack.width, sizes.stack.eps
        self.feature_projection = nn.Linear(sizes.feature_values, width)
        self.feature_norm = nn.LayerNorm(width, eps)
        self.box_projection = nn.Linear(BOX_VALUES, width)
        self.box_norm = nn.LayerNorm(width, eps)
        self.mask_row = nn.Parameter(torch.empty(1, sizes.feature_values))
        self.norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(sizes.stack.dropout)

    def forward(self, features: Tensor, boxes: Tensor, kind: Tensor, masked: Tensor | None) -> Tensor:
        features, boxes = features.to(kind.dtype), boxes.to(kind.dtype)
        if masked is not None:
            features = torch.where(masked[..., None], self.mask_row, features)
        x = self.feature_norm(self.feature_projection(features)) + self.box_norm(self.box_projection(boxes))
        return self.dropout(self.norm(x + kind))


class PlainUniter(nn.Module):
    def __init__(self, sizes: Sizes, initializer_range: float = 0.02):
        super().__init__()
        width = sizes.stack.width
        self.text_embedder = TextEmbedder(sizes)
        self.region_embedder = RegionEmbedder(sizes)
        self.transformer = Transformer(sizes.stack)
        self.pooler = nn.Linear(width, width)
        self.masked_language_head = TiedHead(sizes.stack, sizes.vocab_size)
        self.region_feature_head = TiedHead(sizes.stack, sizes.feature_values)
        self.region_class_head = nn.Sequential(HeadTransform(sizes.stack), nn.Linear(width, sizes.classes))
        self.matching_head = nn.Linear(width, 2)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=initializer_range)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def encode(self, batch: PaddedBatch, ids: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
        """Hidden states `[B, joint_length, D]` of caption and regions; `masked` regions are hidden."""
        text = self.text_embedder(batch.text_ids if ids is None else ids)
        kind = self.text_embedder.types.weight[IMAGE_TYPE]
        regions = self.region_embedder(batch.features, batch.boxes, kind, masked)
        joint = gather(torch.cat((text, regions), dim=1), gather_index(batch))
        return self.transformer(joint, batch.visible)

    def forward(self, batch: PaddedBatch, task: str) -> dict[str, Tensor]:
        """The losses of one of `TASKS` by name; each is a mean over this batch."""
        if task == "mlm":
            return {"mlm": self.masked_language_loss(batch)}
        if task == "itm":
            return self.matching_losses(batch)
        hidden = self.encode(batch, masked=batch.region_masked)
        hidden = region_states(hidden, batch)[batch.region_masked]
        if task == "mrfr":
            decoder = self.region_embedder.feature_projection.weight.T
            targets = batch.features[batch.region_masked]
            return {"mrfr": F.mse_loss(self.region_feature_head(hidden, decoder), targets)}
        soft_labels = batch.soft_labels[batch.region_masked].to(hidden.dtype)
        return {task: CLASS_LOSSES[task](self.region_class_head(hidden), soft_labels)}

    def masked_language_loss(self, batch: PaddedBatch) -> Tensor:
        predicted = batch.word_places.unbind()
        hidden = word_states(self.encode(batch, batch.masked_ids), batch)[predicted]
        logits = self.masked_language_head(hidden, self.text_embedder.words.weight)
        return F.cross_entropy(logits, batch.word_targets[predicted])

    def matching_losses(self, batch: PaddedBatch) -> dict[str, Tensor]:
        hidden = self.encode(batch)
        logits = self.matching_head(torch.tanh(self.pooler(hidden[:, 0])))
        distance = optimal_transport(
            word_states(hidden, batch), region_states(hidden, batch), batch.real_words, batch.real_regions
        )
        signed = torch.where(batch.own_image == 1, distance, -distance)
        return {"itm": F.cross_entropy(logits, batch.own_image), "wra": ALIGNMENT_WEIGHT * signed.mean()}


def gather_index(batch: PaddedBatch) -> Tensor:
    """`[B, joint_length]`: which column of padded text, then padded regions, stands where in the joint
    sequence."""
    place = torch.arange(batch.joint_length, device=batch.text_lengths.device)
    behind_text = place - batch.text_lengths[:, None]
    longest_text, most_regions = batch.text_ids.shape[1], batch.features.shape[1]
    index = torch.where(behind_text < 0, place, longest_text + behind_text)
    return index.clamp(max=longest_text + most_regions - 1)


def gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def word_states(hidden: Tensor, batch: PaddedBatch) -> Tensor:
    """`[B, L, D]`: the caption's part of the joint sequence; what is padding there is anything."""
    return hidden[:, : batch.text_ids.shape[1]]


def region_states(hidden: Tensor, batch: PaddedBatch) -> Tensor:
    """`[B, R, D]`: the regions' part of the joint sequence; what is padding there is anything."""
    place = batch.text_lengths[:, None] + torch.arange(batch.features.shape[1], device=batch.text_lengths.device)
    return gather(hidden, place.clamp(max=batch.joint_length - 1))


def class_divergence(logits: Tensor, soft_labels: Tensor) -> Tensor:
    """KL(soft label || prediction) as UNITER averages it: over regions and classes."""
    return F.kl_div(logits.log_softmax(-1), soft_labels, reduction="none").mean()


def class_error(logits: Tensor, soft_labels: Tensor) -> Tensor:
    """Cross-entropy to the likeliest class that is not the background."""
    return F.cross_entropy(logits, soft_labels[:, 1:].argmax(-1) + 1)


CLASS_LOSSES = {"mrc": class_error, "mrc_kl": class_divergence}


def optimal_transport(
    words: Tensor,
    regions: Tensor,
    real_words: Tensor,
    real_regions: Tensor,
    beta: float = 0.5,
    iterations: int = 50,
) -> Tensor:
    """`[B]`: cost of moving each caption's words to its regions under cosine distance, in fp32 at least; no
    gradient through the plan."""
    dtype = torch.promote_types(words.dtype, torch.float32)
    words, regions = (F.normalize(x.to(dtype), dim=-1, eps=1e-5) for x in (words, regions))
    real = real_words[:, :, None] & real_regions[:, None]
    cost = torch.where(real, 1 - words @ regions.mT, 0)
    plan = transport_plan(cost.detach(), real_words, real_regions, beta, iterations)
    return (plan * cost).sum((1, 2))


@torch.no_grad()
def transport_plan(
    cost: Tensor, real_words: Tensor, real_regions: Tensor, beta: float, iterations: int
) -> Tensor:
    """IPOT (Xie et al., 2018) with uniform weights: proximal steps of one Sinkhorn iteration each."""
    real_words, real_regions = real_words[:, :, None], real_regions[:, None]
    num_words, num_regions = real_words.sum(1, keepdim=True), real_regions.sum(2, keepdim=True)
    plan = (real_words & real_regions).to(cost.dtype)
    kernel = torch.exp(-cost / beta) * plan
    word_scale = real_words.to(cost.dtype) / num_words
    for _ in range(iterations):
        step = kernel * plan
        region_scale = torch.where(real_regions, 1 / (num_regions * (word_scale.mT @ step)), 0)
        word_scale = torch.where(real_words, 1 / (num_words * (step @ region_scale.mT)), 0)
        plan = word_scale * step * region_scale
    return plan
