"""`python -m benchmarks.report [--check]`: the README's table of measured ratios and its plots, from the stored results.

What they tell is declared in benchmarks/lines.py and, of a card, in benchmarks/targets.py. A row without its provenance is
refused, and so is a line without a row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.lines import DTYPES, LINES, Line
from benchmarks.measured import Machine, Refused, Row, read
from benchmarks.pictures import pictures
from benchmarks.provenance import ROOT
from benchmarks.targets import card_table

BEGIN = "<!-- measured: `python -m benchmarks.report` writes what stands from here -->"
END = "<!-- to here -->"


def pages(root: Path) -> dict[Path, str]:
    """What the README and the plots have to hold."""
    rows = read(root / "benchmarks" / "results")
    machine = told_machine(rows)
    own = [row for row in rows if row.machine == machine]
    drawn = pictures(own, machine)
    shown = [f"![{seen}](docs/{name}.svg)" for name, (seen, _) in drawn.items()]
    readme = root / "README.md"
    return {
        readme: between_marks(readme.read_text(), "\n".join([*table(own, machine), "", *shown, "", *card_table(rows)])),
        **{root / "docs" / f"{name}.svg": plot for name, (_, plot) in drawn.items()},
    }


def told_machine(rows: Sequence[Row]) -> Machine:
    """The CPU that every line was measured on; of several the one measured last."""
    by_machine: dict[Machine, list[Row]] = {}
    for row in rows:
        if row.machine.folder.startswith("cpu-"):
            by_machine.setdefault(row.machine, []).append(row)
    lacking = {machine: _missing(own) for machine, own in by_machine.items()}
    whole = [machine for machine, missing in lacking.items() if not missing]
    if whole:
        return max(whole, key=lambda machine: by_machine[machine][-1].values["date"])
    if not lacking:
        raise Refused("no row of a CPU at all: run `make bench`")
    machine = min(lacking, key=lambda machine: len(lacking[machine]))
    raise Refused(f"{lacking[machine][0]}, on {machine}: run `make bench`, or take the line out of benchmarks/lines.py")


def _missing(rows: Sequence[Row]) -> list[str]:
    return [
        f"{line.what!r} has no row of {line.file}, {line.benchmark}, {dtype}, that measured {', '.join(line.peers)}"
        for line in LINES
        for dtype in line.missing(rows)
    ]


def table(rows: Sequence[Row], machine: Machine) -> list[str]:
    shown = [figure.row for line in LINES for dtype in line.dtypes for figure in line.figures(rows, dtype)]
    days = sorted({row.values["date"][:10] for row in shown})
    versions = " and ".join(sorted({row.values["torch"] for row in shown}))
    told = f"{machine}; torch {versions}; {' to '.join(sorted({days[0], days[-1]}))}."
    starred = " \\* is a run of a tree with changes that no commit holds." if not all(row.is_clean for row in shown) else ""
    heads = ("what", "against", *(f"times as fast, {dtype}" for dtype in DTYPES), "rows")
    body = [
        (line.what, line.against, *(_cell(line, rows, dtype) for dtype in DTYPES), _rows(line, rows, machine)) for line in LINES
    ]
    cells = (heads, ["---"] * len(heads), *body)
    return [f"{told}{starred}", "", *(f"| {' | '.join(some)} |" for some in cells)]


def _cell(line: Line, rows: Sequence[Row], dtype: str) -> str:
    if dtype not in line.dtypes:
        return ""
    found = line.figures(rows, dtype)
    told = "; ".join(f"{_times(figure.times)}{'' if figure.row.is_clean else chr(92) + '*'}" for figure in found)
    return f"{told} ({judged(found[0].times, line.targets[dtype])})" if dtype in line.targets else told


def judged(times: float, target: float) -> str:
    if times >= target:
        return f"target {target:g}: met"
    percent = max(100 * (1 - times / target), 0.1)
    return f"target {target:g}: {percent:.{0 if percent >= 10 else 1}f} % short"


def _times(times: float) -> str:
    return f"{times:.2f}" if times < 10 else f"{times:.1f}"


def _rows(line: Line, rows: Sequence[Row], machine: Machine) -> str:
    file = line.figures(rows, line.dtypes[0])[0].row.path.stem
    return f"{file}: [{line.benchmark}](benchmarks/results/{machine.folder}/{file}.jsonl)"


def between_marks(text: str, content: str) -> str:
    """``text`` with ``content`` where the marks stand."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise Refused(f"README.md needs the lines {BEGIN} and {END}, once each, to hold the table")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{rest.partition(END)[2]}"


def stale(written: Mapping[Path, str]) -> list[Path]:
    """The files that hold something else."""
    return [path for path, text in written.items() if not path.exists() or path.read_text() != text]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is stale")
    options = parser.parse_args(arguments)
    try:
        written = pages(root)
    except Refused as reason:
        print(f"report refused: {reason}", file=sys.stderr)
        return 1
    old = stale(written)
    for path in old:
        print(f"{path.relative_to(root)}: {'stale: run `python -m benchmarks.report`' if options.check else 'written'}")
        if not options.check:
            path.write_text(written[path])
    return 1 if options.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
