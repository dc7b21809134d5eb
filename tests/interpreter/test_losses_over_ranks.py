"""Losses in Triton over gloo ranks of uneven size, one of them empty, both exchanges: one process's values and gradients."""

from itertools import product

import pytest
import torch
import torch.distributed as dist

from tests.distributed.loss_cases import Model, Pairs, value_and_gradients
from tests.gloo_ranks import run_ranks
from vlkernels.testing import interpreter

COUNTS = (5, 0, 3)
LOSSES = ("contrastive_labels", "distilled", "sigmoid", "hardest", "summed_labels", "filip", "blip-2")
EXCHANGES = ("gather", "ring")


def of_rank(rank, world):
    interpreter.install()  # in this process too, which pytest did not start
    own = Pairs.drawn(sum(COUNTS), torch.float32).of_rank(COUNTS, rank)
    options = {"group": dist.new_group(), "rank_counts": COUNTS, "rank_reduction": "sum", "impl": "triton"}
    results = {}
    for name, exchange in product(LOSSES, EXCHANGES):
        loss, gradients = value_and_gradients(name, Model(torch.float32), own, exchange=exchange, **options)
        for gradient in gradients:
            dist.all_reduce(gradient)
        results[f"{name} {exchange}"] = loss, gradients
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(len(COUNTS), tmp_path_factory.mktemp("ranks"), of_rank)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", LOSSES)
def test_ranks_in_triton_compute_what_one_process_does(ranks, name, exchange):
    expected, true_gradients = value_and_gradients(name, Model(), Pairs.drawn(sum(COUNTS)), impl="reference")
    losses, gradients = zip(*(result[f"{name} {exchange}"] for result in ranks), strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    torch.testing.assert_close(losses[0].double(), expected, rtol=1e-5, atol=0)
    for mine, true in zip(gradients[0], true_gradients, strict=True):
        assert (mine - true).abs().max() <= 2e-5 * true.abs().max() + 1e-7
