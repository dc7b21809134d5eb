"""The mask table of every published system, on a CPU: awkward batches, head widths, dtypes, grouped heads, dropout."""

import pytest
import torch

from tests.ops import attention_systems as systems
from vlkernels.core import native
from vlkernels.core.spec import Case

IMPLEMENTATIONS = ("torch", "cpp") if native.load() is None else ("torch",)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", systems.BATCHES)
@pytest.mark.parametrize("table, make", systems.TABLES, ids=systems.NAMES)
def test_tables(table, make, batch, impl):
    systems.verify(make(table, batch), torch.float32, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("width, dtype", systems.HEADS)
def test_head_widths(width, dtype, impl):
    for options in ({}, {"dropout_p": 0.1}, {"heads": (2, 1)}):
        case = systems.self_case(systems.SELF["SimVLM, BLIP-2 captions: image, text"], "primes", width, **options)
        systems.verify(case, dtype, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_thousand_samples(impl):
    systems.verify(Case("a thousand samples", systems.thousand_samples), torch.float32, impl)
