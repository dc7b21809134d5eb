"""For tests that train in their own process: a process group of one, taken down when the session is over."""

import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture(scope="session", autouse=True)
def process_group_of_one() -> Iterator[None]:
    """`zero.join` makes it and later calls find it: DeepSpeed cannot start a second one in a process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.2)  # gloo's threads let go of their tensors before the interpreter does
