"""One rank of test_uniter_parity: prints its curves. Takes the data's cache and the truth's file."""

import json
import sys

import torch
import uniter_curves

from engine.training import zero


def main() -> int:
    cache, truth = sys.argv[1:]
    print(json.dumps(uniter_curves.zero_curves(cache, torch.load(truth, weights_only=True))))
    return 0


if __name__ == "__main__":
    zero.leave(main)
