"""The quickstart's model in plain, padded PyTorch: the peer that the engine's pairs per second are compared with.

    python -m benchmarks.plain_quickstart [--pairs 128] [--seconds 30]

Same sizes, weights, losses and hard negatives; `scaled_dot_product_attention` on padded batches, `F.layer_norm`,
`F.cross_entropy`, image keys and values projected once per image. Whole steps, data loading included, take turns in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.plain_transformer import TiedHead, Transformer, attention_mask, padding_mask
from benchmarks.provenance import RESULTS, ROOT, store
from benchmarks.timing import interleaved
from engine.batch import IMAGE, TEXT, Batch, OnDevice
from engine.build import build_model
from engine.config import Config
from engine.data import load_training_sets, make_tokenizer, training_stream
from engine.models import VisionLanguageModel
from engine.objectives import PretrainingModule
from engine.sections import ImageStack, Model, TextStack
from engine.training import zero
from engine.training.command_line import parse
from engine.training.optimizer import make_optimizer
from engine.training.step import agree, normalizers, run_window


class ImageEmbedder(nn.Module):
    def __init__(self, image: ImageStack):
        super().__init__()
        tables = {"rows": image.max_grid[0], "columns": image.max_grid[1]}
        self.places = nn.ParameterDict({name: torch.empty(size, image.width) for name, size in tables.items()})
        self.projection = nn.Linear(3 * image.patch_size**2, image.width)
        self.norm, self.dropout = nn.LayerNorm(image.width, image.eps), nn.Dropout(image.dropout)

    def forward(self, rows: Tensor, columns: Tensor, patches: Tensor) -> Tensor:
        x = F.embedding(rows, self.places["rows"]) + F.embedding(columns, self.places["columns"])
        return self.dropout(self.norm(x + self.projection(patches.to(self.projection.weight.dtype))))


class TextEmbedder(nn.Module):
    def __init__(self, text: TextStack, vocab_size: int):
        super().__init__()
        self.words = nn.Parameter(torch.empty(vocab_size, text.width))
        self.positions = nn.Parameter(torch.empty(text.max_positions, text.width))
        self.norm, self.dropout = nn.LayerNorm(text.width, text.eps), nn.Dropout(text.dropout)

    def forward(self, ids: Tensor) -> Tensor:
        return self.dropout(self.norm(F.embedding(ids, self.words) + self.positions[: ids.shape[1]]))


class Tower(nn.Module):
    def __init__(self, embedder: nn.Module, transformer: Transformer):
        super().__init__()
        self.embedder, self.transformer = embedder, transformer


class FeatureHead(nn.Module):
    def __init__(self, width: int, features: int):
        super().__init__()
        self.projection = nn.Linear(width, features, bias=False)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        pooled = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return F.normalize(self.projection(pooled), dim=-1)


class MatchingHead(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.classifier = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x[:, 0])


class PlainModel(nn.Module):
    """Parameters are named as in `VisionLanguageModel`, so one's weights load into the other."""

    def __init__(self, model: Model, vocab_size: int):
        super().__init__()
        image, text, fusion = model.image, model.text, model.fusion
        self.image = Tower(ImageEmbedder(image), Transformer(image))
        self.image_head = FeatureHead(image.width, model.projection_dim)
        self.text = Tower(TextEmbedder(text, vocab_size), Transformer(text))
        self.text_head = FeatureHead(text.width, model.projection_dim)
        self.logit_scale = nn.Parameter(torch.zeros(1))
        self.fusion = nn.ModuleDict({"transformer": Transformer(fusion, image.width)})
        masked_language = TiedHead(fusion, vocab_size)
        self.heads = nn.ModuleDict({"masked_language": masked_language, "matching": MatchingHead(fusion.width)})

    def encode_text(self, ids: Tensor, visible: Tensor | None) -> Tensor:
        return self.text.transformer(self.text.embedder(ids), visible)

    def forward(self, batch: PaddedPairs, negatives: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """Losses by name; `negatives` are the hard texts and the hard images (default: drawn from the
        scores)."""
        see_patches, see_words = batch.see_patches, batch.see_words
        image = self.image.embedder(batch.rows, batch.columns, batch.patches)
        image = self.image.transformer(image, see_patches)
        text = self.encode_text(batch.text_ids, see_words)
        image_features = self.image_head(image, batch.real_patches)
        text_features = self.text_head(text, batch.real_words)
        logits = self.logit_scale.exp() * image_features @ text_features.T
        pairs = len(logits)
        own = torch.arange(pairs, device=logits.device)
        contrastive = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

        hard_texts, hard_images = negatives or (
            draw_negatives(logits.detach()),
            draw_negatives(logits.detach().T),
        )
        fusion = self.fusion["transformer"]
        source = fusion.project_source(image)
        texts, images = torch.cat((own, hard_texts, own)), torch.cat((own, own, hard_images))
        read = [tuple(part[images] for part in keys_values) for keys_values in source]
        fused = fusion(text[texts], pick(see_words, texts), read, pick(see_patches, images))
        matches = (torch.arange(3 * pairs, device=own.device) < pairs).long()
        matching = F.cross_entropy(self.heads["matching"](fused), matches)

        masked = self.encode_text(batch.masked_ids, see_words)
        fused = fusion(masked, see_words, source, see_patches)
        words = self.heads["masked_language"](fused[batch.samples, batch.offsets], self.text.embedder.words)
        masked_language = F.cross_entropy(words, batch.targets)
        return {"contrastive": contrastive, "matching": matching, "masked_language": masked_language}


@dataclass(frozen=True)
class PaddedPairs(OnDevice):
    """What a padding collate function would have made: `[B, longest, ...]`, zeros behind each sample's rows."""

    text_ids: Tensor
    masked_ids: Tensor
    patches: Tensor
    rows: Tensor
    columns: Tensor
    real_words: Tensor
    real_patches: Tensor
    see_words: Tensor | None
    see_patches: Tensor | None
    samples: Tensor
    """int64 [M]: where the masked words are, and `offsets` within these."""
    offsets: Tensor
    targets: Tensor

    @classmethod
    def of(cls, batch: Batch) -> PaddedPairs:
        word_counts, patch_counts = batch.layout.lengths[:, TEXT], batch.layout.lengths[:, IMAGE]
        patches, text_ids = padded(batch.image.values, patch_counts), padded(batch.text.ids, word_counts)
        real_patches = padding_mask(patch_counts, patches.shape[1])
        real_words = padding_mask(word_counts, text_ids.shape[1])
        positions = padded(batch.image.positions, patch_counts).long()
        masked = batch.views["masked_language"]
        return cls(
            text_ids=text_ids,
            masked_ids=padded(masked.ids, word_counts),
            patches=patches,
            rows=positions[..., 0],
            columns=positions[..., 1],
            real_words=real_words,
            real_patches=real_patches,
            see_words=attention_mask(real_words),
            see_patches=attention_mask(real_patches),
            samples=masked.places.samples,
            offsets=masked.places.offsets,
            targets=masked.targets,
        )


def padded(rows: Tensor, counts: Tensor) -> Tensor:
    return pad_sequence(rows.split(counts.tolist()), batch_first=True)


def pick(mask: Tensor | None, index: Tensor) -> Tensor | None:
    return None if mask is None else mask[index]


@torch.no_grad()
def draw_negatives(logits: Tensor) -> Tensor:
    scores = logits.softmax(1) + 1e-6
    return torch.multinomial(scores.fill_diagonal_(0), 1)[:, 0]


def make_models(config: Config, vocab_size: int) -> tuple[PretrainingModule, PlainModel]:
    torch.manual_seed(0)
    packed: VisionLanguageModel = build_model(config, vocab_size)
    plain = PlainModel(config.model, vocab_size)
    plain.load_state_dict(packed.state_dict())
    return PretrainingModule(packed, config.objectives.active), plain


class PlainLoop:
    """What a researcher would write: load a batch, forward, backward, AdamW."""

    def __init__(
        self,
        module: nn.Module,
        stream: Iterator[list[Batch]],
        learning_rate: float,
        pad: Callable[[Batch], Batch | PaddedPairs] = lambda batch: batch,
    ):
        self.module, self.stream, self.pad = module, stream, pad
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, fused=True)

    def __call__(self) -> None:
        (batch,) = next(self.stream)
        self.optimizer.zero_grad(set_to_none=True)
        batch.normalizers = normalizers(batch.counts, 1, torch.device("cpu"))
        output = self.module(self.pad(batch))
        losses = output[1] if isinstance(output, tuple) else output
        sum(losses.values()).backward()
        self.optimizer.step()


class EngineLoop:
    """The engine's own step: DeepSpeed, clipping, agreement between ranks and all."""

    def __init__(self, config: Config, module: PretrainingModule, stream: Iterator[list[Batch]], ranks: zero.Ranks):
        optimizer = make_optimizer(config.optimizer, module.named_parameters(), ranks.device)
        self.engine, self.stream, self.ranks = zero.Engine(config, module, optimizer, ranks), stream, ranks

    def __call__(self) -> None:
        window = next(self.stream)
        agreement = agree(window, self.ranks, stop=False)
        run_window(self.engine, window, agreement.counts, self.ranks, self.engine.module.model.rng)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    config = parse(["--config", str(ROOT / "engine/recipes/quickstart.yaml"), f"--train.global_batch={options.pairs}"])
    ranks = zero.join(config)
    sets = load_training_sets(config)
    tokenizer = make_tokenizer(config, sets)

    def stream() -> Iterator[list[Batch]]:
        return training_stream(config, sets, tokenizer, ranks.rank, ranks.world, step=0, samples_seen=0)

    packed, plain = make_models(config, tokenizer.vocab_size)
    under_zero, _ = make_models(config, tokenizer.vocab_size)
    loops = {
        "engine": EngineLoop(config, under_zero, stream(), ranks),
        "packed model, no DeepSpeed": PlainLoop(packed, stream(), config.optimizer.lr),
        "plain padded PyTorch": PlainLoop(plain, stream(), config.optimizer.lr, PaddedPairs.of),
    }
    timings = interleaved(loops, "cpu", options.seconds)
    speeds = {name: options.pairs / timing.median for name, timing in timings.items()}
    for name, speed in speeds.items():
        print(f"{name:<28} {speed:8.1f} pairs/s  {speed / speeds['plain padded PyTorch']:5.2f}x")
    seconds = {name: vars(timing) for name, timing in timings.items()}
    store("quickstart_step", {"benchmark": "quickstart step", "pairs": options.pairs, "seconds": seconds}, "cpu", options.results)
    return 0


if __name__ == "__main__":
    zero.leave(main)
