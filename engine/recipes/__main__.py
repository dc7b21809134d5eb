"""Print the table of systems, or some of them: `python -m engine.recipes [NAME ...]`."""

from __future__ import annotations

import sys

from engine.recipes.table import describe, names


def main(wanted: list[str]) -> int:
    """0, or 2 where a name is not that of a recipe."""
    if {"-h", "--help"} & set(wanted):
        print(__doc__)
        return 0
    if unknown := [name for name in wanted if name not in names()]:
        print(f"recipes: error: no recipe {', '.join(unknown)}; there are {', '.join(names())}", file=sys.stderr)
        return 2
    print("\n\n".join(describe(name) for name in wanted or names()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
