"""Line plots as SVG text, the same for the same rows; drawn from the results by `python -m benchmarks.report`."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

COLORS = ("#2f6f9f", "#c8782a", "#4a8f5a", "#8a5a9f")
WIDTH, HEIGHT, PANEL, TOP, LEFT = 300, 200, 400, 48, 62
LEGEND_LINE, CAPTION_LINE = 16, 15


@dataclass(frozen=True)
class Curve:
    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """``x_scale`` says where a number lies on the axis below; the one at the side is logarithmic."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    x_scale: Callable[[float], float] = float


def draw(panels: Sequence[Panel], caption: Sequence[str]) -> str:
    legend = TOP + HEIGHT + 52
    below = legend + LEGEND_LINE * max(len(panel.curves) for panel in panels)
    width, height = PANEL * len(panels), below + CAPTION_LINE * len(caption) + 6
    body = [line for number, panel in enumerate(panels) for line in _panel(panel, LEFT + PANEL * number, legend)]
    body += [_text(LEFT, below + CAPTION_LINE * (i + 1) - 4, line, size=10, color="#666666") for i, line in enumerate(caption)]
    return _page(width, height, body)


@dataclass(frozen=True)
class Bar:
    """One label, a length for each of some series."""

    name: str
    lengths: Mapping[str, float]


BAR, BARS_LEFT, BARS_WIDTH = 13, 380, 380


def draw_bars(title: str, bars: Sequence[Bar], series: Sequence[str], caption: Sequence[str]) -> str:
    """Bars from 0 to 100 or to the longest, their lengths beside them."""
    longest = max(100.0, *(length for bar in bars for length in bar.lengths.values()))
    parts, y = [_text(20, 20, title, size=13, color="#222222")], TOP
    for bar in bars:
        parts.append(_text(BARS_LEFT - 8, y + BAR * len(bar.lengths) / 2 + 3, bar.name, anchor="end"))
        for name, length in bar.lengths.items():
            wide = BARS_WIDTH * length / longest
            color = COLORS[series.index(name)]
            parts.append(f'<rect x="{BARS_LEFT}" y="{y}" width="{wide:.1f}" height="{BAR - 2}" fill="{color}"/>')
            parts.append(_text(BARS_LEFT + wide + 5, y + BAR - 4, f"{length:.0f}", size=10))
            y += BAR
        y += 7
    for number, name in enumerate(series):
        x = BARS_LEFT + 110 * number
        parts.append(f'<rect x="{x}" y="{y + 8}" width="18" height="{BAR - 3}" fill="{COLORS[number]}"/>')
        parts.append(_text(x + 24, y + 17, name))
    y += LEGEND_LINE + 14
    parts += [_text(20, y + CAPTION_LINE * (i + 1) - 4, line, size=10, color="#666666") for i, line in enumerate(caption)]
    return _page(BARS_LEFT + BARS_WIDTH + 50, y + CAPTION_LINE * len(caption) + 6, parts)


def _page(width: int, height: int, body: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _panel(panel: Panel, left: int, legend: int) -> list[str]:
    marks = ticks([y for curve in panel.curves for _, y in curve.points])
    columns = sorted({x for curve in panel.curves for x, _ in curve.points})
    x_of = _onto([panel.x_scale(x) for x in columns], left + 20, left + WIDTH - 20)
    y_of = _onto([math.log(mark) for mark in marks], TOP + HEIGHT, TOP)
    middle = left + WIDTH / 2
    parts = [
        _text(middle, 20, panel.title, size=13, anchor="middle", color="#222222"),
        _text(middle, TOP + HEIGHT + 34, panel.x_label, anchor="middle"),
        _text(left - 4, TOP - 10, panel.y_label),
    ]
    for mark in marks:
        y = y_of(math.log(mark))
        parts.append(f'<path d="M{left} {y:.1f}H{left + WIDTH}" stroke="#dddddd"/>')
        parts.append(_text(left - 6, y + 4, f"{mark:,g}", anchor="end"))
    parts += [_text(x_of(panel.x_scale(x)), TOP + HEIGHT + 17, f"{x:,g}", anchor="middle") for x in columns]
    for number, (curve, color) in enumerate(zip(panel.curves, COLORS)):
        spots = [(x_of(panel.x_scale(x)), y_of(math.log(y))) for x, y in curve.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in spots]
        y = legend + LEGEND_LINE * number
        parts.append(f'<path d="M{left} {y - 4}h18" stroke="{color}" stroke-width="3"/>')
        parts.append(_text(left + 25, y, curve.name))
    return parts


def ticks(values: Sequence[float]) -> list[float]:
    """1, 2, 5, 10 and so on, from below the least value to above the largest."""
    exponents = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    marks = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    first = max(i for i, mark in enumerate(marks) if mark <= min(values))
    last = min(i for i, mark in enumerate(marks) if mark >= max(values))
    return marks[first : max(last, first + 1) + 1]


def _onto(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """The straight map of the range of these values onto pixels."""
    low, high = min(values), max(values)
    return lambda value: start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)


def _text(x: float, y: float, words: str, size: int = 11, anchor: str = "start", color: str = "#444444") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{color}">{html.escape(words)}</text>'
