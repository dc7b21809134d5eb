"""The README's plots, from the stored rows of one machine; a plot whose rows are not there yet is ``None``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks import plots
from benchmarks.lines import DTYPES, LINES, PADDED, Line
from benchmarks.measured import Amounts, Machine, Refused, Row, figures, peak_bytes, seconds, share_of_floor

PADDINGS = {share: f"32 x 1..128, {share}% padding, H12 K64" for share in (25, 50, 75)}
CONTRASTIVE = Line(
    "contrastive loss, width 512",
    "PyTorch, the dense N x N loss",
    "contrastive_loss",
    "n{}_d512",
    ("torch",),
)
LATE_INTERACTION = Line(
    "late interaction, 49 patches, 5 to 32 words",
    "PyTorch, all products at once",
    "late_interaction_loss",
    "filip n{} p49 t5-32 d256",
    ("dense",),
)


def pictures(rows: Sequence[Row], machine: Machine) -> dict[str, tuple[str, str]]:
    """By the name of the file: what is seen, and the plot."""
    contrastive, late_interaction = (growth(line, rows, machine) for line in (CONTRASTIVE, LATE_INTERACTION))
    drawn = {
        "attention_padding": ("attention: times as fast as each way of padding", attention(rows, machine)),
        "contrastive_batch": ("contrastive loss: seconds and memory against the batch", contrastive),
        "late_interaction_batch": ("late interaction: seconds and memory against the batch", late_interaction),
        "floor": ("share of the least time that the products and the bytes of a call take here", floor(rows, machine)),
    }
    return {name: (seen, plot) for name, (seen, plot) in drawn.items() if plot}


def attention(rows: Sequence[Row], machine: Machine) -> str:
    """How many times as fast as each way of padding, against the share of padding."""
    shown: list[Row] = []

    def curve(peer: str, dtype: str) -> plots.Curve:
        points = []
        for share, benchmark in PADDINGS.items():
            own = [row for row in rows if row.is_of("attention_qkvpacked", benchmark, dtype)]
            if not (found := figures(own, seconds, "vlkernels", (peer,))):
                raise Refused(f"a plot has no row of {benchmark}, {dtype}, with {peer}, on {machine}: run `make bench`")
            points.append((share, found[0].times))
            shown.append(found[0].row)
        return plots.Curve(f"against {peer}", points)

    panels = [
        plots.Panel(
            f"attention, 32 samples, 12 heads of 64, {dtype}",
            "padding in the padded batch (% of its tokens)",
            "times as fast, forward and backward",
            [curve(peer, dtype) for peer in (*PADDED, "jagged SDPA")],
        )
        for dtype in DTYPES
    ]
    return plots.draw(panels, caption(shown, machine))


def growth(line: Line, rows: Sequence[Row], machine: Machine) -> str | None:
    """Time and peak memory in float32 against the number of pairs, once the memory of two batches is known."""
    (peer,) = line.peers
    variants = {"vlkernels": "vlkernels, in tiles", peer: line.against}
    prefix, suffix = line.benchmark.split("{}")
    by_pairs: dict[int, list[Row]] = {}
    for row in rows:
        number = row.values.get("benchmark", "").removeprefix(prefix).removesuffix(suffix)
        if number.isdecimal() and row.is_of(line.file, line.benchmark.format(number), "float32"):
            by_pairs.setdefault(int(number), []).append(row)

    def latest(amounts: Amounts) -> dict[int, Row]:
        found = {n: figures(own, amounts, "vlkernels", (peer,)) for n, own in sorted(by_pairs.items())}
        return {n: some[0].row for n, some in found.items() if some}

    def panel(label: str, amounts: Amounts, unit: float, shown: Mapping[int, Row]) -> plots.Panel:
        points = {variant: [(n, amounts(row.values)[variant] / unit) for n, row in shown.items()] for variant in variants}
        curves = [plots.Curve(name, points[variant]) for variant, name in variants.items()]
        return plots.Panel(f"{line.what}, float32", "pairs in the batch", label, curves, math.log2)

    timed, weighed = latest(seconds), latest(peak_bytes)
    if len(weighed) < 2:
        return None
    panels = [
        panel("seconds, forward and backward", seconds, 1.0, timed),
        panel("MiB held at once, beside the inputs", peak_bytes, 2.0**20, weighed),
    ]
    return plots.draw(panels, caption([*timed.values(), *weighed.values()], machine))


def floor(rows: Sequence[Row], machine: Machine) -> str | None:
    """Forward and backward of each line's latest rows that know what the device could do in their run."""
    bars, shown = [], []
    for file, benchmark in dict.fromkeys((line.file, line.benchmark) for line in LINES):
        shares = {}
        for dtype in DTYPES:
            own = [row for row in rows if row.is_of(file, benchmark, dtype) and share_of_floor(row.values) is not None]
            if own:
                shares[dtype] = 100 * share_of_floor(own[-1].values)
                shown.append(own[-1])
        if shares:
            bars.append(plots.Bar(f"{file}: {benchmark}", shares))
    title = "% of the floor: the least time that the call's products and bytes take on this device"
    return plots.draw_bars(title, bars, DTYPES, caption(shown, machine)) if bars else None


def caption(rows: Sequence[Row], machine: Machine) -> list[str]:
    """Where, when and of which commits."""
    days = ", ".join(sorted({row.values["date"][:10] for row in rows}))
    commits = {f"{(row.values['commit'] or 'unknown')[:10]}{'' if row.is_clean else ' with changes'}" for row in rows}
    return [f"{machine}; {days}", f"commit {', '.join(sorted(commits))}"]
