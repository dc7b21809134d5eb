"""The contrastive loss in Triton, interpreted with the tiles of sm_90: the contract at every size, waves, launches."""

import dataclasses
import hashlib

import pytest
import torch

import vlkernels as vk
from vlkernels.core import dispatch, similarity, triton_runtime
from vlkernels.core.exchange import Block
from vlkernels.core.spec import Case, InputMaker
from vlkernels.ops.contrastive_loss import torch_kernels
from vlkernels.ops.contrastive_loss.driver import Statistics, Targets
from vlkernels.ops.contrastive_loss.gpu import launches, tiles, variants
from vlkernels.ops.contrastive_loss.spec import SPECS, _features, _keys
from vlkernels.testing import contract

(SPEC,) = SPECS
ONCE = dataclasses.replace(SPEC, deterministic=False)
CASES = {case.name: case for case in SPEC.cases}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_contract(name, dtype):
    contract.verify(SPEC, CASES[name], dtype, "triton")


SIZES = (
    (1, 1024, 100.0), (2, 768, 1.0), (63, 512, 100.0), (64, 8, 30.0), (65, 64, 1.0), (65, 1024, 10.0), (257, 256, 100.0),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("pairs, width, scale", SIZES)
def test_sizes(pairs, width, scale, dtype):
    contract.verify(ONCE, Case("size", lambda fill: _features(fill, pairs, width, scale)), dtype, "triton")


def test_a_thousand_pairs():
    contract.verify(ONCE, Case("a thousand", lambda fill: _features(fill, 1000, 64, 50.0)), torch.bfloat16, "triton")


def _extreme(fill: InputMaker, sign: float = 1.0, **options):
    """Logits of some hundreds, of either sign: no exponential of them is finite."""
    images, texts = (fill.normal(70, 16, grad=False).abs() + 1 for _ in range(2))
    return {
        "image_features": images.requires_grad_(),
        "text_features": (sign * texts).requires_grad_(),
        "logit_scale": fill.normal(scale=0.0, grad=False).add(30.0).requires_grad_(),
    } | options


def _twins(fill: InputMaker):
    """Every pair four times, told apart by nothing but their labels."""
    arguments = _features(fill, 20, 24, 100.0)
    twins = {name: arguments[name].detach().repeat(4, 1).requires_grad_() for name in ("image_features", "text_features")}
    return arguments | twins | {"labels": torch.arange(20, device=fill.device).repeat(4)}


ODD = (
    Case("large logits", _extreme),
    Case("large negative logits", lambda fill: _extreme(fill, -1.0)),
    Case("large negative logits, smoothed", lambda fill: _extreme(fill, -1.0, label_smoothing=0.1)),
    Case("twins", _twins),
    Case("twins, no labels", lambda fill: {k: v for k, v in _twins(fill).items() if k != "labels"}),
    Case("negative scale", lambda fill: _features(fill, 33, 16, -7.0)),
    Case("scale 0", lambda fill: _features(fill, 33, 16, 0.0)),
    Case("scale 0 with keys", lambda fill: _features(fill, 33, 16, 0.0) | _keys(fill, 33, 9, 16)),
    Case("long queue", lambda fill: _features(fill, 9, 16) | _keys(fill, 9, 700, 16)),
)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("case", ODD, ids=lambda case: case.name)
def test_odd_inputs(case, dtype):
    contract.verify(ONCE, case, dtype, "triton")


@pytest.fixture
def small_waves(monkeypatch):
    """Waves of a few tiles, several splits and strips of several tiles each, and several visits."""
    monkeypatch.setattr(tiles, "VISIT", 320)
    monkeypatch.setattr(similarity, "WAVE_ROWS", 256)
    monkeypatch.setattr(similarity, "WHOLE_TILES", 128)
    monkeypatch.setattr(similarity, "WORKSPACE_BYTES", 256 * 256 * 4)
    monkeypatch.setattr(launches, "MOST_SPLITS", 2)
    monkeypatch.setattr(launches, "PROGRAMS", 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("labelled", (False, True))
def test_many_waves_splits_and_strips(small_waves, labelled, dtype):
    def make(fill):
        labels = {"labels": fill.integers(0, 60, (450,)), "label_smoothing": 0.05} if labelled else {}
        return _features(fill, 450, 24, 30.0) | labels

    contract.verify(SPEC if dtype == torch.bfloat16 else ONCE, Case("waves", make), dtype, "triton")


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_many_waves_of_keys(small_waves, dtype):
    def make(fill):
        options = {"labels": fill.integers(0, 50, (600,)), "distillation": 0.4, "logit_scale": 10.0}
        return _features(fill, 200, 24) | _keys(fill, 200, 400, 24) | options

    contract.verify(ONCE, Case("waves of keys", make), dtype, "triton")


@pytest.mark.parametrize("labelled", (False, True))
def test_blocks_of_other_ranks_anywhere(labelled):
    """What ranks meet: blocks whose partners lie inside, outside and partly, rows that are nobody's partner."""
    total, width = 300, 16
    x, y = torch.randn(total, width), torch.randn(total, width)
    scale = torch.tensor(3.0)
    targets = Targets(torch.randint(0, 40, (total,)) if labelled else None, scale)
    blocks = [[Block(side[a:b], a) for a, b in ((0, 70), (70, 211), (211, 300))] for side in (x, y)]
    found = []
    for make in (torch_kernels.Tiles, tiles.Tiles):
        device = make(scale, targets, True)
        of_images, of_texts, toward = Statistics(total, scale), Statistics(total, scale), torch.zeros(2, total, width)
        meetings = [(i, j) for i in blocks[0] for j in reversed(blocks[1])]
        for i, j in meetings:
            device.statistics(i, j, of_images, of_texts)
        for i, j in meetings:
            device.differentiate(i, j, of_images, of_texts, 0.9, toward[0][i.span], toward[1][j.span])
        seen = [getattr(of, name) for of in (of_images, of_texts) for name in ("largest", "total", "positive")]
        aligned = (x * toward[0]).sum() if device.alignment is None else device.alignment
        found.append([*seen, *toward, aligned])
    for mine, wanted in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("keys", (False, True))
def test_gradient_of_the_scale_in_bfloat16(keys):
    """It comes of the tile in float32 and not of gradients that were rounded: 1e-4 of the sum of |G S| / scale."""
    fill = InputMaker(torch.bfloat16)
    arguments = _features(fill, 200, 64, 20.0) | (_keys(fill, 200, 100, 64) if keys else {})
    scale = arguments["logit_scale"] = torch.tensor(20.0, requires_grad=True)
    (found,) = torch.autograd.grad(vk.contrastive_loss(**arguments, impl="triton"), scale)
    exact = {k: v.detach().double() for k, v in arguments.items()}
    sides = [exact[name] for name in ("image_features", "text_features")]
    opposite = [exact["text_keys"], exact["image_keys"]] if keys else sides[::-1]
    true = size = 0.0
    for queries, others in zip(sides, opposite):
        similarities = queries @ others.T
        weights = (20.0 * similarities).softmax(1) - torch.eye(*similarities.shape)
        true, size = true + (weights * similarities).sum() / 400, size + (weights * similarities).abs().sum() / 400
    assert abs(found - true) <= 1e-4 * size


@pytest.mark.parametrize("dtype, message", ((torch.float64, "it computes in float32, the inputs are float64"),))
def test_what_the_kernels_do_not_serve_is_refused_with_the_reason(dtype, message):
    features = torch.randn(2, 4, 8, dtype=dtype)
    with pytest.raises(ValueError, match=f'cannot run with impl="triton": {message}'):
        vk.contrastive_loss(*features, 10.0, impl="triton")
    with dispatch.recorded() as served:
        vk.contrastive_loss(*features, 10.0)
        vk.contrastive_loss(*features.float(), 10.0)
    assert "triton" not in {name for _, name in served}, "auto never interprets"


def test_a_batch_without_a_pair_is_refused():
    with pytest.raises(ValueError, match="N = 0"):
        vk.contrastive_loss(torch.randn(0, 8), torch.randn(0, 8), 10.0, impl="triton")


def digest(launched):
    """A hash of what is launched: kernels, grids, constants, warps and stages."""
    said = [(x.kernel.fn.__name__, x.grid, sorted(x.constants.items()), x.warps, x.stages) for x in launched]
    return hashlib.sha256(repr(said).encode()).hexdigest()


CALLS = ((torch.float32, 24, False), (torch.bfloat16, 64, True), (torch.float16, 8, False))


@pytest.mark.parametrize("dtype, width, labelled", CALLS)
def test_launches_and_grids_are_those_of_sm_90(monkeypatch, dtype, width, labelled):
    launched, run = [], triton_runtime.Launch.run
    monkeypatch.setattr(triton_runtime.Launch, "run", lambda launch: (launched.append(launch), run(launch)))
    features = torch.randn(2, 300, width, dtype=dtype, requires_grad=True)
    labels = torch.arange(300) if labelled else None
    vk.contrastive_loss(*features, 10.0, labels=labels, impl="triton").backward()
    assert digest(launched) == digest(variants.call_launches(dtype, width, labelled, False, 90).values())
