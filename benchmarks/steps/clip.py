"""CLIP ViT-B/32 (Radford et al. 2021): two pre-norm towers and a contrastive loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.plain_transformer import CAUSAL, Transformer
from benchmarks.steps import hugging_face
from benchmarks.steps.system import HUGGING_FACE, PADDED, Products, System, load, long_tailed, redraw
from engine.batch import OnDevice
from engine.models.transformer import PackedTransformer, SelectedRows, Tokens
from engine.sections import Stack

SCALE = math.log(1 / 0.07)
MOST_WORDS, SPECIALS = 75, 2


def pre_norm(width: int, layers: int, heads: int) -> Stack:
    return Stack(width=width, layers=layers, heads=heads, mlp_width=4 * width, norm="pre", activation="quick_gelu")


@dataclass(frozen=True)
class Shape:
    """ViT-B/32 unless said otherwise."""

    image: Stack = field(default_factory=lambda: pre_norm(768, 12, 12))
    text: Stack = field(default_factory=lambda: pre_norm(512, 12, 8))
    vocab_size: int = 49_408
    positions: int = MOST_WORDS + SPECIALS
    patch: int = 32
    grid: int = 7
    features: int = 512

    @property
    def patches(self) -> int:
        return self.grid**2

    @property
    def patch_values(self) -> int:
        return 3 * self.patch**2


@dataclass(frozen=True)
class Sample:
    ids: Tensor
    """int64 [L]: words between a first and a last token."""
    patches: Tensor
    """float32 [49, 3 * 32 * 32]."""


@dataclass(frozen=True)
class PackedBatch(OnDevice):
    text: vk.SegmentLayout
    image: vk.SegmentLayout
    """The class token and the patches of each."""
    ids: Tensor
    patches: Tensor
    """float32 [B * 49, values]."""
    table_rows: Tensor
    """int32 [B * 50, 3]: position, class token and patch of each row of the image stream; -1 where it has none."""


@dataclass(frozen=True)
class PaddedBatch(OnDevice):
    """Texts to the longest; what follows a text is not seen by it, so there is no mask of padding."""

    ids: Tensor
    last: Tensor
    pixels: Tensor
    """float32 [B, 3, 224, 224]."""


class PackedClip(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        streams = itertools.count()
        width = shape.image.width
        self.patch_map = nn.Linear(shape.patch_values, width, bias=False)
        self.class_row = nn.Parameter(torch.randn(1, width) * 0.02)
        self.image_positions = nn.Parameter(torch.randn(1 + shape.patches, width) * 0.02)
        self.entry_norm = vk.FusedLayerNorm(width, shape.image.eps)
        self.image_tower = PackedTransformer(shape.image, streams)
        self.words = nn.Parameter(torch.randn(shape.vocab_size, shape.text.width) * 0.02)
        self.text_positions = nn.Parameter(torch.randn(shape.positions, shape.text.width) * 0.01)
        self.text_tower = PackedTransformer(shape.text, streams)
        self.image_map = nn.Linear(width, shape.features, bias=False)
        self.text_map = nn.Linear(shape.text.width, shape.features, bias=False)
        self.log_scale = nn.Parameter(torch.tensor([SCALE]))

    def forward(self, batch: PackedBatch) -> Tensor:
        image = F.normalize(self.image_map(self.first_rows(batch)), dim=-1)
        text = F.normalize(self.text_map(self.last_rows(batch)), dim=-1)
        return vk.contrastive_loss(image, text, self.log_scale.exp())

    def first_rows(self, batch: PackedBatch) -> Tensor:
        norm, layout = self.entry_norm, batch.image
        tables = [self.image_positions, self.class_row, self.patch_map(batch.patches.to(self.words.dtype))]
        hidden = vk.embed_layer_norm(batch.table_rows, tables, norm.weight, bias=norm.bias, eps=norm.eps, layout=layout)
        samples = torch.arange(layout.num_samples, device=hidden.device)
        read = SelectedRows.of(layout.starts[:, 0].long(), samples, layout)
        return self.image_tower(Tokens(hidden, layout), selected=read).hidden

    def last_rows(self, batch: PackedBatch) -> Tensor:
        layout = batch.text
        hidden = F.embedding(batch.ids, self.words) + F.embedding(layout.token_position(), self.text_positions)
        read = self.text_tower(Tokens(hidden, layout), mask=vk.SegmentMask.causal(1)).hidden
        return vk.take_rows(read, layout.starts[:, 0] + layout.lengths[:, 0] - 1)


class PaddedClip(nn.Module):
    """Parameters are named as the packed one's."""

    def __init__(self, shape: Shape):
        super().__init__()
        width = shape.image.width
        self.patch = shape.patch
        self.patch_map = nn.Linear(shape.patch_values, width, bias=False)
        self.class_row = nn.Parameter(torch.empty(1, width))
        self.image_positions = nn.Parameter(torch.empty(1 + shape.patches, width))
        self.entry_norm = nn.LayerNorm(width, shape.image.eps)
        self.image_tower = Transformer(shape.image)
        self.words = nn.Parameter(torch.empty(shape.vocab_size, shape.text.width))
        self.text_positions = nn.Parameter(torch.empty(shape.positions, shape.text.width))
        self.text_tower = Transformer(shape.text)
        self.image_map = nn.Linear(width, shape.features, bias=False)
        self.text_map = nn.Linear(shape.text.width, shape.features, bias=False)
        self.log_scale = nn.Parameter(torch.empty(1))

    def forward(self, batch: PaddedBatch) -> Tensor:
        kernel = self.patch_map.weight.unflatten(1, (3, self.patch, self.patch))
        patches = F.conv2d(batch.pixels.to(kernel.dtype), kernel, stride=self.patch).flatten(2).mT
        x = torch.cat((self.class_row.expand(len(patches), 1, -1), patches), dim=1) + self.image_positions
        image = self.image_map(self.image_tower(self.entry_norm(x), None)[:, 0])
        x = F.embedding(batch.ids, self.words) + self.text_positions[: batch.ids.shape[1]]
        x = self.text_tower(x, CAUSAL)
        text = self.text_map(x[torch.arange(len(x), device=x.device), batch.last])
        logits = self.log_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        own = torch.arange(len(x), device=x.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class HuggingFaceClip(nn.Module):
    """CLIPModel of transformers."""

    def __init__(self, shape: Shape):
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        def options(stack: Stack) -> dict:
            names = {"width": "hidden_size", "mlp_width": "intermediate_size", "layers": "num_hidden_layers"}
            found = {theirs: getattr(stack, ours) for ours, theirs in names.items()}
            return found | {"num_attention_heads": stack.heads, "layer_norm_eps": stack.eps, "hidden_act": stack.activation}

        text = options(shape.text) | {"vocab_size": shape.vocab_size, "max_position_embeddings": shape.positions}
        image = options(shape.image) | {"patch_size": shape.patch, "image_size": shape.grid * shape.patch}
        config = CLIPConfig(
            text_config=text | {"eos_token_id": shape.vocab_size - 1, "bos_token_id": shape.vocab_size - 2},
            vision_config=image,
            projection_dim=shape.features,
            attn_implementation="sdpa",
        )
        self.model = CLIPModel(config)

    def forward(self, batch: PaddedBatch) -> Tensor:
        pixels = batch.pixels.to(self.model.dtype)
        return self.model(input_ids=batch.ids, pixel_values=pixels, return_loss=True).loss

    @staticmethod
    def weights(ours: dict[str, Tensor]) -> dict[str, Tensor]:
        """By their names there."""
        vision, text = "model.vision_model.", "model.text_model."
        found = {
            f"{vision}embeddings.class_embedding": ours["class_row"],
            f"{vision}embeddings.patch_embedding.weight": ours["patch_map.weight"],
            f"{vision}embeddings.position_embedding.weight": ours["image_positions"],
            f"{text}embeddings.token_embedding.weight": ours["words"],
            f"{text}embeddings.position_embedding.weight": ours["text_positions"],
            "model.visual_projection.weight": ours["image_map.weight"],
            "model.text_projection.weight": ours["text_map.weight"],
            "model.logit_scale": ours["log_scale"],
        }
        for theirs, own in (
            (f"{vision}pre_layrnorm.", "entry_norm."),
            (f"{vision}post_layernorm.", "image_tower.final_norm."),
            (f"{text}final_layer_norm.", "text_tower.final_norm."),
        ):
            found |= hugging_face.named(theirs, hugging_face.below(ours, own))
        for theirs, own in ((vision, "image_tower."), (text, "text_tower.")):
            blocks = hugging_face.named("blocks.", hugging_face.below(ours, f"{own}blocks."))
            found |= hugging_face.named(f"{theirs}encoder.", hugging_face.clip_weights(blocks))
        return found


class Clip(System):
    name = "CLIP ViT-B/32"
    lengths_are = (
        "50 tokens of an image; captions of web pages: log-normal, median 12 tokens, sigma 0.6, at most 75, and two specials"
    )

    def __init__(self, shape: Shape, pairs: int):
        self.shape, self.pairs = shape, pairs
        self.layers = f"{shape.image.layers} and {shape.text.layers} of 12 and 12 layers"

    def lengths(self, samples: int, random: np.random.Generator) -> Tensor:
        words = SPECIALS + long_tailed(samples, 12, 0.6, self.shape.positions - SPECIALS, random)
        return torch.from_numpy(np.stack((words, np.full(samples, 1 + self.shape.patches)), axis=1))

    def sample(self, lengths: Sequence[int], random: np.random.Generator) -> Sample:
        first, last = self.shape.vocab_size - 2, self.shape.vocab_size - 1
        words = random.integers(1, first, int(lengths[0]) - SPECIALS)
        patches = random.standard_normal((self.shape.patches, self.shape.patch_values), np.float32)
        return Sample(torch.from_numpy(np.concatenate(([first], words, [last]))), torch.from_numpy(patches))

    def packed(self, samples: Sequence[Sample]) -> PackedBatch:
        rows, count = 1 + self.shape.patches, len(samples)
        position = torch.arange(rows, dtype=torch.int32).repeat(count)
        behind = 1 + torch.arange(count, dtype=torch.int32).repeat_interleave(rows)  # class tokens up to here
        patch = torch.arange(count * rows, dtype=torch.int32) - behind
        is_class = position == 0
        return PackedBatch(
            text=vk.SegmentLayout([[len(sample.ids)] for sample in samples]),
            image=vk.SegmentLayout([[rows]] * count),
            ids=torch.cat([sample.ids for sample in samples]),
            patches=torch.cat([sample.patches for sample in samples]),
            table_rows=torch.stack((position, torch.where(is_class, 0, -1), torch.where(is_class, -1, patch)), dim=1),
        )

    def padded(self, samples: Sequence[Sample]) -> PaddedBatch:
        grid, patch = self.shape.grid, self.shape.patch
        patches = torch.stack([sample.patches for sample in samples]).unflatten(2, (3, patch, patch)).unflatten(1, (grid, grid))
        return PaddedBatch(
            ids=pad_sequence([sample.ids for sample in samples], batch_first=True),
            last=torch.tensor([len(sample.ids) - 1 for sample in samples]),
            pixels=patches.permute(0, 3, 1, 4, 2, 5).reshape(len(samples), 3, grid * patch, grid * patch),
        )

    def model(self) -> PackedClip:
        return redraw(PackedClip(self.shape))

    def peer(self, name: str, ours: nn.Module) -> nn.Module:
        weights = dict(ours.named_parameters())
        if name == PADDED:
            return load(PaddedClip(self.shape), weights)
        assert name == HUGGING_FACE
        return load(hugging_face.quietly(HuggingFaceClip, self.shape), HuggingFaceClip.weights(weights))

    def flops(self, batch: PackedBatch) -> float:
        image, text = batch.image.lengths[:, 0].cpu(), batch.text.lengths[:, 0].cpu()
        shape, pairs = self.shape, len(image)
        features = 2 * pairs * shape.features * (shape.image.width + shape.text.width) + 2 * pairs**2 * shape.features
        embedded = 2 * pairs * shape.patches * shape.patch_values * shape.image.width
        return 3 * (Products(shape.image)(image) + Products(shape.text)(text, causal=True) + features + embedded)

    def tokens(self, batch: PackedBatch) -> tuple[int, int]:
        return batch.image.num_tokens + batch.text.num_tokens, batch.text.num_samples

    def padded_tokens(self, batch: PaddedBatch) -> int:
        return batch.ids.numel() + len(batch.ids) * (1 + self.shape.patches)
