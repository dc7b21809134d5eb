"""What the emulator does, and that it finds what it says it finds."""

from pathlib import Path

import pytest
import torch

from tests import emulated

pytestmark = pytest.mark.skipif(emulated.refusal() is not None, reason=str(emulated.refusal()))
SEEDS = range(1, 9)


@pytest.fixture
def kernels():
    module = emulated.module(Path(__file__).with_name("emulator_kernels.cpp"))
    yield module
    module.run_in_order()


def reversed_by(kernels, with_barrier):
    numbers = torch.arange(64, dtype=torch.int32)
    kernels.reverse(numbers.data_ptr(), 64, with_barrier)
    return torch.equal(numbers, torch.arange(63, -1, -1, dtype=torch.int32))


def test_a_barrier_holds_in_every_order(kernels):
    for seed in (0, *SEEDS):
        kernels.shuffle(seed)
        assert reversed_by(kernels, with_barrier=True)


def test_a_missing_barrier_gives_wrong_results(kernels):
    assert not reversed_by(kernels, with_barrier=False)
    for seed in SEEDS:
        kernels.shuffle(seed)
        assert not reversed_by(kernels, with_barrier=False)


def test_collectives(kernels):
    out = torch.zeros(64, 6, dtype=torch.int32)
    for seed in (0, *SEEDS):
        kernels.shuffle(seed)
        kernels.collectives(out.zero_().data_ptr())
        lanes = torch.arange(32, dtype=torch.int32).repeat(2)
        assert out[:, 0].eq(496).all()
        assert torch.equal(out[:, 1], (lanes + 1).clamp(max=31))
        assert out[:, 2].eq(3).all()
        assert (out[:, 3] == torch.tensor(0xAAAAAAAA - 2**32, dtype=torch.int32)).all()
        assert out[:, 4].eq(1).all() and out[:, 5].eq(0).all()


def test_grids_and_blocks_of_several_dimensions(kernels):
    counter, largest = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    kernels.count(counter.data_ptr(), largest.data_ptr())
    assert (counter.item(), largest.item()) == (12 * 32, 31)
    kernels.only_blocks(3, 5)
    kernels.count(counter.zero_().data_ptr(), largest.data_ptr())
    assert counter.item() == 2 * 32


def test_dynamic_shared_memory(kernels):
    total = torch.zeros(1)
    kernels.fill_shared(10, 10, total.data_ptr())
    assert total.item() == 10


@pytest.mark.parametrize(
    "name, takes, complaint",
    [
        ("different_barriers", 0, r"different barriers in block \(0, 0, 0\)\n  threads 0 to 31: waits in __syncthreads"),
        ("barrier_of_some", 0, r"for ever.*\n  threads 0 to 39: has ended\n  threads 40 to 63: waits in __syncthreads"),
        ("absent_lanes", 1, r"for ever.*\n  threads 0 to 0: waits in __shfl_xor_sync\(ffffffff\) at .*\n  threads 1 to 1: has"),
        ("outside_its_mask", 0, "a lane is not in its own mask of __syncwarp"),
        ("unnamed_source", 1, "__shfl_xor_sync reads a lane that its mask does not name"),
    ],
)
def test_threads_that_do_not_meet_are_reported(kernels, name, takes, complaint):
    memory = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=complaint):
        getattr(kernels, name)(*[memory.data_ptr()] * takes)
    assert reversed_by(kernels, with_barrier=True)  # the emulator goes on after a report
