"""`python -m benchmarks.scaling_docs`: the tables and plots of docs/SCALING.md."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.scaled_models import albef_base, clip_large
from benchmarks.scaling import Assumptions, Part, Run, dense_loss_memory, loss_memory, memory, step_time, total, wire

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "SCALING.md"
BEGIN, END = "<!-- scaling: written by `python -m benchmarks.scaling_docs` -->\n", "<!-- scaling: end -->\n"

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
TABLE_RANKS = (8, 64, 256, 1024)
SAMPLES, LOSS_PAIRS = 64, 512
COLORS = {"ZeRO 0": "#8a8a8a", "ZeRO 1": "#c8782a", "ZeRO 2": "#4a8f5a", "ZeRO 3": "#2f6f9f"}
LOSS_COLORS = {"dense": "#8a8a8a", "gather": "#c8782a", "ring": "#2f6f9f"}
WIDTH, HEIGHT, LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 400, 290, 58, 46, 320, 190


@dataclass(frozen=True)
class Model:
    name: str
    parts: tuple[Part, ...]
    loss_width: int


MODELS = (Model("CLIP ViT-L/14", clip_large(), 768), Model("ALBEF base", albef_base(), 256))
DECIDED = ("parameters", "gradients", "optimizer", "gathered parameters", "gradient bucket")
Curves = dict[str, list[float]]


def planned(model: Model, stage: int, ranks: int) -> Run:
    """The run of the tables: the contrastive loss over all ranks, by the exchange that holds less."""
    return Run(
        model.parts,
        stage,
        ranks,
        dtype="bf16" if stage else "fp32",
        samples=SAMPLES,
        exchange="ring",
        loss_width=model.loss_width,
        checkpointing=True,
    )


def decided(run: Run) -> int:
    held = memory(run)
    return sum(held[kind] for kind in DECIDED)


# ---- the page


def generated() -> str:
    tables = "\n".join(_table(model) for model in MODELS)
    return f"{BEGIN}\n{_assumptions()}\n{tables}\n{_pictures()}\n{END}"


def _assumptions() -> str:
    given = Assumptions()
    rows = [f"| `{each.name}` | {_plain(getattr(given, each.name))} | {each.metadata['meaning']} |" for each in fields(given)]
    return "| assumption | value | |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _plain(value: float | tuple[float, ...]) -> str:
    return ", ".join(f"{each:g}" for each in (value if isinstance(value, tuple) else (value,)))


def _table(model: Model) -> str:
    weights = [weight for part in model.parts for weight in part.weights]
    trained = sum(weight.numel for weight in weights if weight.trained)
    lines = [
        f"### {model.name}: {trained / 1e6:.1f} M trained of {total(weights) / 1e6:.1f} M parameters",
        "",
        "| ranks | ZeRO | states | gathered | bucket | activations | loss | sent | step | of it, waiting |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(planned(model, stage, ranks)) for ranks in TABLE_RANKS for stage in range(4)]
    return "\n".join(lines) + "\n"


def _row(run: Run) -> str:
    held, time = memory(run), step_time(run)
    states = sum(held[kind] for kind in DECIDED[:3])
    sizes = [f"{nbytes / 1e9:.2f}" for nbytes in (states, *(held[kind] for kind in (*DECIDED[3:], "activations")))]
    sent = " + ".join(f"{wire(run)[kind] / 1e9:.2f}" for kind in ("parameters", "gradients", "loss"))
    rest = f"{held['loss'] / 1e6:.2f} MB", sent, f"{time.step * 1e3:.0f} ms", f"{time.exposed / time.step:.0%}"
    return "| " + " | ".join([f"{run.ranks:,}", f"{run.stage} ({run.dtype})", *sizes, *rest]) + " |"


def _pictures() -> str:
    return (
        "![Memory of a rank and bytes that it sends, against ranks, for ZeRO 0 to 3](scaling_zero.svg)\n\n"
        "![Memory of the contrastive loss of a rank against ranks: dense, gather, ring](scaling_loss.svg)\n"
    )


# ---- the plots


def zero_picture() -> str:
    kinds = (("memory of a rank", decided), ("sent by a rank and step", _sent))
    panels = []
    for row, model in enumerate(MODELS):
        for column, (title, value) in enumerate(kinds):
            curves = {
                name: [value(planned(model, stage, ranks)) / 1e9 for ranks in RANKS] for stage, name in enumerate(COLORS)
            }
            panels.append(_panel(f"{model.name}: {title}", curves, COLORS, column * WIDTH, row * HEIGHT))
    note = "predicted; states, gathered, bucket; 0 in fp32, others bf16"
    return _page(panels, COLORS, 2 * HEIGHT, note)


def loss_picture() -> str:
    panels = []
    for column, model in enumerate(MODELS):
        curves = {name: [_loss_bytes(name, ranks, model.loss_width) / 1e9 for ranks in RANKS] for name in LOSS_COLORS}
        title = f"loss of {LOSS_PAIRS} pairs a rank, width {model.loss_width}"
        panels.append(_panel(title, curves, LOSS_COLORS, column * WIDTH, 0))
    return _page(panels, LOSS_COLORS, HEIGHT, "predicted; memory of a rank; features in bf16")


def _loss_bytes(way: str, ranks: int, width: int) -> int:
    exchange = None if way == "dense" else way
    run = Run((), 1, ranks, exchange=exchange, loss_width=width, loss_samples=LOSS_PAIRS)
    return loss_memory(run) if exchange else dense_loss_memory(run)


def _sent(run: Run) -> int:
    return sum(wire(run).values())


def _page(panels: list[str], colors: dict[str, str], height: int, note: str) -> str:
    width, legend = 2 * WIDTH, []
    for position, (name, color) in enumerate(colors.items()):
        x = LEFT + 82 * position
        legend.append(f'<rect x="{x}" y="{height + 1}" width="12" height="12" rx="2" fill="{color}"/>')
        legend.append(_label(x + 17, height + 11, name))
    legend.append(_label(LEFT + 82 * len(colors), height + 11, note))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height + 24}" '
        f'viewBox="0 0 {width} {height + 24}" font-family="sans-serif">\n'
        '<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join([*panels, *legend]) + "\n</svg>\n"
    )


def _panel(title: str, curves: Curves, colors: dict[str, str], left: int, top: int) -> str:
    """Both axes logarithmic; the grid is at powers of ten, and at 2 and 5 times them where those are few."""
    values = [value for curve in curves.values() for value in curve]
    marks = _marks(min(values), max(values))
    x0, y0 = left + LEFT, top + TOP
    parts = [
        f'<text x="{x0}" y="{top + 20}" font-size="13" font-weight="bold" fill="#222222">{title}</text>',
        _label(x0, top + 36, "GB, against ranks"),
    ]
    for mark in marks:
        y = y0 + _down(mark, marks)
        parts.append(f'<line x1="{x0}" y1="{y:.1f}" x2="{x0 + PLOT_WIDTH}" y2="{y:.1f}" stroke="#e2e2e2"/>')
        parts.append(_label(x0 - 6, y + 4, f"{mark:g}", "end"))
    for ranks in RANKS:
        parts.append(_label(x0 + _along(ranks), y0 + PLOT_HEIGHT + 16, f"{ranks}", "middle"))
    for later, (name, curve) in zip(reversed(range(len(curves))), curves.items(), strict=True):
        points = " ".join(f"{x0 + _along(r):.1f},{y0 + _down(v, marks):.1f}" for r, v in zip(RANKS, curve, strict=True))
        width = 2 + 2 * later  # curves that meet stay visible
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colors[name]}" stroke-width="{width}"/>')
    return "\n".join(parts)


def _marks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if len(powers) > 4 else (1, 2, 5)
    marks = [step * 10.0**power for power in powers for step in steps]
    first = max(position for position, mark in enumerate(marks) if mark <= low)
    last = min(position for position, mark in enumerate(marks) if mark >= high)
    return marks[first : last + 1]


def _along(ranks: int) -> float:
    return PLOT_WIDTH * math.log(ranks / RANKS[0]) / math.log(RANKS[-1] / RANKS[0])


def _down(value: float, marks: list[float]) -> float:
    return PLOT_HEIGHT * math.log(marks[-1] / value) / math.log(marks[-1] / marks[0])


def _label(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" text-anchor="{anchor}" fill="#555555">{text}</text>'


# ---- files


def files() -> dict[Path, str]:
    """What the files hold when they are not stale."""
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page = before + generated() + after
    return {PAGE: page, DOCS / "scaling_zero.svg": zero_picture(), DOCS / "scaling_loss.svg": loss_picture()}


def main() -> None:
    for path, text in files().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
