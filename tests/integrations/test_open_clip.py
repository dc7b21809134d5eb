"""The losses of open_clip: values and gradients of every rank and mode, beside the formula and, where installed, open_clip."""

import inspect
from functools import partial
from itertools import product

import pytest
import stated_open_clip as stated
import torch
import torch.distributed as dist
import torch.nn.functional as F
import vlkernels as vk

from tests.gloo_ranks import run_ranks
from vlkernels.core import dispatch
from vlkernels.integrations.open_clip import EXCHANGES, ClipLoss, SigLipLoss
from vlkernels.ops.contrastive_loss import functional as contrastive
from vlkernels.ops.sigmoid_loss import functional as sigmoid
from vlkernels.testing.error_rule import assert_close

PAIRS, WIDTH = 5, 6
MODES = list(product((False, True), repeat=2))  # local_loss, gather_with_grad
THEIRS = stated.installed()


def features(world, dtype=torch.float64, pairs=PAIRS, width=WIDTH):
    """Images and texts of every rank, a text near its image; the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(world)
    images = torch.randn(world, pairs, width, generator=generator, dtype=torch.float64)
    texts = images + torch.randn(images.shape, generator=generator, dtype=torch.float64)
    return [[f.bfloat16().to(dtype).requires_grad_() for f in side] for side in (images, texts)]


def numbers(world, value, dtype=torch.float64, shape=()):
    """A parameter on every rank."""
    return [torch.full(shape, value, dtype=dtype, requires_grad=True) for _ in range(world)]


def graded(loss, inputs):
    """The loss and its gradients, along a cotangent that is not 1."""
    return [loss.detach(), *torch.autograd.grad(loss, inputs, torch.full_like(loss, 0.7))]


# --- one process --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_one_process(kind, dtype):
    def run(dtype, mine):
        (images,), (texts,) = features(1, dtype, pairs=19, width=32)
        scale, bias = (numbers(1, value, dtype)[0] for value in (3.0, -10.0))
        if mine and kind == "clip":
            loss = ClipLoss()(images, texts, scale, bias)
        elif mine:
            loss = SigLipLoss()(images, texts, scale, bias)
        elif kind == "clip":
            (loss,) = stated.clip_losses([images], [texts], [scale], False, False)
            loss = loss + 0 * bias
        else:
            (loss,) = stated.siglip_losses([images], [texts], [scale], [bias])
        return graded(loss.to(torch.promote_types(dtype, torch.float32)), (images, texts, scale, bias))

    for name, mine, eager, truth in zip("value images texts scale bias".split(), *(
        run(*case) for case in ((dtype, True), (dtype, False), (torch.float64, False))
    )):  # fmt: skip
        assert_close(name, mine, eager, truth)


@pytest.mark.parametrize("negative_only", [False, True])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_pairs_without_partners(negative_only, scale):
    (images,), (texts,) = features(1, pairs=23)
    found = SigLipLoss()._loss(images, texts, scale, -10.0, negative_only=negative_only)
    logits = scale * images @ texts.T - 10
    signs = -torch.ones_like(logits) if negative_only else 2 * torch.eye(23) - 1
    expected = -torch.nn.functional.logsigmoid(signs * logits).sum() / 23
    for mine, true in zip(graded(found, (images, texts)), graded(expected, (images, texts))):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [ClipLoss, SigLipLoss])
@pytest.mark.parametrize("bias", [None, -10.0])
def test_logits_and_ground_truth_give_the_loss(make, bias):
    (images,), (texts,) = features(1)
    parameters = {"logit_scale": torch.tensor(3.0, dtype=torch.float64, requires_grad=True), "logit_bias": bias}
    inputs = images, texts, parameters["logit_scale"]
    found, expected = (graded(f(images, texts, **parameters), inputs) for f in (partial(by_logits, make()), make()))
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


def test_ground_truth_is_theirs():
    assert torch.equal(ClipLoss(local_loss=True, rank=2, world_size=3).get_ground_truth("cpu", 4), torch.arange(8, 12))
    assert torch.equal(ClipLoss(rank=2, world_size=3).get_ground_truth("cpu", 12), torch.arange(12))
    signs = SigLipLoss().get_ground_truth("cpu", torch.bfloat16, 3)
    assert torch.equal(signs, 2 * torch.eye(3, dtype=torch.bfloat16) - 1)
    assert torch.equal(SigLipLoss().get_ground_truth("cpu", torch.float32, 3, negative_only=True), -torch.ones(3, 3))


def test_numbers_vectors_and_no_bias():
    (images,), (texts,) = features(1)
    for loss in (ClipLoss(), SigLipLoss()):
        value = loss(images, texts, 2.0, None)
        assert value.shape == () and loss(images, texts, torch.tensor([2.0]), None) == value
        assert loss(images, texts, 2.0, 0.0, output_dict=True) == {"contrastive_loss": value}
    bias = torch.zeros(1, requires_grad=True)
    assert torch.autograd.grad(ClipLoss()(images, texts, 2.0, bias), bias)[0].tolist() == [0]


# --- constructors -------------------------------------------------------------------------------------------


def test_constructors_and_attributes():
    clip = ClipLoss(True, True, True, 1, 3, False)
    assert [clip.local_loss, clip.gather_with_grad, clip.cache_labels, clip.rank, clip.world_size] == [True, True, True, 1, 3]
    siglip = SigLipLoss(True, 2, 3, None, 128)
    assert [siglip.cache_labels, siglip.rank, siglip.world_size, siglip.dist_impl] == [True, 2, 3, "bidir"]
    assert siglip.chunk_size == 128 and SigLipLoss(dist_impl="shift").dist_impl == "shift"
    assert not [*clip.state_dict(), *siglip.state_dict()]


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_signatures_begin_with_theirs(name):
    """Releases differ: one takes `use_horovod`, another `chunk_size`; what a release has comes in its order."""
    if THEIRS is None:
        known = {
            "ClipLoss": "self local_loss gather_with_grad cache_labels rank world_size",
            "SigLipLoss": "self cache_labels rank world_size dist_impl",
        }
        constructor, call = known[name].split(), "self image_features text_features logit_scale logit_bias output_dict".split()
    else:
        kind = getattr(THEIRS, name)
        constructor, call = (list(inspect.signature(method).parameters) for method in (kind.__init__, kind.forward))
    mine = globals()[name]
    assert list(inspect.signature(mine.__init__).parameters)[: len(constructor)] == constructor
    assert list(inspect.signature(mine.forward).parameters) == call


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ClipLoss(use_horovod=True), "use_horovod must be False: ranks meet through torch.distributed"),
        (lambda: SigLipLoss(dist_impl="ring"), "dist_impl must be one of bidir, shift, reduce, gather, got 'ring'"),
        (lambda: ClipLoss(world_size=2)(*features(2)[0], 1.0), "world_size = 2 needs a process group: call"),
    ],
)
def test_mistakes_are_one_clear_line(make, message, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # whatever ran before in this process
    with pytest.raises(ValueError, match=message):
        make()


# --- ranks --------------------------------------------------------------------------------------------------


def on_this_rank(loss, rank, world, **parameters):
    """Value and gradients of one rank: of its features and of its parameters."""
    images, texts = (side[rank].detach().requires_grad_() for side in features(world))
    inputs = {name: torch.full((1,), value, dtype=torch.float64, requires_grad=True) for name, value in parameters.items()}
    return graded(loss(images, texts, **inputs).reshape(()), (images, texts, *inputs.values()))


def by_logits(loss, images, texts, **parameters):
    """The loss as one takes it who asks for logits and ground truth."""
    logits = loss.get_logits(images, texts, **parameters)
    if isinstance(loss, SigLipLoss):
        signs = loss.get_ground_truth(logits.device, logits.dtype, len(logits))
        return -F.logsigmoid(signs * logits).sum() / len(logits)
    partners = loss.get_ground_truth(images.device, len(logits[0]))
    return sum(F.cross_entropy(side, partners) for side in logits) / 2


def all_cases(module, rank, world):
    place = {"rank": rank, "world_size": world}
    for local, grad in MODES:
        loss = module.ClipLoss(local_loss=local, gather_with_grad=grad, **place)
        yield f"clip {local} {grad}", on_this_rank(loss, rank, world, logit_scale=1.5)
        if module is vk.integrations.open_clip:
            yield f"clip {local} {grad} logits", on_this_rank(partial(by_logits, loss), rank, world, logit_scale=1.5)
    for exchange in EXCHANGES:
        loss = module.SigLipLoss(dist_impl=exchange, **place)
        yield f"siglip {exchange}", on_this_rank(loss, rank, world, logit_scale=1.5, logit_bias=-2.0)


def mistakes(rank, world):
    for pairs, size in ((PAIRS, world + 1), (2 + rank, world)):
        features = torch.ones(pairs, 3)
        try:
            ClipLoss(local_loss=True, rank=rank, world_size=size)(features, features, 1.0)
            yield "no error"
        except ValueError as error:
            yield str(error)


def of_rank(rank, world):
    results = {"reference": dict(all_cases(vk.integrations.open_clip, rank, world))}
    contrastive.FEW_LOGITS = dict.fromkeys(contrastive.FEW_LOGITS, 0)
    sigmoid.FEW_PAIRS = dict.fromkeys(sigmoid.FEW_PAIRS, 0)
    with dispatch.recorded() as served:
        results["torch"] = dict(all_cases(vk.integrations.open_clip, rank, world))
    assert {impl for _, impl in served} == {"torch"}, served
    if THEIRS is not None:
        results["theirs"] = dict(all_cases(THEIRS, rank, world))
    results["mistakes"] = list(mistakes(rank, world))
    return results


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    return run_ranks(request.param, tmp_path_factory.mktemp(f"world{request.param}"), of_rank)


def expected(case, world):
    """Per rank: value, gradients of images, texts and parameters."""
    images, texts = features(world)
    parameters = [numbers(world, 1.5, shape=(1,))]
    kind, *mode = case.split()
    if kind == "clip":
        losses = stated.clip_losses(images, texts, *parameters, *(word == "True" for word in mode[:2]))
    else:
        parameters.append(numbers(world, -2.0, shape=(1,)))
        losses = stated.siglip_losses(images, texts, *parameters)
    sides = [images, texts, *parameters]
    gradients = torch.autograd.grad(0.7 * sum(losses), [tensor for side in sides for tensor in side])
    for rank, loss in enumerate(losses):
        yield [loss.detach(), *(gradients[number * world + rank] for number in range(len(sides)))]


CASES = [f"clip {local} {grad}" for local, grad in MODES] + [f"siglip {exchange}" for exchange in EXCHANGES]
LOGITS = [f"clip {local} {grad} logits" for local, grad in MODES]


@pytest.mark.parametrize("case", CASES + LOGITS)
def test_every_rank_has_the_value_and_the_gradients_of_open_clip(ranks, case):
    for found, wanted in zip(ranks, expected(case, len(ranks)), strict=True):
        for impl in found.keys() - ({"mistakes", "theirs"} if case in LOGITS else {"mistakes"}):
            for part, mine, true in zip("value images texts scale bias".split(), found[impl][case], wanted):
                torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12, msg=f"{impl}: {part}")


def test_modes_differ(ranks):
    """Else the test above would not tell one from another."""
    found = [ranks[1]["reference"][case] for case in CASES[:4]]
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            assert not all(torch.allclose(mine, theirs, rtol=1e-3) for mine, theirs in zip(one, other))


def test_ranks_that_do_not_fit_are_told(ranks):
    world = len(ranks)
    for rank, found in enumerate(ranks):
        first, second = found["mistakes"]
        assert first == (
            f"rank and world_size must be those of the default process group, {rank} of {world}, got {rank} of {world + 1}"
        )
        assert second == f"ranks hold {[2 + rank for rank in range(world)]} rows: pass rank_counts when they differ"
