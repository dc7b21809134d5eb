"""What is kept for tensors: shared while they live unchanged, never where something else may write them or own its memory."""

import multiprocessing
import shutil
import threading
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vlkernels.core import kept as module
from vlkernels.core import library
from vlkernels.core.kept import kept


@pytest.fixture
def eager():
    """As inside the kernel of an eager call."""
    with library.eager_call:
        yield


def doubled(*tensors, name="doubled"):
    return kept((name,), tensors, lambda: 2 * tensors[0])


def test_it_is_shared_while_its_tensors_live_unchanged(eager):
    x, y = torch.arange(3), torch.arange(3)
    first = doubled(x, None, y)
    assert doubled(x, None, y) is first
    assert doubled(x, y, None) is not first and doubled(x, None, x) is not first
    assert doubled(x, None, y, name="other") is not first
    y[0] += 1
    assert doubled(x, None, y) is not first
    x[0] += 1
    assert doubled(x, None, y).tolist() == [2, 2, 4]


def test_a_tensor_in_the_place_of_a_dead_one_is_another(eager, monkeypatch):
    x = torch.arange(3)
    first = doubled(x)
    place = next(key for key in module._made if key[0] == "doubled" and module._made[key][1] is first)
    y = torch.arange(3)
    module._made["doubled", (id(y), y._version)] = module._made[place]
    assert doubled(y) is not first


def test_only_so_many_are_kept(eager):
    alive = [torch.tensor([i]) for i in range(2 * module.MOST_KEPT)]
    made = [doubled(x) for x in alive]
    assert len(module._made) == module.MOST_KEPT
    assert doubled(alive[-1]) is made[-1] and doubled(alive[0]) is not made[0]


def test_nothing_is_kept_for_the_buffers_of_a_compiled_graph():
    x = torch.arange(3)
    first = doubled(x)
    x.data.add_(1)  # as such a graph writes a buffer again: the same tensor, and PyTorch counts nothing
    assert x._version == 0 and doubled(x).tolist() == [2, 4, 6] and first.tolist() == [0, 2, 4]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_a_compiled_graph_that_uses_a_buffer_twice_gets_what_belongs_to_each():
    def sums(starts, x):
        return x + kept(("sum",), (starts,), lambda: starts.sum())

    op = library.define(
        "test_sums(Tensor starts, Tensor x, str impl) -> Tensor", fake=lambda s, x, impl: x.clone(), kernels={"torch": sums}
    )

    def chain(lengths, first, second, x):
        for index in (first, second):
            taken = lengths[index]
            starts = taken.cumsum(0, dtype=torch.int32) - taken
            x = op(starts, op(starts, x, "torch"), "torch")
        return x

    lengths = torch.tensor([3, 5, 7, 9, 2, 4], dtype=torch.int32)
    arguments = lengths, torch.tensor([0, 1, 2]), torch.tensor([5, 3, 1]), torch.zeros(4)
    with torch.no_grad():
        assert torch.equal(torch.compile(chain, fullgraph=True)(*arguments), chain(*arguments))


def test_inference_tensors_do_not_count_their_changes(eager):
    with torch.inference_mode():
        x = torch.arange(3)
        first = doubled(x)
        x += 1
        assert doubled(x).tolist() == [2, 4, 6] and first.tolist() == [0, 2, 4]


def test_what_is_kept_in_inference_mode_serves_a_later_backward(eager):
    x = torch.arange(3)
    with torch.inference_mode():
        assert not doubled(x).is_inference()


@pytest.fixture
def streams(monkeypatch):
    """CUDA tensors without a card, on a stream that the test names; 0 is the default stream."""
    now = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: now)
    with FakeTensorMode(), library.eager_call:
        yield now


def test_nothing_kept_goes_into_a_captured_graph_or_comes_out_of_one(streams):
    x = torch.empty(3, dtype=torch.int32, device="cuda")
    outside = doubled(x)
    streams.cuda_stream = 7  # captured, or warmed up in the memory of graphs
    inside = [doubled(x) for _ in range(2)]
    assert inside[0] is not outside and inside[1] is not inside[0], "lengths may be others when the graph is replayed"
    streams.cuda_stream = 0
    assert doubled(x) is outside


def test_a_tensor_first_seen_in_a_capture_is_not_known_behind_it(streams):
    x = torch.empty(3, dtype=torch.int32, device="cuda")
    streams.cuda_stream = 7
    inside = doubled(x)
    streams.cuda_stream = 0
    assert doubled(x) is not inside, "its memory belongs to the graph"


def test_static_tensors_that_are_refilled_before_a_replay_are_others_outside_too(streams):
    x = torch.empty(3, dtype=torch.int32, device="cuda")
    before = doubled(x)
    x.fill_(1)
    assert doubled(x) is not before


def test_threads_share_it(eager):
    alive = [torch.tensor([i]) for i in range(3 * module.MOST_KEPT)]
    wrong = []

    def work(step):
        with library.eager_call:
            for i in range(0, 2000 * step, step):
                i %= len(alive)
                if doubled(alive[i]).item() != 2 * i:
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(step,)) for step in (1, 5, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(module._made) <= module.MOST_KEPT


def test_others_are_kept_while_what_two_threads_made_is_replaced(eager):
    alive = [torch.tensor([i]) for i in range(2 * module.MOST_KEPT)]

    class GivesWay:
        """As a tensor, which gives way to other threads where its memory is freed."""

        def __del__(self):
            for x in alive:
                doubled(x)

    def make_after_another():
        kept(("made twice",), (alive[0],), GivesWay)
        return 7

    assert kept(("made twice",), (alive[0],), make_after_another) == 7
    assert [doubled(x, name="later").item() for x in alive] == [2 * i for i in range(len(alive))]
    assert len(module._made) <= module.MOST_KEPT


def test_eager_calls_of_another_thread_are_not_mine(eager):
    seen = []
    thread = threading.Thread(target=lambda: seen.append(bool(library.eager_call)))
    thread.start()
    thread.join()
    assert seen == [False]


def _in_the_child(x, queue):
    with library.eager_call:
        inherited = doubled(x)
        x.add_(1)
        queue.put((inherited.tolist(), doubled(x).tolist()))


def test_a_fork_inherits_it(eager):
    x = torch.arange(3)
    first = doubled(x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_the_child, args=(x, queue))
    child.start()
    assert queue.get(timeout=30) == ([0, 2, 4], [2, 4, 6])
    child.join()
    assert child.exitcode == 0 and doubled(x) is first
