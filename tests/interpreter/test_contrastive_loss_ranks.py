"""The Triton kernels behind the exchanges of the contrastive loss: gloo ranks give what one process gives."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import vlkernels as vk
from vlkernels.core.spec import InputMaker
from vlkernels.ops.contrastive_loss.spec import _features, _keys

COUNTS = (70, 0, 35)  # one rank has nobody
CALLS = ("pairs", "labels", "keys")


def inputs(call: str) -> dict[str, object]:
    fill, total = InputMaker(torch.float32), sum(COUNTS)
    arguments = _features(fill, total, 16)
    if call == "labels":
        arguments |= {"labels": fill.integers(0, 30, (total,)), "label_smoothing": 0.1}
    if call == "keys":
        arguments |= _keys(fill, total, 9, 16) | {"distillation": 0.3, "labels": fill.integers(0, 30, (total + 9,))}
    return arguments


def value_and_gradients(arguments, **options):
    loss = vk.contrastive_loss(**arguments, **options)
    wanted = [arguments[name] for name in ("image_features", "text_features", "logit_scale")]
    return loss.detach(), *torch.autograd.grad(loss, wanted)


def of_rank(arguments, rank):
    """A rank's own rows, then the queue."""
    start, total = sum(COUNTS[:rank]), sum(COUNTS)
    own = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.dim():
            rows = torch.cat((value[start : start + COUNTS[rank]], value[total:])).detach()
            own[name] = rows.requires_grad_(value.requires_grad)
    return own


def worker(rank, folder):
    from vlkernels.testing import interpreter

    interpreter.install()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", len(COUNTS)), rank=rank, world_size=len(COUNTS))
    found = {}
    for call in CALLS:
        for exchange in ("gather", "ring"):
            own = of_rank(inputs(call), rank)
            options = {"group": dist.group.WORLD, "rank_counts": COUNTS, "rank_reduction": "sum", "exchange": exchange}
            *rest, of_scale = value_and_gradients(own, **options, impl="triton")
            dist.all_reduce(of_scale)
            found[call, exchange] = (*rest, of_scale)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # a gloo thread that still holds a tensor would abort the shutdown


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(worker, args=(str(folder),), nprocs=len(COUNTS))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(len(COUNTS))]


@pytest.mark.parametrize("exchange", ("gather", "ring"))
@pytest.mark.parametrize("call", CALLS)
def test_ranks_give_what_one_process_gives(ranks, call, exchange):
    value, *of_features, of_scale = value_and_gradients(inputs(call), impl="reference")
    found = [rank[call, exchange] for rank in ranks]
    for loss, *_, scale in found:
        torch.testing.assert_close(loss, value, rtol=1e-5, atol=0)
        torch.testing.assert_close(scale, of_scale, rtol=1e-4, atol=1e-6)
    for side, gradient in enumerate(of_features, start=1):
        torch.testing.assert_close(torch.cat([rank[side] for rank in found]), gradient, rtol=1e-4, atol=1e-6)
