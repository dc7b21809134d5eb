"""These tests train in this process too: a process group of one, taken down when they are over."""

import os
import time

import pytest
import torch.distributed as dist


@pytest.fixture(scope="package", autouse=True)
def process_group_of_one():
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.2)  # gloo's threads let go of their tensors before the interpreter does
    os.environ.clear()
    os.environ.update(before)
