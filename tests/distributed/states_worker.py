"""One rank of test_states_parity: prints the states of every stage and accumulation."""

import json

import states_curves

from engine.training import zero

CASES = [(stage, accumulation) for stage in (0, 1, 2, 3) for accumulation in (1, 2)]


def curves() -> dict:
    """By name, so that they survive JSON."""
    return {f"{stage} {accumulation}": states_curves.zero_curve(stage, accumulation) for stage, accumulation in CASES}


def main() -> int:
    print(json.dumps(curves()))
    return 0


if __name__ == "__main__":
    zero.leave(main)
