"""LayoutLMv2-base (Xu et al. 2021): words and a picture of a page in one stream, with biases by position, x and y.

Masked words are predicted; the convolutional backbone is left out, its features are given. transformers does not train
the tables of biases, which saves it work that ours and the padded model do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import vlkernels as vk
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.plain_transformer import TiedHead, Transformer, padding_mask
from benchmarks.plain_uniter import bert
from benchmarks.steps import hugging_face
from benchmarks.steps.system import HUGGING_FACE, Products, System, load, long_tailed, redraw
from benchmarks.uniter_pairs import CLS, FIRST_WORD, MASK, SEP, chosen_at_random
from engine.batch import OnDevice
from engine.models.heads import MaskedLanguageHead
from engine.models.initialization import initialize
from engine.models.transformer import PackedTransformer, SelectedRows, Tokens
from engine.sections import Distances, Stack

SPECIALS, SIDE, PAGE = 2, 1024, 1000
TEXT, VISUAL = 0, 1
LEFT, TOP, RIGHT, BOTTOM = range(4)


@dataclass(frozen=True)
class Shape:
    """LayoutLMv2-base unless said otherwise; `stack` without its biases."""

    stack: Stack = field(default_factory=lambda: bert(768, 12, 12))
    position: Distances = field(default_factory=lambda: Distances(32, 128))
    box: Distances = field(default_factory=lambda: Distances(64, 256))
    vocab_size: int = 30_522
    positions: int = 512
    grid: int = 7
    channels: int = 256

    @property
    def biased(self) -> Stack:
        return replace(self.stack, relative_position=self.position, relative_box=self.box)

    @property
    def part(self) -> int:
        """Width of each of the six parts that a box's embedding is joined of."""
        return self.stack.width // 6


@dataclass(frozen=True)
class Page:
    ids: Tensor
    masked_ids: Tensor
    chosen: Tensor
    """bool [L]: the words that are masked."""
    boxes: Tensor
    """int64 [L + grid**2, 4]: of words, then of the cells of the picture."""
    features: Tensor
    """float32 [grid**2, channels]."""


@dataclass(frozen=True)
class PackedPages(OnDevice):
    layout: vk.SegmentLayout
    table_rows: Tensor
    """int32 [num_tokens, 4]: word, position, type and cell of each row; -1 where it has none."""
    segments: Tensor
    boxes: Tensor
    features: Tensor
    rows: Tensor
    """int64 [M]: of the masked words in the stream; `samples` are their pages."""
    samples: Tensor
    targets: Tensor


@dataclass(frozen=True)
class PaddedPages(OnDevice):
    ids: Tensor
    boxes: Tensor
    """int64 [B, L + grid**2, 4]."""
    positions: Tensor
    real: Tensor
    features: Tensor
    samples: Tensor
    offsets: Tensor
    targets: Tensor


class Embeddings(nn.Module):
    """What both models embed with."""

    def __init__(self, shape: Shape, norm: type[nn.LayerNorm]):
        super().__init__()
        width = shape.stack.width
        self.words = nn.Parameter(torch.empty(shape.vocab_size, width))
        self.positions = nn.Parameter(torch.empty(shape.positions, width))
        self.types = nn.Parameter(torch.empty(1, width))
        self.sides = nn.ParameterList(torch.empty(SIDE, shape.part) for _ in range(4))  # x, y, height, width
        self.visual_map = nn.Linear(shape.channels, width)
        self.text_norm = norm(width, shape.stack.eps)
        self.visual_norm = norm(width, shape.stack.eps)

    def of_boxes(self, boxes: Tensor) -> Tensor:
        """`[..., D]` of `[..., 4]`."""
        x, y, height, width = self.sides
        left, top, right, bottom = boxes.unbind(-1)
        rows = ((x, left), (y, top), (x, right), (y, bottom), (height, bottom - top), (width, right - left))
        return torch.cat([F.embedding(index, table) for table, index in rows], dim=-1)


class PackedLayoutLM(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        streams, stack = itertools.count(), shape.biased
        self.rng = vk.Rng(0)
        self.embeddings = Embeddings(shape, vk.FusedLayerNorm)
        self.dropout, self.stream = stack.dropout, next(streams)
        self.transformer = PackedTransformer(stack, streams)
        self.head = MaskedLanguageHead(stack.width, stack.width, shape.vocab_size, stack.activation, stack.eps, "auto")
        initialize(self, 0.02)

    def forward(self, batch: PackedPages) -> Tensor:
        layout = batch.layout
        read = SelectedRows.of(batch.rows, batch.samples, layout)
        hidden = Tokens(self.embed(batch), layout)
        states = self.transformer(hidden, rng=self.rng, boxes=batch.boxes, selected=read).hidden
        return self.head.loss(states, batch.targets, self.embeddings.words) / len(batch.targets)

    def embed(self, batch: PackedPages) -> Tensor:
        own = self.embeddings
        cells = own.visual_map(batch.features.to(own.words.dtype))
        return vk.embed_layer_norm(
            batch.table_rows,
            [own.words, own.positions, own.types, cells],
            torch.stack((own.text_norm.weight, own.visual_norm.weight)),
            bias=torch.stack((own.text_norm.bias, own.visual_norm.bias)),
            dense=own.of_boxes(batch.boxes),
            norm_ids=batch.segments,
            eps=own.text_norm.eps,
            dropout_p=self.dropout if self.training else 0.0,
            layout=batch.layout,
            rng=self.rng,
            stream=self.stream,
        )

    def _apply(self, fn, recurse: bool = True) -> PackedLayoutLM:
        super()._apply(fn, recurse)
        self.rng.state = fn(self.rng.state)
        return self


class PaddedLayoutLM(nn.Module):
    """The same with plain operators; its scores of pairs of tokens are a bias `[B, H, L, L]`, made once for all layers."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embeddings = Embeddings(shape, nn.LayerNorm)
        self.dropout = nn.Dropout(shape.stack.dropout)
        self.transformer = Transformer(shape.stack)
        buckets = (shape.position, shape.box, shape.box)
        self.tables = nn.ParameterList(torch.empty(own.count, shape.stack.heads) for own in buckets)
        self.head = TiedHead(shape.stack, shape.vocab_size)

    def forward(self, batch: PaddedPages) -> Tensor:
        hidden = self.encode(self.embed(batch), batch)
        logits = self.head(hidden[batch.samples, batch.offsets], self.embeddings.words)
        return F.cross_entropy(logits, batch.targets)

    def embed(self, batch: PaddedPages) -> Tensor:
        own, words = self.embeddings, batch.ids.shape[1]
        boxes, at = own.of_boxes(batch.boxes), F.embedding(batch.positions, own.positions)
        text = F.embedding(batch.ids, own.words) + own.types + (boxes + at)[:, :words]
        cells = own.visual_map(batch.features.to(own.words.dtype)) + (boxes + at)[:, words:]
        return self.dropout(torch.cat((own.text_norm(text), own.visual_norm(cells)), dim=1))

    def encode(self, x: Tensor, batch: PaddedPages) -> Tensor:
        shape, bias = self.shape, 0
        coordinates = batch.positions, batch.boxes[..., LEFT], batch.boxes[..., BOTTOM]
        for at, own, table in zip(coordinates, (shape.position, shape.box, shape.box), self.tables, strict=True):
            distance = at[:, None, :] - at[:, :, None]
            bias = bias + F.embedding(bucket(distance, own.count, own.max_distance), table)
        bias = bias.permute(0, 3, 1, 2).masked_fill(~batch.real[:, None, None], -math.inf)
        return self.transformer(x, bias.contiguous())


class HuggingFaceLayoutLM(PaddedLayoutLM):
    """With the encoder of transformers."""

    def __init__(self, shape: Shape):
        from transformers import LayoutLMv2Config
        from transformers.models.layoutlmv2.modeling_layoutlmv2 import LayoutLMv2Encoder

        super().__init__(shape)
        options = hugging_face.bert_options(shape.stack) | {"fast_qkv": False}
        position = {"rel_pos_bins": shape.position.count, "max_rel_pos": shape.position.max_distance}
        box = {"rel_2d_pos_bins": shape.box.count, "max_rel_2d_pos": shape.box.max_distance}
        self.transformer = LayoutLMv2Encoder(LayoutLMv2Config(**options, **position, **box))
        del self.tables

    def encode(self, x: Tensor, batch: PaddedPages) -> Tensor:
        hidden = ~batch.real[:, None, None]
        return self.transformer(x, hidden, bbox=batch.boxes, position_ids=batch.positions).last_hidden_state


def bucket(distance: Tensor, count: int, most: int) -> Tensor:
    """T5's, in both directions: near distances have a bucket each, further ones share ever wider ones."""
    half = count // 2
    near, away = half // 2, distance.abs()
    further = near + (torch.log(away.clamp(min=1).float() / near) / math.log(most / near) * (half - near)).long()
    return torch.where(away < near, away, further.clamp(max=half - 1)) + half * (distance > 0)


class LayoutLM(System):
    name = "LayoutLMv2-base"
    lengths_are = (
        "49 cells of a page; words of scanned pages: log-normal, median 350 tokens, sigma 0.7, at most 510, and two specials"
    )

    def __init__(self, shape: Shape, pairs: int, median: float = 350):
        self.shape, self.pairs, self.median = shape, pairs, median
        self.layers = f"{shape.stack.layers} of 12 layers"

    def lengths(self, samples: int, random: np.random.Generator) -> Tensor:
        words = SPECIALS + long_tailed(samples, self.median, 0.7, self.shape.positions - SPECIALS, random)
        return torch.from_numpy(np.stack((words, np.full(samples, self.shape.grid**2)), axis=1))

    def sample(self, lengths: Sequence[int], random: np.random.Generator) -> Page:
        words, grid = int(lengths[TEXT]) - SPECIALS, self.shape.grid
        ids = np.concatenate(([CLS], random.integers(FIRST_WORD, self.shape.vocab_size, words), [SEP]))
        chosen = np.concatenate(([False], chosen_at_random(words, random), [False]))
        corner = random.integers(0, PAGE - 60, (words, 2))
        boxes = np.concatenate((corner, corner + random.integers(5, 60, (words, 2))), axis=1)
        edges = np.arange(grid + 1) * PAGE // grid
        cells = [(edges[x], edges[y], edges[x + 1], edges[y + 1]) for y in range(grid) for x in range(grid)]
        special = np.zeros((1, 4), np.int64)
        return Page(
            ids=torch.from_numpy(ids),
            masked_ids=torch.from_numpy(np.where(chosen, MASK, ids)),
            chosen=torch.from_numpy(chosen),
            boxes=torch.from_numpy(np.concatenate((special, boxes, special, cells))),
            features=torch.from_numpy(random.standard_normal((grid**2, self.shape.channels), np.float32)),
        )

    def packed(self, samples: Sequence[Page]) -> PackedPages:
        cells = self.shape.grid**2
        layout = vk.SegmentLayout([[len(page.ids), cells] for page in samples])
        segments, position = layout.token_segment(), layout.token_position()
        is_word = segments == TEXT
        own = torch.full((layout.num_tokens,), -1, dtype=torch.int32)
        words, visual = own.clone(), own.clone()
        words[is_word] = torch.cat([page.masked_ids for page in samples]).int()
        visual[~is_word] = torch.arange(len(samples) * cells, dtype=torch.int32)
        chosen = torch.zeros(layout.num_tokens, dtype=torch.bool)
        chosen[is_word] = torch.cat([page.chosen for page in samples])
        rows = chosen.nonzero()[:, 0]
        return PackedPages(
            layout=layout,
            table_rows=torch.stack((words, position, torch.where(is_word, 0, -1).int(), visual), dim=1),
            segments=segments,
            boxes=torch.cat([page.boxes for page in samples]).int(),
            features=torch.cat([page.features for page in samples]),
            rows=rows,
            samples=layout.token_sample()[rows].long(),
            targets=torch.cat([page.ids[page.chosen] for page in samples]),
        )

    def padded(self, samples: Sequence[Page]) -> PaddedPages:
        cells = self.shape.grid**2
        counts = torch.tensor([len(page.ids) for page in samples])
        ids = pad_sequence([page.masked_ids for page in samples], batch_first=True)
        words = ids.shape[1]
        samples_chosen, offsets = pad_sequence([page.chosen for page in samples], batch_first=True).nonzero().unbind(1)
        text_boxes = pad_sequence([page.boxes[:-cells] for page in samples], batch_first=True)
        positions = torch.cat((torch.arange(words), torch.arange(cells)))
        return PaddedPages(
            ids=ids,
            boxes=torch.cat((text_boxes, torch.stack([page.boxes[-cells:] for page in samples])), dim=1),
            positions=positions.expand(len(samples), -1),
            real=torch.cat((padding_mask(counts, words), torch.ones(len(samples), cells, dtype=torch.bool)), dim=1),
            features=torch.stack([page.features for page in samples]),
            samples=samples_chosen,
            offsets=offsets,
            targets=torch.cat([page.ids[page.chosen] for page in samples]),
        )

    def model(self) -> PackedLayoutLM:
        model = redraw(PackedLayoutLM(self.shape))
        for table in model.transformer.distances.tables:  # large enough for a wrong bucket to tell
            nn.init.normal_(table)
        return model

    def peer(self, name: str, ours: nn.Module) -> nn.Module:
        weights = {own.replace("transformer.distances.", ""): weight for own, weight in ours.named_parameters()}
        if name != HUGGING_FACE:
            return load(PaddedLayoutLM(self.shape), weights)
        position, x, y = (weights.pop(f"tables.{i}").T for i in range(3))
        tables = {"rel_pos_bias.weight": position, "rel_pos_x_bias.weight": x, "rel_pos_y_bias.weight": y}
        layers = hugging_face.bert_weights(hugging_face.below(weights, "transformer."))
        others = {own: weight for own, weight in weights.items() if not own.startswith("transformer.")}
        model = hugging_face.quietly(HuggingFaceLayoutLM, self.shape)
        return load(model, others | hugging_face.named("transformer.", layers | tables))

    def flops(self, batch: PackedPages) -> float:
        shape, width = self.shape, self.shape.stack.width
        embedded = 2 * batch.features.numel() * width
        head = 2 * len(batch.targets) * width * (width + shape.vocab_size)
        return 3 * (embedded + Products(shape.stack)(batch.layout.lengths.cpu().sum(1)) + head)

    def tokens(self, batch: PackedPages) -> tuple[int, int]:
        return batch.layout.num_tokens, batch.layout.num_samples

    def padded_tokens(self, batch: PaddedPages) -> int:
        return batch.real.numel()
