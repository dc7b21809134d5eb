"""One rank of test_zero_parity: prints the curves of quickstart and stand-in under every stage."""

import json
import sys

import quickstart_curves
import standin_curves

from engine.training import zero

STAGES = (0, 1, 2, 3)


def curves(cache: str) -> dict:
    """By name, so that they survive JSON."""
    quickstart = {f"{stage}": quickstart_curves.zero_curve(cache, stage) for stage in STAGES}
    standin = {
        f"{stage} {kind}": standin_curves.zero_curve(stage, **options)
        for stage in STAGES
        for kind, options in standin_curves.KINDS.items()
    }
    return {"quickstart": quickstart, "standin": standin}


def main() -> int:
    print(json.dumps(curves(sys.argv[1])))
    return 0


if __name__ == "__main__":
    zero.leave(main)
