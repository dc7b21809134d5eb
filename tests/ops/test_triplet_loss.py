"""What is special to the triplet loss: tiles, ties, labels, shapes, half types, memory, who serves, errors, faults."""

from functools import partial
from itertools import product

import pytest
import torch
import vlkernels as vk
from torch.utils._python_dispatch import TorchDispatchMode

from tests.mutants import load_mutant
from vlkernels.core import dispatch
from vlkernels.core.spec import Case, InputMaker
from vlkernels.ops.triplet_loss import driver, torch_kernels
from vlkernels.ops.triplet_loss.spec import SPECS, features
from vlkernels.testing import contract

TENSORS = ("image_features", "text_features")
COUNTS, WIDTHS = (1, 2, 63, 64, 65, 257, 1000), (8, 64, 256, 512, 768, 1024)
# Every count and width, each beside several of the others.
SHAPES = [(n, WIDTHS[k % 6]) for k, n in enumerate(2 * COUNTS)]
OPTIONS = [{"hardest": hardest, "labelled": labelled} for hardest, labelled in product((True, False), repeat=2)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that little inputs have many."""
    monkeypatch.setattr(torch_kernels, "TILE", 8)


def inputs(labelled=False, count=37, width=6, dtype=torch.float64, **options):
    fill = InputMaker(dtype)
    arguments = features(fill, count, width, **options)
    return arguments | ({"labels": fill.integers(0, 5, (count,))} if labelled else {})


def tied(count=29, width=3):
    """Features in halves: their similarities are exact, and many are equal."""
    fill = InputMaker(torch.float64)
    drawn = ((fill.integers(-1, 2, (count, width)) / 2).double().requires_grad_() for _ in range(2))
    return dict(zip(TENSORS, drawn)) | {"margin": 0.1875}


def value_and_gradients(arguments, loss_function=vk.triplet_loss, **options):
    loss = loss_function(**arguments, **options)
    return loss.detach(), *torch.autograd.grad(loss * 3, [arguments[name] for name in TENSORS])


@pytest.mark.parametrize("count, width", SHAPES)
@pytest.mark.parametrize("hardest", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_every_shape_obeys_the_error_rule(count, width, hardest, dtype):
    case = Case(f"n{count}_d{width}", lambda fill: features(fill, count, width, hardest=hardest))
    contract.verify(SPECS[0], case, dtype, "torch")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_many_tiles_give_what_the_whole_matrix_gives(options, small_tiles):
    mine = value_and_gradients(inputs(**options), impl="torch")
    for tensor, true in zip(mine, value_and_gradients(inputs(**options), impl="reference"), strict=True):
        torch.testing.assert_close(tensor, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_without_gradients_is_the_same(options, small_tiles):
    arguments = inputs(**options)
    with torch.no_grad():
        alone = vk.triplet_loss(**arguments, impl="torch")
    assert torch.equal(alone, value_and_gradients(arguments, impl="torch")[0])


@pytest.mark.parametrize("hardest", (True, False))
@pytest.mark.parametrize("tile", (4, 1024))
def test_the_first_of_equally_hard_negatives_takes_the_gradient(hardest, tile, monkeypatch):
    monkeypatch.setattr(torch_kernels, "TILE", tile)
    arguments = tied()
    images, texts = (arguments[name].detach() for name in TENSORS)
    expected = [torch.zeros_like(images), torch.zeros_like(texts)]
    similarities = images @ texts.T
    ties = 0
    for i in range(len(images)):
        for transposed in (False, True):
            row = (similarities.T if transposed else similarities)[i]
            others = [j for j in range(len(row)) if j != i]
            if hardest:
                largest = max(row[j] for j in others)
                ties += sum(bool(row[j] == largest) for j in others) > 1
                others = [next(j for j in others if row[j] == largest)]
            for j in others:
                if row[j] - row[i] + 0.1875 > 0:
                    image, text = (j, i) if transposed else (i, j)
                    expected[0][image] += texts[text]
                    expected[1][text] += images[image]
                    expected[0][i] -= texts[i]
                    expected[1][i] -= images[i]
    assert ties > 10 or not hardest
    for impl in ("torch", "reference"):
        _, *gradients = value_and_gradients(arguments, hardest=hardest, impl=impl)
        for mine, true in zip(gradients, expected, strict=True):
            torch.testing.assert_close(mine, 3 * true, rtol=0, atol=1e-12, msg=impl)


@pytest.mark.parametrize("hardest", (True, False))
@pytest.mark.parametrize("impl", ("torch", "reference"))
def test_equal_labels_are_no_negatives(impl, hardest):
    arguments = inputs(count=12)
    alone = [vk.triplet_loss(**arguments, hardest=hardest, labels=labels, impl=impl) for labels in (None, torch.arange(12))]
    assert torch.equal(*alone) and alone[0] > 0
    one = vk.triplet_loss(**arguments, hardest=hardest, labels=torch.zeros(12, dtype=torch.int32), impl=impl)
    assert one == 0 and not any(g.any() for g in torch.autograd.grad(one, [arguments[name] for name in TENSORS]))


def test_it_is_vse_plus_plus_s():
    for hardest in (True, False):
        arguments = inputs(hardest=hardest)
        peer = value_and_gradients(arguments, SPECS[0].peers["torch"])
        for mine, true in zip(value_and_gradients(arguments, impl="torch"), peer, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hardest", (True, False))
def test_similarities_of_any_size_stay_finite(hardest):
    arguments = {name: 1e15 * tensor.detach() for name, tensor in inputs(dtype=torch.float32).items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in arguments.items()}
    assert all(t.isfinite().all() for t in value_and_gradients(leaves, hardest=hardest, impl="torch"))


@pytest.mark.parametrize("hardest", (True, False))
def test_autocast_changes_nothing(hardest):
    arguments = inputs(dtype=torch.float32, hardest=hardest)
    outside = value_and_gradients(arguments, impl="torch")
    with torch.autocast("cpu", torch.bfloat16):
        inside = value_and_gradients(arguments, impl="torch")
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


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


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_tensor_is_larger_than_the_features(options, small_tiles):
    arguments = inputs(**options, count=150)
    tensors = [arguments[name].detach() for name in TENSORS]
    with LargestTensor() as largest:
        torch_kernels.triplet_loss(*tensors, arguments.get("labels"), 0.2, options["hardest"], "", None, "mean", "gather", True)
    assert largest.numel == 150 * 6


@pytest.mark.parametrize(
    "dtype, hardest, few, many",
    [
        (torch.float32, True, 500, 512),
        (torch.float32, False, 500, 512),
        (torch.bfloat16, True, 1000, 1024),
        (torch.bfloat16, False, 2000, 2048),
        (torch.float16, True, 31, 32),
    ],
    ids=str,
)
def test_auto_takes_tiles_for_many_pairs_and_the_matrix_for_few(dtype, hardest, few, many):
    for count, expected in ((few, "reference"), (many, "torch")):
        rows = torch.zeros(count, 1, dtype=dtype)
        with dispatch.recorded() as served:
            vk.triplet_loss(rows, rows, hardest=hardest)
        assert served == [("triplet_loss", expected)]


def test_one_graph_serves_every_number_of_pairs():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *a: vk.triplet_loss(*a, impl="torch"), fullgraph=True, backend=backend)
    for count in (5, 9, 13, 30):
        image, text = torch.randn(2, count, 4)
        torch.testing.assert_close(compiled(image, text), vk.triplet_loss(image, text))
    assert len(graphs) <= 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_features": torch.zeros(5, 3)}, r"text_features must be \[N, D\] = \[4, 3\], got \[5, 3\]"),
        ({"text_features": torch.zeros(4, 2)}, r"text_features must be \[N, D\] = \[4, 3\], got \[4, 2\]"),
        ({"text_features": torch.zeros(4, 3).half()}, "text_features must be float32, got float16"),
        ({"margin": -0.2}, "margin must be at least 0 and finite, got -0.2"),
        ({"margin": float("nan")}, "margin must be at least 0 and finite, got nan"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be \[N\] = \[4\], got \[3\]"),
        ({"labels": torch.zeros(4)}, "labels must be one of int64, int32, got float32"),
        ({"rank_counts": (2, 2)}, r"rank_counts must hold one count for each of 1 ranks, got \[2, 2\]"),
        ({"rank_reduction": "max"}, 'rank_reduction must be "mean" or "sum", got "max"'),
        ({"exchange": "all"}, 'exchange must be "gather" or "ring", got "all"'),
        ({"group": "world"}, "group must be a torch.distributed process group that holds this rank, got 'world'"),
        ({"impl": "cpp"}, 'impl must be "auto" or one of .* for triplet_loss, got "cpp"'),
        ({"impl": "triton"}, "on a CPU it runs in Triton's interpreter only"),
    ],
)
def test_mistakes_are_one_clear_line(change, message):
    arguments = {"image_features": torch.zeros(4, 3), "text_features": torch.zeros(4, 3)}
    with pytest.raises(ValueError, match=message):
        vk.triplet_loss(**arguments | change)


@pytest.mark.parametrize("hardest", (True, False))
@pytest.mark.parametrize("impl", ("auto", "torch", "reference"))
def test_a_batch_without_a_pair_is_refused(impl, hardest):
    with pytest.raises(ValueError, match="a batch must hold at least one pair, got N = 0 on one process"):
        vk.triplet_loss(**features(InputMaker(torch.float32), 0, 8, hardest=hardest), impl=impl)


MUTANTS = {
    "tiles of other texts left out": (torch_kernels, "for j in texts.cut(TILE):", "for j in texts.cut(TILE)[:1]:"),
    "partners that count as negatives": (torch_kernels, "pairs.partners(out, i, j).fill_(-torch.inf)", "pass"),
    "a diagonal in every tile": (torch_kernels, "pairs.partners(out, i, j)", "out.diagonal()"),
    "labels that are negatives": (torch_kernels, "self._labels[i.span, None] == ", "self._labels[i.span, None] != "),
    "places within the tile": (torch_kernels, "place += start", "pass"),
    "the hardest of the last tile": (torch_kernels, "harder = (similarity > known)", "harder = (similarity > -torch.inf)"),
    "the last of equally hard negatives": (torch_kernels, "place < known_place", "place > known_place"),
    "partners that move for their images alone": (driver, "of_images.push + of_texts.push", "of_images.push"),
    "negatives that stay": (torch_kernels, "toward_other, place, weights *", "toward_other, place, 0 * weights *"),
    "pushes of images alone": (torch_kernels, "pushes[j.span] += of_texts.sum(0)", "pass"),
    "a margin left out": (driver, "least = partners - margin", "least = partners"),
    "a margin of the hardest left out": (driver, "- partners + margin)", "- partners)"),
}


def is_right(loss_function):
    cases = [inputs(**options, count=21) for options in OPTIONS] + [tied()]
    for case in cases:
        arguments = {"labels": None, "margin": 0.2, "hardest": True} | case
        tensors = [arguments[name].detach() for name in TENSORS]
        rest = [arguments[name] for name in ("labels", "margin", "hardest")]
        try:
            found = loss_function(*tensors, *rest, "", None, "mean", "gather", True)
        except IndexError:
            return False
        loss, *gradients = value_and_gradients(arguments, impl="reference")
        expected = (loss, *(gradient / 3 for gradient in gradients))
        if not all(torch.allclose(f, e, rtol=1e-10, atol=1e-12) for f, e in zip(found, expected, strict=True)):
            return False
    return True


@pytest.mark.parametrize("fault", [None, *MUTANTS])
def test_a_fault_is_seen(fault, tmp_path, small_tiles):
    module, *changed = MUTANTS.get(fault, (torch_kernels, "", ""))
    mutant = load_mutant(module, *changed, tmp_path)
    if module is driver:
        loss_function = partial(mutant.triplet_loss, torch_kernels.Tiles)
    else:
        mutant.TILE = 8
        loss_function = mutant.triplet_loss
    assert is_right(loss_function) == (fault is None)
