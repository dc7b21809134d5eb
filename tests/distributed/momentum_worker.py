"""One rank of test_momentum_parity: prints the states of every stage."""

import json
import sys

import momentum_curves

from engine.training import zero


def main() -> int:
    print(json.dumps({stage: momentum_curves.zero_states(sys.argv[1], stage) for stage in momentum_curves.STAGES}))
    return 0


if __name__ == "__main__":
    zero.leave(main)
