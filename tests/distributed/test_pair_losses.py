"""Losses over pairs on gloo, an encoder in front: one process's values and parameter gradients, and the bytes sent for them."""

import os
from itertools import product

import pytest
import torch
import torch.distributed as dist
import vlkernels as vk
from torch import nn

from vlkernels.ops.sigmoid_loss import torch_kernels as sigmoid_kernels
from vlkernels.ops.triplet_loss import torch_kernels as triplet_kernels

COUNTS = {2: ((5, 5), (9, 2)), 3: ((4, 4, 4), (6, 0, 5))}
WIDTH = 6
LOSSES = {
    "sigmoid": lambda images, texts, scale, bias, labels, **o: vk.sigmoid_loss(images, texts, scale, logit_bias=bias, **o),
    "sigmoid_labels": lambda images, texts, scale, bias, labels, **o: vk.sigmoid_loss(
        images, texts, scale, logit_bias=bias, labels=labels, **o
    ),
    "hardest": lambda images, texts, scale, bias, labels, **o: vk.triplet_loss(images, texts, **o),
    "hardest_labels": lambda images, texts, scale, bias, labels, **o: vk.triplet_loss(images, texts, labels=labels, **o),
    "summed_labels": lambda images, texts, scale, bias, labels, **o: vk.triplet_loss(
        images, texts, labels=labels, hardest=False, **o
    ),
}
# Bytes of a number; of every row's and column's hardest negative, its similarity and its place; of a number and every count.
STATISTICS = {"sigmoid": lambda total: 8, "hardest": lambda total: 2 * total * 16, "summed": lambda total: 8 + 8 * total}
REDUCTIONS, IMPLEMENTATIONS = ("mean", "sum"), ("torch", "reference")
WAYS = {"gather": {"impl": "torch"}, "ring": {"impl": "torch", "exchange": "ring"}, "reference": {"impl": "reference"}}
SCENARIOS = list(product(LOSSES, REDUCTIONS, WAYS))


class Towers(nn.Module):
    """Encoders in front of the loss: their gradients must come out right, not those of the features."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.image, self.text = (
            nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)) for _ in range(2)
        )
        self.scale = nn.Parameter(torch.tensor([1.5], dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def forward(self, images, texts):
        features = (nn.functional.normalize(x @ w, dim=1) for x, w in ((images, self.image), (texts, self.text)))
        return *features, self.scale.exp(), self.bias


def data(total):
    generator = torch.Generator().manual_seed(2)
    images, texts = torch.randn(2, total, WIDTH, generator=generator, dtype=torch.float64)
    return images, texts, torch.randint(0, 4, (total,), generator=generator)


def loss_and_gradients(name, batch, **over_ranks):
    towers = Towers()
    loss = LOSSES[name](*towers(*batch[:2]), batch[2], **over_ranks)
    loss.backward()
    return loss.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in towers.parameters()]


class SentBytes:
    """Counts what a rank hands to collectives."""

    def __init__(self):
        self.total = 0
        gather, reduce = dist.all_gather_into_tensor, dist.all_reduce

        def counted_gather(output, tensor, **options):
            self.total += tensor.nbytes
            return gather(output, tensor, **options)

        def counted_reduce(tensor, *arguments, **options):
            self.total += tensor.nbytes
            return reduce(tensor, *arguments, **options)

        dist.all_gather_into_tensor, dist.all_reduce = counted_gather, counted_reduce

    def of(self, call, *arguments, **options):
        before = self.total
        return call(*arguments, **options), self.total - before


def worker(rank, world, folder):
    torch.set_num_threads(1)
    sigmoid_kernels.TILE = triplet_kernels.TILE = 4
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    group, sent = dist.new_group(), SentBytes()
    results = {"losses": {}, "gradients": {}, "bytes": {}}
    for counts in COUNTS[world]:
        start = sum(counts[:rank])
        batch = [tensor[start : start + counts[rank]] for tensor in data(sum(counts))]
        known = None if len(set(counts)) == 1 else counts
        for scenario in SCENARIOS:
            name, reduction, way = scenario
            over_ranks = {"group": group, "rank_counts": known, "rank_reduction": reduction, **WAYS[way]}
            (loss, gradients), nbytes = sent.of(loss_and_gradients, name, batch, **over_ranks)
            for gradient in gradients:
                dist.all_reduce(gradient)
                gradient /= world if reduction == "mean" else 1
            key = str((counts, *scenario))
            results["losses"][key], results["gradients"][key], results["bytes"][key] = loss, gradients, nbytes
    calls = list(product(LOSSES, IMPLEMENTATIONS))
    results["uneven"] = [error(name, 2 + rank, group=group, impl=impl) for name, impl in calls]
    results["empty"] = [error(name, 0, group=group, impl=impl) for name, impl in calls]
    nothing = [0] * world
    results["empty"] += [error(name, 0, group=group, impl=impl, rank_counts=nothing) for name, impl in calls]
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # a gloo thread that still holds a tensor would abort the shutdown


def error(name, count, **over_ranks):
    features, labels = torch.randn(count, 3), torch.arange(count)
    try:
        LOSSES[name](features, features, 1.0, 0.0, labels, **over_ranks)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module", params=sorted(COUNTS))
def ranks(request, tmp_path_factory):
    """What every rank of a gloo group of this size computed."""
    folder = tmp_path_factory.mktemp(f"world{request.param}")
    torch.multiprocessing.spawn(worker, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(request.param)]


def scenarios(ranks):
    for counts, name in product(COUNTS[len(ranks)], LOSSES):
        expected = loss_and_gradients(name, data(sum(counts)), impl="reference")
        for reduction, way in product(REDUCTIONS, WAYS):
            yield str((counts, name, reduction, way)), *expected


def test_loss_is_that_of_one_process_and_equal_on_every_rank(ranks):
    for key, expected, _ in scenarios(ranks):
        losses = [result["losses"][key] for result in ranks]
        torch.testing.assert_close(losses[0], expected, rtol=1e-12, atol=1e-12)
        assert all(torch.equal(loss, losses[0]) for loss in losses), key


def test_reduced_parameter_gradients_are_those_of_one_process(ranks):
    for key, _, expected in scenarios(ranks):
        assert all(gradient.abs().max() > 1e-3 for gradient in expected[:2])
        for mine, true in zip(ranks[0]["gradients"][key], expected, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12, msg=key)


def test_a_rank_sends_its_features_once(ranks):
    """Features, labels and similarities of partners, padded to the longest rank, a count where none is known, and statistics."""
    for counts, name in product(COUNTS[len(ranks)], LOSSES):
        partners = name.startswith(("hardest", "summed"))
        rows = max(counts) * 8 * (2 * WIDTH + name.endswith("labels") + partners)
        count = 8 if len(set(counts)) == 1 else 0
        statistics = STATISTICS[name.removesuffix("_labels")](sum(counts))
        for result, reduction in product(ranks, REDUCTIONS):
            sent = result["bytes"][str((counts, name, reduction, "gather"))]
            assert sent == rows + count + statistics, (counts, name)
            print(f"{name} on {counts} ranks: {sent} bytes sent by each")


def test_unequal_ranks_without_counts_are_told(ranks):
    sizes = [2 + rank for rank in range(len(ranks))]
    for result in ranks:
        assert set(result["uneven"]) == {f"ranks hold {sizes} rows: pass rank_counts when they differ"}


def test_a_batch_without_a_pair_is_refused_on_every_rank(ranks):
    for result in ranks:
        assert set(result["empty"]) == {"a batch must hold at least one pair, got N = 0 on every rank"}
