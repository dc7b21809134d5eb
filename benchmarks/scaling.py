"""Memory per rank, bytes on the wire and time of a step of a cluster run, predicted.

The model follows ZeRO (Rajbhandari et al. 2020) and, where it does otherwise, DeepSpeed 0.19.8 as `engine.training.zero`
configures it.
`tests/distributed/test_scaling.py` compares it with runs of 1, 2 and 4 processes; `docs/SCALING.md` is written from it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from engine.training.zero import zero_sizes

PARAMETER_BYTES = {"fp32": 4, "bf16": 2}
ALL_REDUCED_AT_ONCE = 500_000_000  # elements, by DeepSpeed where it has no bucket of its own
FLAT_ALIGNMENT = 2  # elements of each rank


@dataclass(frozen=True)
class Weight:
    """One parameter. Matrices decay and vectors do not, which are the optimizer's two groups."""

    numel: int
    matrix: bool
    trained: bool = True


@dataclass(frozen=True)
class Part:
    """One tower: its parameters in the order of the module, and what a sample costs in it."""

    name: str
    weights: tuple[Weight, ...]
    tokens: int = 0
    layers: int = 0
    width: int = 0
    table: int = 0  # elements of tables that rows are only read from: no products
    passes: int = 1  # how often a step reads a sample in it


def _assumed(value: Any, meaning: str) -> Any:
    return field(default=value, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Assumptions:
    """Everything that is neither counted nor measured here. Rates are of a machine we imagine, not of one that ran this."""

    peak_bf16: float = _assumed(990e12, "operations of an accelerator in a second, in products of bfloat16 matrices")
    peak_fp32: float = _assumed(65e12, "the same in float32")
    mfu: float = _assumed(0.40, "share of the peak that the model's products reach, communication aside")
    inside: float = _assumed(300e9, "bytes that a rank sends in a second to one of its node")
    between: float = _assumed(40e9, "the same to a rank of another node")
    latency: float = _assumed(10e-6, "seconds of each hop of a collective")
    hidden: tuple[float, ...] = _assumed((0, 0, 0, 0.7), "by stage, share of the products' time that may hide gradients on the wire")
    layer_bytes: int = _assumed(34, "of activations of a token, layer and column in half precision, without attention's matrix")
    checkpoint_bytes: int = _assumed(2, "the same with checkpointing, which keeps the input of a layer")


@dataclass(frozen=True)
class Run:
    """A training run with AdamW."""

    parts: tuple[Part, ...]
    stage: int
    ranks: int
    dtype: str = "bf16"  # of training; its master weights and moments are float32
    samples: int = 64  # of a rank and a micro-step
    micro_steps: int = 1
    per_node: int = 8
    exchange: str | None = None  # of the contrastive loss: None, gather, ring
    loss_width: int = 0
    loss_samples: int | None = None  # of a rank in one loss of the whole step; the reading ahead that this takes is left out
    activation_bytes: int | None = None  # given, instead of estimated
    checkpointing: bool = False
    reuse_distance: int | None = None  # of stage 3; None: the engine's choice

    def __post_init__(self) -> None:
        if self.stage not in range(4):
            raise ValueError(f"stage must be 0, 1, 2 or 3, got {self.stage}")
        if self.dtype not in PARAMETER_BYTES:
            raise ValueError(f"dtype must be fp32 or bf16, got {self.dtype}")
        if self.stage == 0 and self.dtype == "bf16":
            raise ValueError("stage 0 with bf16 makes a wrong first update in DeepSpeed: use fp32 or stage 1")
        if self.exchange not in (None, "gather", "ring"):
            raise ValueError(f"exchange must be None, gather or ring, got {self.exchange}")

    @property
    def weights(self) -> list[Weight]:
        return [weight for part in self.parts for weight in part.weights]

    @property
    def trained(self) -> list[Weight]:
        return [weight for weight in self.weights if weight.trained]

    @property
    def groups(self) -> list[list[int]]:
        """Elements of each trained parameter by group of the optimizer, in the order in which they are laid flat."""
        groups = [[w.numel for w in self.trained if w.matrix is matrix] for matrix in (True, False)]
        return [group for group in groups if group]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Of DeepSpeed's buffers, in elements."""
        chosen = zero_sizes(total(self.weights), total(self.trained))
        return chosen if self.reuse_distance is None else chosen | {"stage3_max_reuse_distance": self.reuse_distance}

    @property
    def element(self) -> int:
        return PARAMETER_BYTES[self.dtype]

    @property
    def pairs(self) -> int:
        """Of a rank, in one loss."""
        return self.samples if self.loss_samples is None else self.loss_samples


def total(weights: Iterable[Weight]) -> int:
    return sum(weight.numel for weight in weights)


def padded(numel: int, multiple: int) -> int:
    return math.ceil(numel / multiple) * multiple


# ---- memory


def model_states(run: Run, rank: int = 0) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer states between the backward and the update, where all are alive."""
    states = _sharded_states if run.stage == 3 else _flat_states if run.stage else _whole_states
    return dict(zip(("parameters", "gradients", "optimizer"), states(run, rank), strict=True))


def _whole_states(run: Run, rank: int) -> tuple[int, int, int]:
    numel = total(run.trained)
    return 4 * total(run.weights), 4 * numel, 8 * numel


def _flat_states(run: Run, rank: int) -> tuple[int, int, int]:
    """Whole parameters laid flat; a partition of each group has master weights and two moments."""
    flat = [padded(sum(group), FLAT_ALIGNMENT * run.ranks) for group in run.groups]
    frozen = total(run.weights) - total(run.trained)
    gradients = 4 * sum(flat) // run.ranks
    if run.dtype == "fp32":  # no buffer of a partition: every gradient that has a share in it is kept whole
        touched = (_touched(group, length // run.ranks, rank) for group, length in zip(run.groups, flat, strict=True))
        gradients = 4 * sum(touched)
    elif run.stage == 1:  # sums of all in float32, and what the last backward left
        gradients = 4 * sum(flat) + run.element * total(run.trained)
    return run.element * (sum(flat) + frozen), gradients, 12 * sum(flat) // run.ranks


def _touched(group: Sequence[int], partition: int, rank: int) -> int:
    """Elements of the parameters of which a rank's partition holds any."""
    start, found = 0, 0
    for numel in group:
        if start < partition * (rank + 1) and start + numel > partition * rank:
            found += numel
        start += numel
    return found


def _sharded_states(run: Run, rank: int) -> tuple[int, int, int]:
    """A share of every parameter; small ones are beside that whole on every one of several ranks."""
    share = sum(math.ceil(w.numel / run.ranks) for w in run.trained)
    frozen = sum(math.ceil(w.numel / run.ranks) for w in run.weights if not w.trained)
    whole = sum(padded(w.numel, run.ranks) for w in run.weights if persistent(run, w) and run.ranks > 1)
    return run.element * (share + frozen + whole), 4 * share, 12 * share


def persistent(run: Run, weight: Weight) -> bool:
    """Whether stage 3 keeps it whole."""
    return weight.numel <= run.sizes["stage3_param_persistence_threshold"]


def memory(run: Run, given: Assumptions = Assumptions(), rank: int = 0) -> dict[str, int]:
    """Bytes per rank at the peak, by what holds them: as if all were alive at once."""
    return model_states(run, rank) | {
        "gathered parameters": _gathered_bytes(run),
        "gradient bucket": _bucket_bytes(run),
        "activations": activations(run, given),
        "loss": loss_memory(run),
    }


def _gathered_bytes(run: Run) -> int:
    """Under stage 3 a parameter stays whole until its backward if that comes soon enough."""
    if run.stage < 3 or run.ranks == 1:
        return 0
    sizes = [(padded(w.numel, run.ranks), w.trained and times == 1) for w, times in _gathers(run)]
    passing = max((size for size, kept in sizes if not kept), default=0)
    return run.element * (sum(size for size, kept in sizes if kept) + passing)


def _gathers(run: Run) -> list[tuple[Weight, int]]:
    """How often a parameter that is not persistent is gathered in a micro-step: again when its backward is far away.

    Between lie the forward of what follows and the backward of what of that is trained.
    """
    found, between = [], 0
    for weight in reversed(run.weights):
        if not persistent(run, weight):
            found.append((weight, 2 if weight.trained and between >= run.sizes["stage3_max_reuse_distance"] else 1))
        between += weight.numel * (1 + weight.trained)
    return found


def _bucket_bytes(run: Run) -> int:
    whole = run.stage >= 2 or (run.stage == 1 and run.dtype == "fp32")  # allocated in full
    return run.element * (run.sizes["reduce_bucket_size"] if whole else min(ALL_REDUCED_AT_ONCE, total(run.trained)))


def activations(run: Run, given: Assumptions = Assumptions()) -> int:
    """Estimated by layers, tokens and width of what is trained (Korthikanti et al. 2022, without their attention matrix)."""
    if run.activation_bytes is not None:
        return run.activation_bytes
    column = given.checkpoint_bytes if run.checkpointing else given.layer_bytes
    towers = [part for part in run.parts if any(weight.trained for weight in part.weights)]
    kept = sum(part.passes * part.layers * part.tokens * part.width * column for part in towers)
    if run.checkpointing:
        kept += max((part.tokens * part.width * given.layer_bytes for part in towers), default=0)
    return kept * run.samples * run.element // 2


def loss_memory(run: Run) -> int:
    """Bytes of a contrastive loss; see "Losses" in docs/ARCHITECTURE.md."""
    block = run.pairs * run.loss_width
    if run.exchange == "ring":
        return 4 * block * run.element + 12 * block
    return 2 * block * run.ranks * run.element if run.exchange == "gather" else 0


def dense_loss_memory(run: Run) -> int:
    """Of plain PyTorch: features of all ranks with their gradients, both matrices of this rank's float32 logits with theirs."""
    return 4 * run.pairs * run.loss_width * run.ranks * run.element + 16 * run.pairs**2 * run.ranks


# ---- the wire


def all_reduce_bytes(nbytes: int, ranks: int) -> int:
    """What a rank sends in a ring: a tensor twice, without a share of one in W."""
    return 2 * (ranks - 1) * nbytes // ranks


def wire(run: Run) -> dict[str, int]:
    """Bytes that a rank sends in one optimizer step, collectives counted as rings send them."""
    sent = Counter(parameters=0, gradients=0, norm=0, loss=0)
    if run.ranks > 1:
        sent.update(_sharded_wire(run) if run.stage == 3 else _flat_wire(run))
        sent["loss"] = _loss_wire(run) * (run.micro_steps if run.loss_samples is None else 1)
    return dict(sent)


def _flat_wire(run: Run) -> dict[str, int]:
    """Gradients are reduced to all, under stage 2 as well, there once a micro-step; the updated partitions are gathered."""
    numel, groups = total(run.trained), len(run.groups)
    if run.stage == 0:
        return {"gradients": all_reduce_bytes(run.element * numel, run.ranks)}
    aligned = FLAT_ALIGNMENT * run.ranks
    shares = sum(padded(sum(group), aligned) for group in run.groups) // run.ranks
    parameters = (run.ranks - 1) * run.element * shares
    if run.stage == 1 and run.dtype == "bf16":  # another optimizer class: reduces padding too, takes its norm elsewhere
        flat = sum(padded(sum(group), aligned) for group in run.groups)
        return {"parameters": parameters, "gradients": all_reduce_bytes(run.element * flat, run.ranks)}
    norm = groups * all_reduce_bytes(4, run.ranks) + (all_reduce_bytes(1, run.ranks) if run.dtype == "bf16" else 0)
    times = run.micro_steps if run.stage == 2 else 1
    return {"parameters": parameters, "gradients": times * all_reduce_bytes(run.element * numel, run.ranks), "norm": norm}


def _sharded_wire(run: Run) -> dict[str, int]:
    """Shares are gathered in every micro-step, those of small parameters after the update; gradients are scattered."""
    used = sum(times * math.ceil(w.numel / run.ranks) for w, times in _gathers(run))
    after = sum(math.ceil(w.numel / run.ranks) for w in run.weights if persistent(run, w))
    scattered = sum(math.ceil(w.numel / run.ranks) for w in run.trained)
    others = run.ranks - 1
    return {
        "parameters": others * run.element * (run.micro_steps * used + after),
        "gradients": others * run.element * run.micro_steps * scattered,
        "norm": len(run.groups) * all_reduce_bytes(8, run.ranks),
    }


def _loss_wire(run: Run) -> int:
    """The features (and gradients, in a ring), and the numbers of rows that both exchanges make known to all."""
    if run.exchange is None:
        return 0
    others, block, everyone = run.ranks - 1, run.pairs * run.loss_width, run.pairs * run.ranks
    first, value = others * 3 * 8, all_reduce_bytes(4, run.ranks)
    statistics = all_reduce_bytes(4 * everyone, run.ranks) + all_reduce_bytes(8 * everyone, run.ranks)
    if run.exchange == "ring":
        return first + statistics + value + others * block * (2 * run.element + 4)
    return first + statistics + value + others * (2 * block * run.element + 8 * run.pairs)


# ---- time


@dataclass(frozen=True)
class StepTime:
    """Seconds."""

    compute: float
    communication: float
    exposed: float

    @property
    def step(self) -> float:
        return self.compute + self.exposed


def flops(run: Run) -> float:
    """Of a rank and a step: 6 for an element and a token (2 where nothing is trained, 8 recomputed), and attention's."""
    found = 0.0
    for part in run.parts:
        trained = any(weight.trained for weight in part.weights)
        passes = 1 if not trained else 4 if run.checkpointing else 3
        matrices = sum(weight.numel for weight in part.weights if weight.matrix) - part.table
        found += passes * part.passes * part.tokens * (2 * matrices + 4 * part.layers * part.tokens * part.width)
    return found * run.samples * run.micro_steps


def step_time(run: Run, given: Assumptions = Assumptions()) -> StepTime:
    """The slowest link of a ring paces it, the norm takes a tree; nothing hides parameters, which are not gathered ahead,
    nor the loss's exchange, which waits for features."""
    peak = given.peak_bf16 if run.dtype == "bf16" else given.peak_fp32
    compute = flops(run) / (peak * given.mfu)
    link = given.inside if run.ranks <= run.per_node else given.between
    sent = wire(run)
    hops = {kind: run.ranks - 1 for kind in sent} | {"norm": 2 * math.ceil(math.log2(run.ranks))}
    seconds = {kind: nbytes / link + given.latency * hops[kind] if nbytes else 0.0 for kind, nbytes in sent.items()}
    communication = sum(seconds.values())
    unseen = min(seconds["gradients"], given.hidden[run.stage] * compute)
    return StepTime(compute, communication, communication - unseen)
