"""The tests that docs/TRAPS.md names are there."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| (?!trap \|)(?!-)(.+?) \| (.+?) \| `(.+?)::(\w+)` \|$")


def rows(page: str) -> list[tuple[str, str]]:
    """(file, test) of every trap."""
    lines = [line for line in page.splitlines() if line.startswith("|") and not line.startswith(("|---", "| trap |"))]
    found = [ROW.match(line) for line in lines]
    assert None not in found, [line for line, match in zip(lines, found, strict=True) if match is None]
    return [match.group(3, 4) for match in found]


@functools.cache
def functions_of(file: str) -> set[str]:
    path = ROOT / file
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def missing(page: str) -> list[str]:
    return [f"{file}::{test}" for file, test in rows(page) if test not in functions_of(file)]


def test_every_trap_names_a_test_that_exists():
    page = (ROOT / "docs/TRAPS.md").read_text()
    assert len(rows(page)) > 50 and missing(page) == []


def test_a_test_that_has_gone_is_noticed():
    for gone in ("tests/architecture/test_traps.py::test_gone", "tests/architecture/gone.py::test_it"):
        assert missing(f"| a | b | `{gone}` |") == [gone]
