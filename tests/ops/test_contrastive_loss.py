"""What is special to the contrastive loss: tiles, ALBEF's targets, memory, who serves, errors."""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
import vlkernels as vk
from torch.utils._python_dispatch import TorchDispatchMode

from vlkernels.core import dispatch
from vlkernels.core.spec import InputMaker, Peer
from vlkernels.ops.contrastive_loss import peers, torch_kernels
from vlkernels.ops.contrastive_loss.spec import SPECS
from vlkernels.testing import contract

OPTIONS = {
    "plain": {},
    "labels": {"labels": (0, 5), "label_smoothing": 0.1},
    "keys": {"queue": 21},
    "distilled": {"queue": 0, "distillation": 0.3, "label_smoothing": 0.1},
    "distilled_labels": {"queue": 21, "labels": (0, 6), "distillation": 0.6},
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that little inputs have many, some kept for the gradients and some computed again."""
    monkeypatch.setattr(torch_kernels, "TILE", 8)
    monkeypatch.setattr(torch_kernels, "KEPT_TILES", 5)


def inputs(option, pairs=37, width=6, dtype=torch.float64):
    fill = InputMaker(dtype)
    chosen = dict(OPTIONS[option])
    arguments = {
        "image_features": fill.normal(pairs, width),
        "text_features": fill.normal(pairs, width),
        "logit_scale": torch.tensor([2.5], dtype=dtype, requires_grad=True),
    }
    keys = pairs
    if "queue" in chosen:
        keys += chosen.pop("queue")
        arguments |= {name: fill.normal(keys, width, grad=False) for name in ("image_keys", "text_keys")}
    if "labels" in chosen:
        arguments["labels"] = fill.integers(*chosen.pop("labels"), (keys,))
    return arguments | chosen


def value_and_gradients(arguments, impl):
    tensors = [arguments[name] for name in ("image_features", "text_features", "logit_scale")]
    loss = vk.contrastive_loss(**arguments, impl=impl)
    return loss.detach(), *torch.autograd.grad(loss * 3, tensors)


@pytest.mark.parametrize("option", OPTIONS)
def test_many_tiles_give_what_the_whole_matrix_gives(option, small_tiles):
    mine = value_and_gradients(inputs(option), "torch")
    for tensor, true in zip(mine, value_and_gradients(inputs(option), "reference"), strict=True):
        torch.testing.assert_close(tensor, true, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", ("pairs", "peaked", "aligned", "smoothed", "duplicates", "momentum_queue", "distilled"))
def test_many_tiles_obey_the_error_rule(name, dtype, small_tiles):
    contract.verify(SPECS[0], next(case for case in SPECS[0].cases if case.name == name), dtype, "torch")


def test_one_exponential_serves_rows_and_columns_unless_a_tile_is_too_wide():
    logits = torch.randn(40, 30, dtype=torch.float64)
    for spread, shared in ((1.0, True), (12.0, True), (100.0, False)):
        tile = spread * logits
        found = torch_kernels.softmax_of_tile(tile, torch.empty_like(tile))
        assert (found is not None) == shared
        if found is not None:
            for dim, largest, total in ((1, found.largest, found.total), (0, found.column_largest, found.column_total)):
                torch.testing.assert_close(largest + total.log(), tile.logsumexp(dim), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.shares * found.weight[:, None], (tile - tile.max()).exp(), rtol=1e-10, atol=0)


def test_wide_and_narrow_tiles_of_one_call_agree_with_the_whole_matrix(small_tiles, monkeypatch):
    arguments = inputs("plain")
    kinds, share = [], torch_kernels.softmax_of_tile
    monkeypatch.setattr(torch_kernels, "WIDEST", 12.0)
    monkeypatch.setattr(torch_kernels, "softmax_of_tile", lambda *a: (kinds.append(type(made := share(*a))), made)[1])
    mine = value_and_gradients(arguments, "torch")
    assert len(set(kinds)) == 2
    for tensor, true in zip(mine, value_and_gradients(arguments, "reference"), strict=True):
        torch.testing.assert_close(tensor, true, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("option", OPTIONS)
def test_value_without_gradients_is_the_same(option, small_tiles):
    arguments = inputs(option)
    with torch.no_grad():
        alone = vk.contrastive_loss(**arguments, impl="torch")
    torch.testing.assert_close(alone, value_and_gradients(arguments, "torch")[0], rtol=1e-14, atol=0)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("option", OPTIONS)
def test_no_tensor_is_larger_than_the_features(option, small_tiles):
    arguments = inputs(option, pairs=150)
    scale, *rest = (
        arguments.pop(name, None) for name in ("logit_scale", "image_keys", "text_keys", "labels")
    )
    options = (
        arguments.pop("distillation", 0.0),
        arguments.pop("label_smoothing", 0.0),
        "",
        None,
        "mean",
        "gather",
        True,
    )
    with LargestTensor() as largest, torch.no_grad():
        torch_kernels.contrastive_loss(
            arguments["image_features"], arguments["text_features"], scale, *rest, *options
        )
    assert largest.numel <= (150 + 21) * 6


def test_distillation_is_albef_s():
    pairs, queue, share = 9, 14, 0.4
    fill = InputMaker(torch.float64)
    image, text = F.normalize(fill.normal(pairs, 8), dim=1), F.normalize(fill.normal(pairs, 8), dim=1)
    image_keys, text_keys = (F.normalize(fill.normal(pairs + queue, 8, grad=False), dim=1) for _ in range(2))
    temperature = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        one_hot = torch.zeros(pairs, pairs + queue, dtype=torch.float64).fill_diagonal_(1)
        image_goal = (
            share * F.softmax(image_keys[:pairs] @ text_keys.T / temperature, dim=1) + (1 - share) * one_hot
        )
        text_goal = (
            share * F.softmax(text_keys[:pairs] @ image_keys.T / temperature, dim=1) + (1 - share) * one_hot
        )
    of_images = -torch.sum(F.log_softmax(image @ text_keys.T / temperature, dim=1) * image_goal, dim=1).mean()
    of_texts = -torch.sum(F.log_softmax(text @ image_keys.T / temperature, dim=1) * text_goal, dim=1).mean()
    true = (of_images + of_texts) / 2
    for impl in ("torch", "reference"):
        loss = vk.contrastive_loss(
            image,
            text,
            1 / temperature,
            image_keys=image_keys,
            text_keys=text_keys,
            distillation=share,
            impl=impl,
        )
        torch.testing.assert_close(loss, true, rtol=1e-12, atol=0)
        mine = torch.autograd.grad(loss, (image, text, temperature), retain_graph=True)
        for gradient, expected in zip(
            mine, torch.autograd.grad(true, (image, text, temperature), retain_graph=True)
        ):
            torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_keys_get_no_gradient(impl):
    arguments = inputs("keys")
    keys = arguments["image_keys"].requires_grad_(), arguments["text_keys"].requires_grad_()
    vk.contrastive_loss(**arguments, impl=impl).backward()
    assert keys[0].grad is None and keys[1].grad is None


def test_float16_gradients_survive_until_the_loss_scale():
    images, texts = torch.randn(2, 600, 64)
    spread = [(0.01 * x).half().requires_grad_() for x in (images, texts)]
    (vk.contrastive_loss(*spread, 1.0, impl="torch") * 2.0**16).backward()
    exact = [x.detach().double().requires_grad_() for x in spread]
    (vk.contrastive_loss(*exact, 1.0, impl="reference") * 2.0**16).backward()
    for mine, true in zip(spread, exact):
        assert (mine.grad.double() - true.grad).abs().max() < 2e-3 * true.grad.abs().max()


def test_auto_takes_tiles_for_many_logits_and_the_matrix_for_few():
    for pairs, expected in ((128, "reference"), (1500, "torch")):
        features = torch.randn(pairs, 2)
        with dispatch.recorded() as served:
            vk.contrastive_loss(features, features, 1.0)
        assert served == [("contrastive_loss", expected)]


def test_one_graph_serves_every_number_of_pairs():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda *a: vk.contrastive_loss(*a, impl="torch"), fullgraph=True, backend=backend
    )
    for pairs in (5, 9, 13, 30):
        image, text = torch.randn(2, pairs, 4)
        torch.testing.assert_close(compiled(image, text, 3.0), vk.contrastive_loss(image, text, 3.0))
    assert len(graphs) <= 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_features": torch.zeros(5, 3)}, r"text_features must be \[N, D\] = \[4, 3\], got \[5, 3\]"),
        ({"text_features": torch.zeros(4, 3).half()}, "text_features must be float32, got float16"),
        (
            {"logit_scale": torch.ones(2)},
            r"logit_scale must be a number or have shape \(\) or \(1,\), got \[2\]",
        ),
        ({"image_keys": torch.zeros(6, 3)}, "image_keys and text_keys must be given together"),
        ({"image_keys": torch.zeros(3, 3), "text_keys": torch.zeros(3, 3)}, "at least N = 4 rows, got 3"),
        ({"distillation": 0.5}, "distillation = 0.5 needs image_keys and text_keys"),
        ({"distillation": 1.5}, r"distillation must be in \[0, 1\], got 1.5"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be \[N\] = \[4\], got \[3\]"),
        ({"labels": torch.zeros(4)}, "labels must be one of int64, int32, got float32"),
        ({"rank_counts": (2, 2)}, r"rank_counts must hold one count for each of 1 ranks, got \[2, 2\]"),
        ({"rank_counts": (3,)}, r"rank_counts must be 4 at rank 0, the rows it has, got \[3\]"),
        ({"rank_reduction": "max"}, 'rank_reduction must be "mean" or "sum", got "max"'),
        ({"exchange": "all"}, 'exchange must be "gather" or "ring", got "all"'),
        (
            {"image_features": torch.zeros(0, 3), "text_features": torch.zeros(0, 3)},
            "a batch must hold at least one pair, got N = 0 on one process",
        ),
        (
            {"group": "world"},
            "group must be a torch.distributed process group that holds this rank, got 'world'",
        ),
    ],
)
def test_mistakes_are_one_clear_line(change, message):
    arguments = {"image_features": torch.zeros(4, 3), "text_features": torch.zeros(4, 3), "logit_scale": 1.0}
    with pytest.raises(ValueError, match=message):
        vk.contrastive_loss(**arguments | change)


class Library:
    """Stands for other people's code: ``ClipLoss`` and ``cal_flash_loss`` as they are called."""

    @staticmethod
    def ClipLoss():
        return lambda image_features, text_features, logit_scale: peers.dense(image_features, text_features, logit_scale)

    @staticmethod
    def cal_flash_loss(q, k, scale):
        return F.cross_entropy(scale * q @ k.T, torch.arange(len(q)))


def test_peers_compute_the_same_or_are_not_timed(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, backend, dynamic: compile(call, backend="eager", dynamic=dynamic))
    for name in ("open_clip.loss", "inf_cl"):
        monkeypatch.setitem(sys.modules, name, Library)
    arguments = inputs("plain", pairs=12, width=16, dtype=torch.float32)
    wanted = vk.contrastive_loss(**arguments, impl="torch")
    for peer in peers.ALL.values():
        call = peer.prepare(**arguments)[0] if isinstance(peer, Peer) else functools.partial(peer, **arguments)
        torch.testing.assert_close(call(), wanted, rtol=1e-4, atol=0)
    monkeypatch.setattr(Library, "cal_flash_loss", lambda q, k, scale: (scale * q @ k.T).mean())
    with pytest.raises(ValueError, match="it computes something else"):
        peers.ALL["inf_cl"].prepare(**arguments)


def test_a_peer_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "inf_cl", None)
    with pytest.raises(ImportError, match="inf_cl"):
        peers.ALL["inf_cl"].prepare(**inputs("plain"))
