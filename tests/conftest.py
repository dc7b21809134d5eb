"""Shared by all tests: small, repeatable, and silent about GPUs that are not there."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("deepspeed") is None:  # the kernels' tests need torch alone
    collect_ignore = ["engine", "distributed"]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def repeatable():
    torch.manual_seed(0)
