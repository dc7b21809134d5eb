"""One rank of test_feature_cache_parity: leaves its steps under every stage in a file. Takes the folder and the micro-batch."""

import sys
from pathlib import Path

import cached_steps
import torch

from engine.training import zero


def main() -> int:
    folder, micro_batch = sys.argv[1:]
    steps = {stage: cached_steps.zero_step(stage, int(micro_batch)) for stage in cached_steps.STAGES}
    torch.save(steps, Path(folder) / f"rank_{torch.distributed.get_rank()}.pt")
    return 0


if __name__ == "__main__":
    zero.leave(main)
