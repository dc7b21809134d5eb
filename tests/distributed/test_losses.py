"""Losses over ranks against one process on the concatenated batch: values, draws, parameter gradients."""

import os
from itertools import product

import pytest
import torch
import torch.distributed as dist
import vlkernels as vk
from torch import nn

from vlkernels.ops.contrastive_loss import torch_kernels

COUNTS = {2: ((5, 5), (7, 3)), 3: ((4, 4, 4), (6, 0, 5)), 4: ((3, 3, 3, 3), (5, 0, 2, 4))}
WIDTH, QUEUE = 6, 4
OPTIONS = {
    "plain": {},
    "labels": {"labels": True, "label_smoothing": 0.1},
    "keys": {"keys": True},
    "distilled": {"keys": True, "labels": True, "distillation": 0.4, "label_smoothing": 0.1},
}
WAYS = {"gather": {"impl": "torch"}, "ring": {"impl": "torch", "exchange": "ring"}, "reference": {"impl": "reference"}}
SCENARIOS = list(product(OPTIONS, ("mean", "sum"), WAYS))


class Towers(nn.Module):
    """Encoders in front of the loss: their gradients must come out right, not those of the features."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.image = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
        self.text = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor([1.5], dtype=torch.float64))

    def forward(self, batch):
        encoded = batch[0] @ self.image, batch[1] @ self.text
        features = (nn.functional.normalize(x, dim=1) for x in encoded)
        return *features, self.scale.exp()


def data(total):
    generator = torch.Generator().manual_seed(2)
    images, texts, image_keys, text_keys = torch.randn(
        4, total, WIDTH, generator=generator, dtype=torch.float64
    )
    labels = torch.randint(0, 4, (total,), generator=generator)
    return images, texts, image_keys, text_keys, labels


def queue():
    generator = torch.Generator().manual_seed(3)
    images, texts = torch.randn(2, QUEUE, WIDTH, generator=generator, dtype=torch.float64)
    return images, texts, torch.randint(0, 4, (QUEUE,), generator=generator)


def arguments(option, batch):
    """The keyword arguments of an option for these rows of the batch; the queue is the same everywhere."""
    chosen = dict(OPTIONS[option])
    queued_images, queued_texts, queued_labels = queue()
    keys = chosen.pop("keys", False)
    if keys:
        chosen |= {
            "image_keys": torch.cat((batch[2], queued_images)),
            "text_keys": torch.cat((batch[3], queued_texts)),
        }
    if chosen.pop("labels", False):
        chosen["labels"] = torch.cat((batch[4], queued_labels)) if keys else batch[4]
    return chosen


def loss_and_gradients(option, batch, **over_ranks):
    towers = Towers()
    loss = vk.contrastive_loss(*towers(batch), **arguments(option, batch), **over_ranks)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in towers.parameters()]


def negatives(batch, ids, **over_ranks):
    with torch.no_grad():
        features = Towers()(batch)
    return vk.hard_negatives(
        *features, labels=batch[4], rng=vk.Rng(7), stream=2, sample_ids=ids, **over_ranks
    )


def share(counts, rank):
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


def worker(rank, world, folder):
    torch.set_num_threads(1)
    torch_kernels.TILE, torch_kernels.KEPT_TILES = 4, 3
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world
    )
    group = dist.new_group()
    results = {"losses": {}, "gradients": {}, "negatives": {}}
    for counts in COUNTS[world]:
        own = share(counts, rank)
        batch = [tensor[own] for tensor in data(sum(counts))]
        known = None if len(set(counts)) == 1 else counts
        for option, reduction, way in SCENARIOS:
            over_ranks = {"group": group, "rank_counts": known, "rank_reduction": reduction, **WAYS[way]}
            loss, gradients = loss_and_gradients(option, batch, **over_ranks)
            for gradient in gradients:
                dist.all_reduce(gradient)
                gradient /= world if reduction == "mean" else 1
            results["losses"][str((counts, option, reduction, way))] = loss
            results["gradients"][str((counts, option, reduction, way))] = gradients
        for impl in ("torch", "reference"):
            ids = torch.arange(100, 100 + sum(counts))[own]
            results["negatives"][str((counts, impl))] = negatives(
                batch, ids, group=group, rank_counts=known, impl=impl
            )
    results["errors"] = [uneven_error(rank, group, impl) for impl in ("torch", "reference")]
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # a gloo thread that still holds a tensor would abort the shutdown


def uneven_error(rank, group, impl):
    features = torch.randn(2 + rank, 3)
    try:
        vk.contrastive_loss(features, features, 1.0, group=group, impl=impl)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module", params=sorted(COUNTS))
def ranks(request, tmp_path_factory):
    """What every rank of a gloo group of this size computed."""
    folder = tmp_path_factory.mktemp(f"world{request.param}")
    torch.multiprocessing.spawn(worker, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(request.param)]


def test_loss_is_that_of_one_process_and_equal_on_every_rank(ranks):
    for counts, option in product(COUNTS[len(ranks)], OPTIONS):
        expected, _ = loss_and_gradients(option, data(sum(counts)), impl="reference")
        for reduction, way in product(("mean", "sum"), WAYS):
            losses = [result["losses"][str((counts, option, reduction, way))] for result in ranks]
            torch.testing.assert_close(losses[0], expected, rtol=1e-12, atol=1e-12)
            assert all(torch.equal(loss, losses[0]) for loss in losses), (counts, option, reduction, way)


def test_reduced_parameter_gradients_are_those_of_one_process(ranks):
    for counts, option in product(COUNTS[len(ranks)], OPTIONS):
        _, expected = loss_and_gradients(option, data(sum(counts)), impl="reference")
        assert all(gradient.abs().max() > 1e-3 for gradient in expected)
        for reduction, way in product(("mean", "sum"), WAYS):
            gradients = ranks[0]["gradients"][str((counts, option, reduction, way))]
            for mine, true in zip(gradients, expected, strict=True):
                torch.testing.assert_close(
                    mine, true, rtol=1e-10, atol=1e-12, msg=f"{counts} {option} {reduction} {way}"
                )


def test_negatives_do_not_depend_on_the_ranks(ranks):
    for counts in COUNTS[len(ranks)]:
        total = sum(counts)
        expected = negatives(data(total), torch.arange(100, 100 + total), impl="reference")
        for impl in ("torch", "reference"):
            drawn = [result["negatives"][str((counts, impl))] for result in ranks]
            for direction in range(2):
                assert torch.equal(torch.cat([pair[direction] for pair in drawn]), expected[direction])


def test_unequal_ranks_without_counts_are_told(ranks):
    sizes = [2 + rank for rank in range(len(ranks))]
    for result in ranks:
        assert result["errors"] == [f"ranks hold {sizes} rows: pass rank_counts when they differ"] * 2
