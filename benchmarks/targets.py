"""What one H200 is to reach in bfloat16, and what it did: the README's second table. The only place of these targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measured import Row

UNMEASURED = "not measured yet"
Amount = Callable[[Mapping[str, Any]], float]


@dataclass(frozen=True)
class Reading:
    """A number of the latest row of ``benchmark`` (of host_cost: of the op)."""

    file: str
    benchmark: str
    amount: Amount

    def told(self, rows: Sequence[Row]) -> str:
        for row in reversed([row for row in rows if self._is_of(row)]):
            try:
                return f"{self.amount(row.values):.3g}{'' if row.is_clean else chr(92) + '*'}"
            except (KeyError, ValueError):  # a peer did not run
                continue
        return UNMEASURED

    def _is_of(self, row: Row) -> bool:
        own = self.file, self.benchmark
        return row.is_of(*own, "bfloat16") or (row.path.stem, row.values.get("op")) == own


@dataclass(frozen=True)
class Target:
    """``ship``, ``goal`` and ``moonshot`` in the order of ``readings``."""

    what: str
    ship: str
    goal: str
    moonshot: str
    readings: tuple[Reading, ...]

    def told(self, rows: Sequence[Row]) -> str:
        found = [reading.told(rows) for reading in self.readings]
        return UNMEASURED if set(found) == {UNMEASURED} else " / ".join(found)


def tflops(part: str) -> Amount:
    return lambda values: values["derived"][part]["tflops"]["vlkernels"]


def share_of_copy(part: str) -> Amount:
    return lambda values: values["derived"][part]["share_of_copy"]["vlkernels"]


def milliseconds(values: Mapping[str, Any]) -> float:
    return 1e3 * values["seconds"]["vlkernels"]["median"]


def host_microseconds(part: str) -> Amount:
    return lambda values: 1e6 * values[part]["vlkernels"]["median"]


def times_as_fast(part: str, *peers: str) -> Amount:
    """As the best of those that ran."""

    def times(values: Mapping[str, Any]) -> float:
        return min(values[part][peer]["median"] for peer in peers if peer in values[part]) / values[part]["vlkernels"]["median"]

    return times


def times_as_long(part: str, without: str) -> Amount:
    return lambda values: values[part]["vlkernels"]["median"] / values[part][without]["median"]


def microseconds_more(part: str, variant: str) -> Amount:
    return lambda values: 1e6 * (values[part][variant]["median"] - values[part]["vlkernels"]["median"])


ATTENTION, SHORT, LONGER = "attention_qkvpacked", "332 x 197, H12 K64", "256 x 256, H12 K64"
PREFIX, DENSE, BIASED = "106 x 577 + 40, H12 K64, prefix-LM", "2 x 8192, H16 K128", "92 x 709, H12 K64, bias of three tables"
NORM, CAPTIONS = "bias, dropout 0.1, residual 65536x768", "256 x 12..60 + 39..196, D768"
INDEXED = "cat + index_select, index ready"

TARGETS = (
    Target(
        "attention, packed samples of 197 / 256, heads of 64, visible TFLOP/s forward",
        "150 / 220",
        "200 / 300",
        "300 / 420, deterministic",
        (Reading(ATTENTION, SHORT, tflops("forward")), Reading(ATTENTION, LONGER, tflops("forward"))),
    ),
    Target(
        "the same, backward",
        "100 / 160",
        "170 / 250",
        "220 / 300, deterministic",
        (Reading(ATTENTION, SHORT, tflops("backward")), Reading(ATTENTION, LONGER, tflops("backward"))),
    ),
    Target(
        "attention, 577 image + 40 text, prefix-LM, 64k tokens: times as fast as two varlen calls (`varlen_attn`, FA3)",
        "1.0",
        "1.15",
        "1.3",
        (Reading(ATTENTION, PREFIX, times_as_fast("seconds", "varlen_attn", "flash-attn 3")),),
    ),
    Target(
        "attention, dense, heads of 128, TFLOP/s forward / backward",
        "470 / 330",
        "640 / 520",
        "720 / 640",
        (Reading(ATTENTION, DENSE, tflops("forward")), Reading(ATTENTION, DENSE, tflops("backward"))),
    ),
    Target(
        "bias of three tables with their gradient: times as long as without, forward / backward",
        "2.0 / 2.2",
        "1.5 / 1.7",
        "1.25 / 1.4, bit-reproducible",
        tuple(Reading(ATTENTION, BIASED, times_as_long(part, "without bias")) for part in ("forward", "backward")),
    ),
    Target(
        "dropout 0.1: times as long as without",
        "1.35",
        "1.2",
        "1.12",
        (Reading(ATTENTION, f"{SHORT}, dropout 0.1", times_as_long("seconds", "without dropout")),),
    ),
    Target(
        "what a new layout costs a step, microseconds",
        "50, no sync",
        "20",
        "0",
        (Reading(ATTENTION, SHORT, microseconds_more("seconds", "new layout")),),
    ),
    Target(
        "LayerNorm with bias, dropout and residual, share of a copy's rate, forward / backward",
        "0.80 / 0.75",
        "0.87 / 0.82",
        "0.92 / 0.88",
        (Reading("layer_norm", NORM, share_of_copy("forward")), Reading("layer_norm", NORM, share_of_copy("backward"))),
    ),
    Target(
        "host time of an eager call, microseconds, forward / backward",
        "20 / 40",
        "12 / 30",
        "8 / 20",
        tuple(Reading("host_cost", "layer_norm", host_microseconds(part)) for part in ("forward", "backward")),
    ),
    Target(
        "pack / unpack, share of a copy's rate; pack: times as fast as cat + gather",
        "0.80; 3",
        "0.87; 4",
        "0.92",
        (
            Reading("pack", CAPTIONS, share_of_copy("forward")),
            Reading("unpack", CAPTIONS, share_of_copy("forward")),
            Reading("pack", CAPTIONS, times_as_fast("seconds", "UNITER's cat + gather, then unpad, indices ready", INDEXED)),
        ),
    ),
    Target(
        "contrastive / sigmoid loss, 65,536 pairs, width 768, ms forward and backward",
        "60 / 47",
        "47 / 36",
        "41 / 30; 256 MB more at any number of pairs",
        (Reading("contrastive_loss", "n65536_d768", milliseconds), Reading("sigmoid_loss", "n65536_d768", milliseconds)),
    ),
    Target(
        "FILIP both ways, forward: times as fast as two calls of one way",
        "1.3",
        "1.8",
        "0.65 of cuBLAS",
        (
            Reading(
                "late_interaction_loss",
                "filip n2048 p49 t32 d256",
                times_as_fast("forward", "flash-maxsim, two calls", "late-interaction-kernels, two calls"),
            ),
        ),
    ),
    Target(
        "linear cross-entropy, 8,192 x 30,522 with bias, width 768, ms",
        "2.8",
        "2.2",
        "1.9, no sync",
        (Reading("linear_cross_entropy", "bert_m8192_v30522_d768", milliseconds),),
    ),
    Target(
        "optimal transport, 256 samples of 40 and 40, 50 steps: times as fast as eager",
        "10",
        "25",
        "one launch",
        (Reading("optimal_transport", "b256 text 40 regions 40", times_as_fast("seconds", "eager, padded")),),
    ),
)


def card_table(rows: Sequence[Row]) -> list[str]:
    """Every target, measured or not."""
    cards = [row for row in rows if not row.machine.folder.startswith("cpu-")]
    machine = f"{cards[-1].machine}, {cards[-1].values['date'][:10]}" if cards else f"{UNMEASURED}: no run of a card is stored"
    latest = [row for row in cards if row.machine == cards[-1].machine]
    heads = ("one H200, bfloat16", "to ship", "goal", "moonshot", "measured")
    body = [(target.what, target.ship, target.goal, target.moonshot, target.told(latest)) for target in TARGETS]
    return [f"On a card: {machine}.", "", *(f"| {' | '.join(some)} |" for some in (heads, ["---"] * len(heads), *body))]
