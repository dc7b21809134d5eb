"""One rank of test_recipe_parity: `recipe_worker.py CACHE FOLDER` writes its states of every kind and stage there."""

import sys

import recipe_states
import torch
import torch.distributed as dist

from engine.training import zero


def main() -> int:
    _, cache, folder = sys.argv
    for kind in recipe_states.KINDS:
        for stage in recipe_states.STAGES:
            found = recipe_states.under_zero(kind, cache, stage)
            torch.save(found, f"{folder}/{kind}_{stage}_{dist.get_rank()}.pt")
    return 0


if __name__ == "__main__":
    zero.leave(main)
