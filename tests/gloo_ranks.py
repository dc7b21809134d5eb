"""Ranks of a gloo group in processes of their own, forked from a server that has imported once what they need."""

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# The server starts with the first group of a session and imports these; a rank imports the module of its work.
IMPORTED_ONCE = ("torch.distributed", "torch.nn.parallel", "vlkernels", "vlkernels.testing.contract")
LIMIT = timedelta(seconds=60)


def run_ranks(world: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(rank, world, *arguments)`` returns on every rank."""
    multiprocessing.set_forkserver_preload([*IMPORTED_ONCE, "tests.gloo_ranks"])
    torch.multiprocessing.start_processes(
        _in_group, (world, str(folder), work, arguments), nprocs=world, start_method="forkserver"
    )
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def _in_group(rank: int, world: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=LIMIT)
    torch.save(work(rank, world, *arguments), f"{folder}/rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # a gloo thread that still holds a tensor would abort the shutdown
