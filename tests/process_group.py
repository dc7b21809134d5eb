"""For tests that train in their own process: a process group of one, taken down when the session is over."""

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="session", autouse=True)
def process_group_of_one() -> Iterator[None]:
    """`zero.join` makes it and later calls find it: DeepSpeed cannot start a second one in a process.

    One thread: the models are so small that a second one only waits, and on a busy machine waits long.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.2)  # gloo's threads let go of their tensors before the interpreter does
