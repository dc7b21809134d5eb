"""`python -m benchmarks.figures`: the README's picture of the mask tables, drawn by the masks themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import vlkernels as vk

PATH = Path(__file__).resolve().parent.parent / "docs" / "mask_tables.svg"
CELL, GAP, TOP, LEFT, PANEL = 12, 3, 58, 20, 168
COLORS = {"image": "#2f6f9f", "text": "#c8782a", "query": "#4a8f5a"}


@dataclass(frozen=True)
class Panel:
    """One system: its name, its segments as (kind, tokens), its table; ``keys`` for cross-attention."""

    title: str
    subtitle: str
    mask: vk.SegmentMask
    segments: tuple[tuple[str, int], ...]
    keys: tuple[tuple[str, int], ...] | None = None


PANELS = (
    Panel("UNITER, ViLT", "one stream: full", vk.SegmentMask.full(2), (("image", 4), ("text", 5))),
    Panel("CLIP", "two towers: block-diagonal", vk.SegmentMask([["full", "none"], ["none", "causal"]]), (("image", 4), ("text", 5))),
    Panel("SimVLM, GIT", "prefix-LM", vk.SegmentMask.prefix_lm(), (("image", 4), ("text", 5))),
    Panel("BLIP-2 ITG", "queries, then causal text", vk.SegmentMask.prefix_lm(), (("query", 3), ("text", 5))),
    Panel("ALBEF, BLIP", "text reads image: cross", vk.SegmentMask.full(1), (("text", 5),), (("image", 7),)),
)


def draw() -> str:
    width = LEFT + PANEL * len(PANELS)
    body = [_panel(panel, LEFT + PANEL * position) for position, panel in enumerate(PANELS)]
    legend = _legend(LEFT, TOP + 10 * (CELL + GAP) + 14)
    height = TOP + 10 * (CELL + GAP) + 34
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join([*body, legend]) + "\n</svg>\n"
    )


def _panel(panel: Panel, left: int) -> str:
    keys = panel.keys or panel.segments
    layout = vk.SegmentLayout([[n for _, n in panel.segments]])
    kv_layout = vk.SegmentLayout([[n for _, n in panel.keys]]) if panel.keys else None
    seen = panel.mask.dense(layout, kv_layout).tolist()
    row_kinds = [kind for kind, n in panel.segments for _ in range(n)]
    column_kinds = [kind for kind, n in keys for _ in range(n)]
    parts = [
        f'<text x="{left}" y="18" font-size="13" font-weight="bold" fill="#222222">{panel.title}</text>',
        f'<text x="{left}" y="33" font-size="11" fill="#666666">{panel.subtitle}</text>',
    ]
    for column, kind in enumerate(column_kinds):
        parts.append(_cell(left + (column + 1) * (CELL + GAP), TOP - CELL - 2, COLORS[kind]))
    for row, kind in enumerate(row_kinds):
        y = TOP + 4 + row * (CELL + GAP)
        parts.append(_cell(left - 2, y, COLORS[kind]))
        for column, visible in enumerate(seen[row]):
            parts.append(_cell(left + (column + 1) * (CELL + GAP), y, COLORS[column_kinds[column]] if visible else "#eeeeee"))
    return "\n".join(parts)


def _legend(left: int, y: int) -> str:
    parts = []
    for position, (kind, color) in enumerate(COLORS.items()):
        x = left + position * 110
        parts.append(_cell(x, y, color))
        parts.append(f'<text x="{x + CELL + 5}" y="{y + CELL - 2}" font-size="11" fill="#444444">{kind} tokens</text>')
    note = "rows ask, columns are read; a coloured cell is visible"
    parts.append(f'<text x="{left + 350}" y="{y + CELL - 2}" font-size="11" fill="#444444">{note}</text>')
    return "\n".join(parts)


def _cell(x: int, y: int, color: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="2" fill="{color}"/>'


if __name__ == "__main__":
    PATH.write_text(draw())
