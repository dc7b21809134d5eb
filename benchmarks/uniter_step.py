"""UNITER-base's whole step on a CPU: plain padded PyTorch against the packed model, on random batches and on
UNITER's own. `python -m benchmarks.uniter_step`

Weights, pairs and losses are the same for both; a step is forward, backward and AdamW, with dropout. Batches
are built before the clock starts, and the variants take turns. Some four minutes on two threads, half of them with --mlm; 8 GB.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.plain_uniter import PaddedBatch, PlainUniter, Sizes, bert
from benchmarks.provenance import RESULTS, store
from benchmarks.timing import host_seconds
from benchmarks.uniter_pairs import (
    Pair,
    coco_like_lengths,
    packed,
    pad,
    random_batches,
    random_pair,
    token_bucket_batches,
)
from engine.batch import Batch
from engine.models import OneStream
from engine.objectives import PretrainingModule, build_objectives
from engine.sections import JointStack, MaskedRegionClasses, MaskedRegionFeatures, Objectives, RandomMatching
from engine.training.host_memory import keep_large_blocks

ENGINE_TASKS = {
    "mlm": "masked_language",
    "mrfr": "masked_region_features",
    "mrc_kl": "masked_region_classes",
    "itm": "random_matching",
}
OTHER_TASKS = tuple(task for task in ENGINE_TASKS if task != "mlm")
OBJECTIVES = Objectives(
    contrastive=None,
    matching=None,
    masked_region_features=MaskedRegionFeatures(),
    masked_region_classes=MaskedRegionClasses(),
    random_matching=RandomMatching(),
)
POOL, PAIRS_PER_BATCH = 8192, 32
TOKEN_BUDGET = 4096  # 32 pairs, too; UNITER's 10,240 are 88 and would take three times as long
PAIRS_COMPARED, TOLERANCE = 4, 1e-5

Seconds = dict[str, float]
"""By variant: `plain random`, `packed random`, `plain bucketed`, `packed bucketed`."""
Rows = list[tuple[str, Seconds]]
"""Task and seconds of one round."""


def engine_name(name: str) -> str:
    """The packed model's parameter for one of the plain model's."""
    for plain, engine in (
        ("text_embedder.words.weight", "text_embedder.tables.0"),
        ("text_embedder.positions.weight", "text_embedder.tables.1"),
        ("text_embedder.types.weight", "text_embedder.tables.2"),
        ("embedder.norm.", "embedder."),
        ("region_class_head.0.", "region_class_head."),
        ("region_class_head.1.", "region_class_head.classifier."),
    ):
        name = name.replace(plain, engine)
    return name


def load_engine_weights(plain: PlainUniter, engine: OneStream) -> None:
    weights = engine.state_dict()
    plain.load_state_dict({name: weights.pop(engine_name(name)) for name in plain.state_dict()})
    assert not weights, f"the plain model has no place for {', '.join(weights)}"


def make_models(sizes: Sizes) -> tuple[PlainUniter, PretrainingModule]:
    """The plain and the packed model with the same weights."""
    torch.manual_seed(0)
    stack = JointStack(**asdict(sizes.stack), max_positions=sizes.max_positions)
    engine = OneStream(stack, sizes.vocab_size, feature_values=sizes.feature_values, classes=sizes.classes)
    plain = PlainUniter(sizes)
    load_engine_weights(plain, engine)
    return plain, PretrainingModule(engine, build_objectives(OBJECTIVES))


@dataclass(frozen=True)
class BothBatches:
    """The same pairs as either model reads them."""

    plain: PaddedBatch
    packed: Batch

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> BothBatches:
        return cls(pad(pairs), packed(pairs))

    @property
    def tokens(self) -> int:
        return self.packed.layout.num_tokens

    @property
    def padded_tokens(self) -> int:
        return len(self.plain.text_ids) * self.plain.joint_length


def make_batches(sizes: Sizes, count: int) -> dict[str, list[BothBatches]]:
    """`count` batches of each kind from one pool of pairs, small and large ones alike."""
    random = np.random.default_rng(0)
    lengths = coco_like_lengths(POOL, random)
    indices = {
        "random": random_batches(POOL, PAIRS_PER_BATCH, random),
        "bucketed": token_bucket_batches(lengths.sum(1), TOKEN_BUDGET, random),
    }

    def both(index: Tensor) -> BothBatches:
        numbers = index.tolist()
        pairs = [random_pair(lengths[i].tolist(), sizes, np.random.default_rng(i)) for i in numbers]
        return BothBatches.of(pairs)

    return {kind: [both(index) for index in spread(some, lengths, count)] for kind, some in indices.items()}


def spread(batches: list[Tensor], lengths: Tensor, count: int) -> list[Tensor]:
    """`count` of the batches, at even quantiles of their numbers of tokens."""
    by_tokens = sorted(batches, key=lambda index: int(lengths[index].sum()))
    return [by_tokens[(2 * i + 1) * len(by_tokens) // (2 * count)] for i in range(count)]


class PlainStep:
    """What a researcher would write."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def loss(self, batches: BothBatches, task: str) -> Tensor:
        return sum(self.model(batches.plain, task).values())

    def __call__(self, batches: BothBatches, task: str) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(batches, task).backward()
        self.optimizer.step()


class PackedStep(PlainStep):
    """The same with the engine's model and objectives."""

    def loss(self, batches: BothBatches, task: str) -> Tensor:
        batches.packed.task = (ENGINE_TASKS[task],)
        total, _, _ = self.model(batches.packed)
        return total

    def __call__(self, batches: BothBatches, task: str) -> None:
        super().__call__(batches, task)
        self.model.model.rng.advance()


def check_losses(steps: Mapping[str, PlainStep], pairs: Sequence[Pair]) -> None:
    """Without dropout, every task's loss is the same."""
    batches = BothBatches.of(pairs)
    for task in ENGINE_TASKS:
        losses = {}
        for name, step in steps.items():
            step.model.eval()
            with torch.no_grad():
                losses[name] = float(step.loss(batches, task))
            step.model.train()
        plain, ours = losses["plain"], losses["packed"]
        assert abs(ours - plain) <= TOLERANCE * abs(plain), f"{task}: packed loss {ours}, plain loss {plain}"


def run_round(steps: Mapping[str, PlainStep], batches: Mapping[str, BothBatches], task: str) -> Seconds:
    return {
        f"{name} {kind}": host_seconds(lambda step=step, both=both: step(both, task))
        for kind, both in batches.items()
        for name, step in steps.items()
    }


def measure(steps: Mapping[str, PlainStep], batches: Mapping[str, list[BothBatches]], others: Sequence[str]) -> Rows:
    """One batch of each kind after another with MLM; the median ones with the other tasks, too."""
    rounds = [dict(zip(batches, pair, strict=True)) for pair in zip(*batches.values(), strict=True)]
    median = rounds[len(rounds) // 2]
    run_round(steps, rounds[-1], "mlm")  # the largest: the memory that it takes is kept
    rows = [(task, run_round(steps, median, task)) for task in others]
    return rows + [("mlm", run_round(steps, both, "mlm")) for both in rounds]


def summary(rows: Rows, batches: Mapping[str, list[BothBatches]]) -> dict[str, dict[str, float]]:
    """Speed-up by the packed step (median over batches); true tokens per second with MLM; padding."""

    def times_as_fast(task: str, kind: str) -> float:
        seconds = [seconds for name, seconds in rows if name == task]
        return statistics.median(some[f"plain {kind}"] / some[f"packed {kind}"] for some in seconds)

    masked_language = [seconds for task, seconds in rows if task == "mlm"]
    tokens = {kind: sum(both.tokens for both in found) for kind, found in batches.items()}
    padded = {kind: sum(both.padded_tokens for both in found) for kind, found in batches.items()}
    return {
        "packed_times_as_fast": {
            f"{task}, {kind}": times_as_fast(task, kind) for task in dict(rows) for kind in batches
        },
        "true_tokens_per_s": {
            variant: tokens[variant.split()[1]] / sum(seconds[variant] for seconds in masked_language)
            for variant in masked_language[0]
        },
        "padded_by_true": {kind: padded[kind] / tokens[kind] for kind in batches},
    }


def run(sizes: Sizes, count: int, others: Sequence[str] = OTHER_TASKS) -> tuple[Rows, dict[str, dict[str, float]]]:
    """Seconds of every round, and what they come to."""
    plain, engine = make_models(sizes)
    steps = {"plain": PlainStep(plain), "packed": PackedStep(engine)}
    random = np.random.default_rng(1)
    lengths = coco_like_lengths(PAIRS_COMPARED, random)
    check_losses(steps, [random_pair(length, sizes, random) for length in lengths.tolist()])
    batches = make_batches(sizes, count)
    rows = measure(steps, batches, others)
    return rows, summary(rows, batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=3, help="of each kind")
    parser.add_argument("--layers", type=int, default=12, help="fewer for a quick look")
    parser.add_argument("--mlm", action="store_true", help="no other task: half the time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    keep_large_blocks()
    rows, results = run(Sizes(bert(768, options.layers, 12)), options.batches, () if options.mlm else OTHER_TASKS)
    for title, values in results.items():
        figures = "; ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(f"{title.replace('_', ' ')}: {figures}")
    row = {"benchmark": "UNITER-base step", "layers": options.layers, **results, "rounds": rows}
    store("uniter_step", row, "cpu", options.results)


if __name__ == "__main__":
    main()
