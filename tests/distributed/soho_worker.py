"""One rank of test_soho_parity: leaves what `zero_points` gives for every stage in a file of its own."""

import os
import sys
from pathlib import Path

import soho_curves
import torch

from engine.training import zero


def main() -> int:
    cache, folder = sys.argv[1:]
    found = {stage: soho_curves.zero_points(cache, stage, folder) for stage in soho_curves.STAGES}
    torch.save(found, Path(folder) / f"found_by_{os.environ['RANK']}.pt")
    return 0


if __name__ == "__main__":
    zero.leave(main)
