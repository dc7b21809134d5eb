"""Several ranks on their shares of a batch against one process on all of it: losses and every parameter's
gradient."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import vlkernels as vk
from random_batch import THREE, random_batch, small_model

from engine.models.exchange import gather_tokens
from engine.models.transformer import Tokens
from engine.objectives import Objectives, PretrainingModule
from engine.objectives.matching import Matching
from tests.gloo_ranks import run_ranks

PAIRS = 6


def module(objectives: Objectives) -> PretrainingModule:
    return PretrainingModule(small_model(dropout=0.2), objectives.active)


def share_of_step(rank: int, world: int, negatives: str = "global"):
    """Losses and gradients of one rank, the gradients averaged over the ranks as DDP and ZeRO do."""
    share = PAIRS // world
    batch = random_batch(range(rank * share, (rank + 1) * share))
    counts = torch.tensor(list(batch.counts.values()))
    dist.all_reduce(counts)
    batch.normalizers = dict(zip(batch.counts, world / counts, strict=True))
    trained = module(dataclasses.replace(THREE, matching=Matching(negatives=negatives)))
    total, losses, _ = trained(batch)
    total.backward()
    gradients = {name: parameter.grad for name, parameter in trained.named_parameters()}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= world
    means = {name: loss.detach().clone() for name, loss in losses.items()}
    for value in means.values():
        dist.all_reduce(value)
        value /= world
    return means, gradients


def gathered_stream(rank: int):
    lengths = [[[3, 2], [0, 4]], [[1, 0], [0, 0]]][rank]
    layout = vk.SegmentLayout(lengths, sample_ids=[2 * rank, 2 * rank + 1])
    rows = torch.arange(layout.num_tokens * 3.0).view(-1, 3) + 100 * rank
    rows.requires_grad_()
    gathered = gather_tokens(Tokens(rows, layout), dist.group.WORLD)
    (gathered.hidden * (rank + 1)).sum().backward()
    return gathered.hidden.detach(), gathered.layout.lengths, gathered.layout.sample_ids, rows.grad


def all_of_it(rank: int, world: int):
    return share_of_step(rank, world), share_of_step(rank, world, "local")[0], gathered_stream(rank)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(2, tmp_path_factory.mktemp("two"), all_of_it)


@pytest.fixture(scope="module")
def one_process():
    single = module(THREE)
    total, losses, _ = single(random_batch(range(PAIRS)))
    total.backward()
    return losses, {name: parameter.grad for name, parameter in single.named_parameters()}


def assert_equal(means, gradients, one_process) -> None:
    losses, expected = one_process
    for name, loss in losses.items():
        torch.testing.assert_close(means[name], loss.detach(), rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        error = (gradients[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-4, f"{name}: {error}"


def test_two_ranks_equal_one_process(two_ranks, one_process):
    for (means, gradients), _, _ in two_ranks:
        assert_equal(means, gradients, one_process)


def test_three_ranks_equal_one_process(tmp_path, one_process):
    for means, gradients in run_ranks(3, tmp_path, share_of_step):
        assert_equal(means, gradients, one_process)


def test_local_negatives_are_another_loss(two_ranks, one_process):
    """Were negatives drawn from the own rank only, the tests above would notice."""
    _, means, _ = two_ranks[0]
    assert abs(means["matching"] - one_process[0]["matching"].item()) > 1e-4


def test_ragged_streams_are_gathered_in_rank_order(two_ranks):
    first, second = torch.arange(27.0).view(9, 3), torch.arange(3.0).view(1, 3) + 100
    for _, _, (hidden, lengths, sample_ids, gradient) in two_ranks:
        assert torch.equal(hidden, torch.cat((first, second)))
        assert lengths.tolist() == [[3, 2], [0, 4], [1, 0], [0, 0]] and sample_ids.tolist() == [0, 1, 2, 3]
        assert torch.equal(gradient, torch.full_like(gradient, 3.0)), (
            "1 from the first rank, 2 from the second"
        )
