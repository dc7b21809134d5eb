"""Late interaction over ranks against one process on all samples: values, parameter gradients, uneven ranks."""

import os
from itertools import product

import pytest
import torch
import torch.distributed as dist
import vlkernels as vk
from torch import nn

from vlkernels.ops.late_interaction_loss import torch_kernels

COUNTS = {2: ((5, 5), (7, 3)), 3: ((4, 4, 4), (6, 0, 5)), 4: ((3, 3, 3, 3), (5, 0, 2, 4))}
WIDTH = 6
OPTIONS = {
    "filip": {"similarity": "mean_max"},
    "filip, smoothed": {"similarity": "mean_max", "label_smoothing": 0.1},
    "blip-2": {"similarity": "max", "label_smoothing": 0.1},
}
WAYS = {"gather": {"impl": "torch"}, "ring": {"impl": "torch", "exchange": "ring"}, "reference": {"impl": "reference"}}
SCENARIOS = list(product(OPTIONS, ("mean", "sum"), WAYS))


class Towers(nn.Module):
    """Encoders in front of the loss: their gradients must come out right, not those of the tokens."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.image = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
        self.text = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor([1.5], dtype=torch.float64))

    def forward(self, images, texts):
        encoded = images @ self.image, texts @ self.text
        return *(nn.functional.normalize(x, dim=1) for x in encoded), self.scale.exp()


def samples(total):
    """Images of 2 to 8 tokens, texts of 1 to 5."""
    generator = torch.Generator().manual_seed(2)
    image_lengths, text_lengths = (
        torch.randint(low, high, (total,), generator=generator).tolist() for low, high in ((2, 9), (1, 6))
    )
    return [
        [torch.randn(length, WIDTH, generator=generator, dtype=torch.float64) for length in lengths]
        for lengths in (image_lengths, text_lengths)
    ]


def packed(parts, spare=0):
    """The tokens of samples and their layout, with some rows of nobody."""
    layout = vk.SegmentLayout([[len(part)] for part in parts], capacity=sum(map(len, parts)) + spare)
    return torch.cat([*parts, torch.ones(spare, WIDTH, dtype=torch.float64)]), layout


def loss_and_gradients(option, own, spare=0, **over_ranks):
    towers = Towers()
    (images, image_layout), (texts, text_layout) = (packed(parts, spare) for parts in own)
    layouts = {"image_layout": image_layout, "text_layout": text_layout}
    loss = vk.late_interaction_loss(*towers(images, texts), **layouts, **OPTIONS[option], **over_ranks)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in towers.parameters()]


def share(parts, counts, rank):
    start = sum(counts[:rank])
    return [side[start : start + counts[rank]] for side in parts]


def worker(rank, world, folder):
    torch.set_num_threads(1)
    torch_kernels.TILE, torch_kernels.KEPT_BYTES = 12, 700
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    group = dist.new_group()
    results = {"losses": {}, "gradients": {}}
    for counts in COUNTS[world]:
        own = share(samples(sum(counts)), counts, rank)
        known = None if len(set(counts)) == 1 else counts
        for option, reduction, way in SCENARIOS:
            over_ranks = {"group": group, "rank_counts": known, "rank_reduction": reduction, **WAYS[way]}
            loss, gradients = loss_and_gradients(option, own, spare=2 * rank, **over_ranks)
            for gradient in gradients:
                dist.all_reduce(gradient)
                gradient /= world if reduction == "mean" else 1
            results["losses"][str((counts, option, reduction, way))] = loss
            results["gradients"][str((counts, option, reduction, way))] = gradients
    results["errors"] = [uneven_error(rank, group, impl) for impl in ("torch", "reference")]
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # a gloo thread that still holds a tensor would abort the shutdown


def uneven_error(rank, group, impl):
    layout = vk.SegmentLayout([[2]] * (2 + rank))
    tokens = torch.randn(layout.num_tokens, 3)
    layouts = {"image_layout": layout, "text_layout": layout}
    try:
        vk.late_interaction_loss(tokens, tokens, 1.0, **layouts, group=group, impl=impl)
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
        expected, _ = loss_and_gradients(option, samples(sum(counts)), impl="reference")
        for reduction, way in product(("mean", "sum"), WAYS):
            losses = [result["losses"][str((counts, option, reduction, way))] for result in ranks]
            torch.testing.assert_close(losses[0], expected, rtol=1e-12, atol=1e-12)
            assert all(torch.equal(loss, losses[0]) for loss in losses), (counts, option, reduction, way)


def test_reduced_parameter_gradients_are_those_of_one_process(ranks):
    for counts, option in product(COUNTS[len(ranks)], OPTIONS):
        _, expected = loss_and_gradients(option, samples(sum(counts)), impl="reference")
        assert all(gradient.abs().max() > 1e-3 for gradient in expected)
        for reduction, way in product(("mean", "sum"), WAYS):
            gradients = ranks[0]["gradients"][str((counts, option, reduction, way))]
            for mine, true in zip(gradients, expected, strict=True):
                torch.testing.assert_close(
                    mine, true, rtol=1e-10, atol=1e-12, msg=f"{counts} {option} {reduction} {way}"
                )


def test_unequal_ranks_without_counts_are_told(ranks):
    sizes = [2 + rank for rank in range(len(ranks))]
    for result in ranks:
        assert result["errors"] == [f"ranks hold {sizes} rows: pass rank_counts when they differ"] * 2
