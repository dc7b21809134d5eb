"""vk.sigmoid_loss and vk.triplet_loss, impl="triton", interpreted with the tiles of sm_90: the contract and what is special."""

import dataclasses
import hashlib
from itertools import product

import pytest
import torch

import vlkernels as vk
from tests.ops import test_triplet_loss as triplet_tests
from vlkernels.core import dispatch, similarity, triton_runtime
from vlkernels.core.exchange import Block
from vlkernels.core.spec import Case, InputMaker
from vlkernels.ops.sigmoid_loss import spec as sigmoid
from vlkernels.ops.sigmoid_loss import torch_kernels as sigmoid_torch
from vlkernels.ops.sigmoid_loss.gpu import tiles as sigmoid_tiles
from vlkernels.ops.sigmoid_loss.gpu import variants as sigmoid_variants
from vlkernels.ops.triplet_loss import spec as triplet
from vlkernels.ops.triplet_loss import torch_kernels as triplet_torch
from vlkernels.ops.triplet_loss.driver import Hardest
from vlkernels.ops.triplet_loss.gpu import launches as triplet_launches
from vlkernels.ops.triplet_loss.gpu import tiles as triplet_tiles
from vlkernels.ops.triplet_loss.gpu import variants as triplet_variants
from vlkernels.testing import contract

# Programs take turns: two runs prove nothing.
SIGMOID, TRIPLET = (dataclasses.replace(spec, deterministic=False) for spec in (*sigmoid.SPECS, *triplet.SPECS))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [(spec, case) for spec in (SIGMOID, TRIPLET) for case in spec.cases]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec, case", CASES, ids=lambda x: x.name)
def test_contract(spec, case, dtype):
    contract.verify(spec, case, dtype, "triton")


SIZES = (
    (1, 1024, 100.0), (2, 768, 1.0), (63, 512, 100.0), (64, 8, 10.0), (65, 64, 1.0), (257, 256, 100.0),
)  # fmt: skip
CALLS = [(*size, dtype) for size in SIZES for dtype in DTYPES[:2]] + [(1000, 8, 30.0, torch.bfloat16)]


@pytest.mark.parametrize("count, width, scale, dtype", CALLS)
def test_every_size_of_the_sigmoid_loss(count, width, scale, dtype):
    case = Case("size", lambda fill: sigmoid.features(fill, count, width, scale))
    contract.verify(SIGMOID, case, dtype, "triton")


@pytest.mark.parametrize("hardest", (True, False))
@pytest.mark.parametrize("count, width", ((2, 768), (63, 512), (64, 8), (65, 1024), (257, 64)))
def test_every_size_of_the_triplet_loss(count, width, hardest):
    case = Case("size", lambda fill: triplet.features(fill, count, width, hardest=hardest))
    contract.verify(TRIPLET, case, torch.bfloat16, "triton")


@pytest.fixture
def small_waves(monkeypatch):
    """Waves of few tiles, several of them in either direction."""
    monkeypatch.setattr(similarity, "WAVE_ROWS", 128)
    monkeypatch.setattr(similarity, "WHOLE_TILES", 64)
    monkeypatch.setattr(similarity, "WORKSPACE_BYTES", 128 * 128 * 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("labelled", (False, True))
def test_many_waves(small_waves, labelled, dtype):
    labels = {"labels": torch.arange(300) % 70} if labelled else {}
    contract.verify(SIGMOID, Case("waves", lambda fill: sigmoid.features(fill, 300, 24) | labels), dtype, "triton")
    summed = Case("waves", lambda fill: triplet.features(fill, 300, 24, hardest=False) | labels)
    contract.verify(TRIPLET, summed, dtype, "triton")


def test_many_bands_of_tiles(monkeypatch):
    monkeypatch.setattr(triplet_launches, "BAND", 2)
    case = Case("bands", lambda fill: triplet.features(fill, 300, 24))
    contract.verify(TRIPLET, case, torch.bfloat16, "triton")


def test_the_first_of_equally_hard_negatives_takes_the_gradient():
    arguments = triplet_tests.tied(count=150)
    single = {name: t.detach().float().requires_grad_() for name, t in arguments.items() if name != "margin"}
    mine, true = (
        triplet_tests.value_and_gradients(tensors | {"margin": 0.1875}, impl=impl)
        for tensors, impl in ((single, "triton"), (arguments, "reference"))
    )
    assert all(torch.equal(found.double(), exact) for found, exact in zip(mine, true, strict=True))


def test_ranks_are_in_the_order_of_similarities_and_the_first_of_equals_is_the_largest():
    values = torch.tensor([-torch.inf, -3e38, -2.0, -1e-40, 0.0, 1e-40, 1.0, 1.5, 3e38, torch.inf])
    places = torch.tensor([5, 2**31 - 1, 0, 3, 1, 4, 2, 0, 7, 6])
    ranks = triplet_tiles.ranked(values, places)
    assert torch.equal(ranks, ranks.sort().values)
    assert all(torch.equal(*pair) for pair in zip(triplet_tiles.unranked(ranks), (values, places)))
    assert (triplet_tiles.ranked(values, places - 1)[2:] > ranks[2:])[places[2:] > 0].all()


BLOCKS = ((0, 70), (70, 211), (211, 300))


@pytest.mark.parametrize("labelled", (False, True))
def test_blocks_of_other_ranks_anywhere(labelled):
    """What ranks meet: blocks whose partners lie inside, outside and partly; what is not wanted is not written."""
    total, width = 300, 16
    x, y = torch.randn(total, width), torch.randn(total, width)
    labels = torch.randint(0, 40, (total,)) if labelled else None
    blocks = [[Block(side[a:b], a) for a, b in BLOCKS] for side in (x, y)]
    meetings = [(i, j) for i in blocks[0] for j in reversed(blocks[1])]
    least, found = (x * y).sum(1) - 0.2, []
    for sigmoid_made, triplet_made in ((sigmoid_torch, triplet_torch), (sigmoid_tiles, triplet_tiles)):
        logits = sigmoid_made.Tiles(torch.tensor(3.0), torch.tensor(-1.0), labels)
        similarities = triplet_made.Tiles(labels, least)
        toward, pushed, summed = torch.zeros(3, 2, total, width)
        sums, value, pushes = torch.zeros(3), torch.zeros(()), torch.zeros(total)
        of_images, of_texts = Hardest(least), Hardest(least)
        for i, j in meetings:
            similarities.hardest(i, j, of_images, of_texts)
        for side in (of_images, of_texts):
            side.push = (side.similarity > least).float()
        for i, j in meetings:
            alone = i.start > j.start  # another rank counts these, and forms the gradients of these images
            logits.meet(i, j, None if alone else sums, None if alone else toward[0][i.span], toward[1][j.span])
            similarities.push_hardest(i, j, of_images, of_texts, pushed[0][i.span], None if alone else pushed[1][j.span])
            counted = (None, None) if alone else (value, pushes)
            similarities.summed(i, j, least, *counted, summed[0][i.span], None if alone else summed[1][j.span])
        hardest = [getattr(side, name) for side in (of_images, of_texts) for name in ("similarity", "place")]
        found.append([*toward, *pushed, *summed, sums, value, pushes, *hardest])
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=2e-5, atol=2e-5)


def test_gradients_of_scale_and_bias_come_from_the_tile():
    """Within 1e-4 of the sum of |G S| / scale, though the features are bfloat16."""
    half, exact = (sigmoid.features(InputMaker(dtype), 200, 64) for dtype in (torch.bfloat16, torch.float64))
    loss = vk.sigmoid_loss(**half, impl="triton")
    mine = torch.autograd.grad(loss, [half["logit_scale"], half["logit_bias"]])
    products = (exact["image_features"] @ exact["text_features"].T).detach()
    signs = 2 * torch.eye(200, dtype=torch.float64) - 1
    derivatives = -signs * torch.sigmoid(-signs * (10 * products - 10)) / 200
    for gradient, terms in zip(mine, (derivatives * products, derivatives), strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - terms.sum()).abs() <= 1e-6 * terms.abs().sum()


def test_losses_near_zero_keep_their_digits_and_large_ones_stay_finite():
    ones = torch.ones(70, 4, requires_grad=True)
    labels = torch.arange(70)
    for bias in (-1e30, -80.0, -20.0, -5.0, 0.0, 3.0, 100.0, 1e30):
        numbers = [torch.tensor(number, requires_grad=True) for number in (1e-3, bias)]
        loss, true = (
            vk.sigmoid_loss(x, x.detach(), *numbers[:1], logit_bias=numbers[1], labels=labels, impl=impl)
            for x, impl in ((ones, "triton"), (ones.double(), "reference"))
        )
        torch.testing.assert_close(loss.double(), true.double(), rtol=1e-6, atol=0)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, [ones, *numbers]))


LOSSES = (vk.sigmoid_loss, vk.triplet_loss)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_what_the_kernels_do_not_serve_is_refused_with_the_reason(loss):
    options = {"logit_scale": 2.0} if loss is vk.sigmoid_loss else {}
    features = torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match='cannot run with impl="triton": it computes in float32, the inputs are float64'):
        loss(*features.double(), **options, impl="triton")
    with pytest.raises(ValueError, match="at least one pair, got N = 0"):
        loss(*features[:, :0], **options, impl="triton")
    with dispatch.recorded() as served:
        loss(*features, **options)
    assert served[0][1] != "triton", "auto never interprets"


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_features_whose_rows_lie_apart(loss):
    options = {"logit_scale": 2.0} if loss is vk.sigmoid_loss else {"hardest": False}
    wide = torch.randn(2, 70, 40, dtype=torch.float64)
    for x, y in (wide[..., :24], wide[..., :24].transpose(1, 2)):
        torch.testing.assert_close(loss(x.float(), y.float(), **options, impl="triton").double(), loss(x, y, **options))


def digest(launches):
    """A hash of what is launched: kernels, grids, constants, warps and stages."""
    said = [(x.kernel.fn.__name__, x.grid, sorted(x.constants.items()), x.warps, x.stages) for x in launches]
    return hashlib.sha256(repr(said).encode()).hexdigest()


@pytest.mark.parametrize("dtype, labelled", tuple(product(DTYPES, (False, True))))
def test_launches_and_grids_are_those_of_sm_90(monkeypatch, dtype, labelled):
    launched = []
    monkeypatch.setattr(triton_runtime.Launch, "run", lambda launch: launched.append(launch))
    features = torch.randn(2, 300, 64, dtype=dtype).unbind()
    labels = torch.arange(300) if labelled else None
    images = features[0].requires_grad_()
    vk.sigmoid_loss(*features, 2.0, labels=labels, impl="triton")
    assert digest(launched) == digest([sigmoid_variants.pairs_launch(dtype, 64, labelled, True, 90)])
    vk.triplet_loss(images.detach(), features[1], labels=labels, impl="triton")
    vk.triplet_loss(*features, hardest=False, labels=labels, impl="triton")
    assert digest(launched[1:]) == digest(triplet_variants.call_launches(dtype, 64, labelled, 90).values())
