"""Runs of pretrain.py with the imports behind them: each is a process of its own, forked from this one.

Reads from stdin a line of JSON per run, {"argv": [...], "log": path}; answers with its process id, and
with its exit code when it is over.
"""

import gc
import importlib
import json
import os
import sys

import torch

from engine import pretrain
from engine.data.builtin.picture_sets import scene_glyphs
from engine.training import zero

LATE = (
    "matplotlib.pyplot",
    "torch.utils.tensorboard",
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
"""What a run imports once it is under way."""


def run(argv: list[str], log: str) -> None:
    """As `python engine/pretrain.py` does it, in the child."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    zero.leave(lambda: pretrain.main(argv))


def main() -> int:
    zero.import_deepspeed(torch.device("cpu"))
    for name in LATE:
        importlib.import_module(name)
    scene_glyphs()  # kept by what draws and detects them
    gc.freeze()  # DeepSpeed collects garbage six times per start
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(**json.loads(line))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return 0


if __name__ == "__main__":
    zero.leave(main)
