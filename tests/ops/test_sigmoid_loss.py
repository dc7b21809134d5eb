"""What is special to the sigmoid loss: tiles, shapes, half types, memory, who serves, errors, faults."""

import sys
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import vlkernels as vk
from torch.utils._python_dispatch import TorchDispatchMode

from tests.mutants import load_mutant
from vlkernels.core import dispatch, native
from vlkernels.core.spec import Case, InputMaker
from vlkernels.ops.sigmoid_loss import cpu, driver, peers, torch_kernels
from vlkernels.ops.sigmoid_loss.spec import ON_A_CARD, SPECS, features
from vlkernels.testing import contract

BUILT = native.missing("weigh_pairs") is None
needs_kernel = pytest.mark.skipif(not BUILT, reason="no compiled library")
TILED = (pytest.param("cpp", marks=needs_kernel), "torch")
TENSORS = ("image_features", "text_features", "logit_scale", "logit_bias")
COUNTS, WIDTHS, SCALES = (1, 2, 63, 64, 65, 257, 1000), (8, 64, 256, 512, 768, 1024), (1.0, 10.0, 100.0)
# Every count, width and scale, each beside several of the others.
SHAPES = [(n, WIDTHS[k % 6], SCALES[k % 3]) for k, n in enumerate(2 * COUNTS)] + [(65, d, 30.0) for d in WIDTHS]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that little inputs have many."""
    monkeypatch.setattr(torch_kernels, "TILE", 8)


def inputs(labels=False, count=37, width=6, dtype=torch.float64):
    fill = InputMaker(dtype)
    arguments = features(fill, count, width, scale=2.5, bias=-1.0)
    return arguments | ({"labels": fill.integers(0, 5, (count,))} if labels else {})


def value_and_gradients(arguments, loss_function=vk.sigmoid_loss, **options):
    loss = loss_function(**arguments, **options)
    return loss.detach(), *torch.autograd.grad(loss * 3, [arguments[name] for name in TENSORS])


def of_shape(count, width, scale):
    return Case(f"n{count}_d{width}_s{scale}", lambda fill: features(fill, count, width, scale))


@pytest.mark.parametrize("count, width, scale", SHAPES)
@pytest.mark.parametrize(
    "impl, dtype",
    [
        *(pytest.param("cpp", dtype, marks=needs_kernel) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        ("torch", torch.float32),
        ("torch", torch.bfloat16),
    ],
    ids=str,
)
def test_every_shape_obeys_the_error_rule(count, width, scale, impl, dtype):
    contract.verify(SPECS[0], of_shape(count, width, scale), dtype, impl)


@pytest.mark.parametrize("impl", TILED)
def test_threads_do_not_change_a_sum(impl):
    """In the gradient of the scale, 2e-4, terms of both signs all but cancel: a thread more moved it by six ulps."""
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            contract.verify(SPECS[0], of_shape(257, 8, 1.0), torch.float32, impl)
            results = value_and_gradients(features(InputMaker(torch.float32), 257, 8, 1.0), impl=impl)
            found.append([results[0], *results[3:]])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@needs_kernel
@pytest.mark.parametrize("isa", native.CPU_ISA_LEVELS)
@pytest.mark.parametrize("labels", (False, True))
def test_every_instruction_set(isa, labels, monkeypatch):
    """Tiles of 90 and of the 77 columns left: registers by fours, whole ones and a part of one."""
    monkeypatch.setattr(torch_kernels, "TILE", 90)

    def arguments(fill):
        return features(fill, 257, 16, 20.0, -4.0) | ({"labels": fill.integers(0, 9, (257,))} if labels else {})

    try:
        native.limit_cpu_isa(isa)
        contract.verify(SPECS[0], Case(isa, arguments), torch.float32, "cpp")
    finally:
        native.limit_cpu_isa(native.CPU_ISA_LEVELS[-1])


@needs_kernel
@pytest.mark.parametrize("isa", native.CPU_ISA_LEVELS)
def test_the_compiled_pass_is_exact_for_every_logit(isa):
    """Relative to each element, also where a loss is 1e-30 (whose logit, -70, has rounded); infinities and NaN stay."""
    logits = torch.cat([torch.linspace(-100, 100, 9973), torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan])])
    ids = torch.arange(len(logits), dtype=torch.int32)
    one, zero = torch.ones(()), torch.zeros(())
    try:
        native.limit_cpu_isa(isa)
        for sign, row_id in ((1.0, ids[:1] - 1), (-1.0, ids[:1])):  # no positive pair, then one by one
            for k in (*range(0, len(logits), 499), *range(9972, len(logits))):
                loss = cpu.weigh_pairs(logits[k].reshape(1, 1), row_id, ids[:1], one, zero, False)[0]
                true = F.softplus(sign * logits[k].double(), threshold=1e4)
                torch.testing.assert_close(loss.double(), true, rtol=8e-6, atol=2e-38, equal_nan=True)
        tile = logits[None].clone()
        cpu.weigh_pairs(tile, ids[:1] - 1, ids, one, zero, True)
    finally:
        native.limit_cpu_isa(native.CPU_ISA_LEVELS[-1])
    torch.testing.assert_close(tile[0].double(), logits.double().sigmoid(), rtol=8e-6, atol=2e-38, equal_nan=True)


@needs_kernel
def test_the_kernel_refuses_what_it_cannot_read():
    tile, ids, number = torch.zeros(3, 4), torch.arange(4, dtype=torch.int32), torch.ones(())
    right = [tile, ids[:3], ids, number, number]
    wrong = [
        *((0, t) for t in (tile.double(), tile.T, tile[0])),
        *((1, t) for t in (ids, ids[:3].long())),
        *((2, ids[:3]), (3, torch.ones(2)), (4, number.double())),
    ]
    for position, argument in wrong:
        with pytest.raises(RuntimeError, match="must"):
            cpu.weigh_pairs(*(argument if k == position else r for k, r in enumerate(right)), True)


@pytest.mark.parametrize("labels", (False, True))
def test_many_tiles_give_what_the_whole_matrix_gives(labels, small_tiles):
    mine = value_and_gradients(inputs(labels), impl="torch")
    for tensor, true in zip(mine, value_and_gradients(inputs(labels), impl="reference"), strict=True):
        torch.testing.assert_close(tensor, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("labels", (False, True))
@pytest.mark.parametrize("impl", TILED)
def test_value_without_gradients_is_the_same(impl, labels, small_tiles):
    arguments = inputs(labels, dtype=torch.float32)
    with torch.no_grad():
        alone = vk.sigmoid_loss(**arguments, impl=impl)
    assert torch.equal(alone, value_and_gradients(arguments, impl=impl)[0])


def test_equal_labels_are_positives():
    labels = torch.tensor([3, 1, 3, 3, 1])
    fill = InputMaker(torch.float64)
    images, texts = fill.normal(5, 4), fill.normal(5, 4)
    true = 0.0
    for i, j in product(range(5), range(5)):
        sign = 1 if labels[i] == labels[j] else -1
        true = true - F.logsigmoid(sign * (2.0 * images[i] @ texts[j] - 0.5)) / 5
    for impl in ("torch", "reference"):
        loss = vk.sigmoid_loss(images, texts, 2.0, logit_bias=-0.5, labels=labels, impl=impl)
        torch.testing.assert_close(loss, true, rtol=1e-13, atol=0)


@pytest.mark.parametrize("impl", (*TILED, "reference"))
def test_logits_of_any_size_stay_finite(impl):
    images = torch.tensor([[300.0, 0.0], [-300.0, 0.0]], requires_grad=True)
    texts = torch.tensor([[300.0, 0.0], [300.0, 0.0]], requires_grad=True)
    loss = vk.sigmoid_loss(images, texts, 100.0, impl=impl)
    loss.backward()
    # One partner and one stranger are 9e6 on the wrong side.
    torch.testing.assert_close(loss.detach(), torch.tensor(9e6))
    assert images.grad.isfinite().all() and texts.grad.isfinite().all() and texts.grad.any()


@pytest.mark.parametrize("impl", TILED)
def test_gradients_of_scale_and_bias_are_float32_beside_bfloat16(impl):
    half, exact = (features(InputMaker(dtype), 300, 64) for dtype in (torch.bfloat16, torch.float64))
    mine = value_and_gradients(half, impl=impl)[3:]
    logits = (exact["image_features"] @ exact["text_features"].T).detach()
    signs = 2 * torch.eye(300, dtype=torch.float64) - 1
    derivatives = -signs * torch.sigmoid(-signs * (10 * logits - 10)) * 3 / 300
    for gradient, terms in zip(mine, (derivatives * logits, derivatives), strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - terms.sum()).abs() <= 1e-6 * terms.abs().sum()


@pytest.mark.parametrize("impl", TILED)
def test_autocast_changes_nothing(impl):
    arguments = inputs(dtype=torch.float32)
    outside = value_and_gradients(arguments, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        inside = value_and_gradients(arguments, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_float16_gradients_survive_until_the_loss_scale():
    spread = [(0.01 * x).half().requires_grad_() for x in torch.randn(2, 600, 64)]
    (vk.sigmoid_loss(*spread, 1.0, logit_bias=-10.0, impl="torch") * 2.0**16).backward()
    exact = [x.detach().double().requires_grad_() for x in spread]
    (vk.sigmoid_loss(*exact, 1.0, logit_bias=-10.0, impl="reference") * 2.0**16).backward()
    for mine, true in zip(spread, exact):
        assert (mine.grad.double() - true.grad).abs().max() < 2e-3 * true.grad.abs().max()


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


@pytest.mark.parametrize("labels", (False, True))
@pytest.mark.parametrize("impl", TILED)
def test_no_tensor_is_larger_than_the_features(impl, labels, small_tiles):
    arguments = inputs(labels, count=150, dtype=torch.float32)
    tensors = [arguments[name].detach() for name in TENSORS]
    loss_function = torch_kernels.compiled_sigmoid_loss if impl == "cpp" else torch_kernels.sigmoid_loss
    with LargestTensor() as largest:
        loss_function(*tensors, arguments.get("labels"), "", None, "mean", "gather", True)
    assert largest.numel == 150 * 6


@pytest.mark.parametrize(
    "dtype, few, many", [(torch.float32, 511, 512), (torch.bfloat16, 2048, 4096), (torch.float16, 31, 32)], ids=str
)
def test_auto_takes_tiles_for_many_pairs_and_the_matrix_for_few(dtype, few, many):
    for count, expected in ((few, "reference"), (many, "cpp" if BUILT else "torch")):
        rows = torch.zeros(count, 1, dtype=dtype)
        with dispatch.recorded() as served:
            vk.sigmoid_loss(rows, rows, 1.0)
        assert served == [("sigmoid_loss", expected)]


def test_one_graph_serves_every_number_of_pairs():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *a: vk.sigmoid_loss(*a, impl="torch"), fullgraph=True, backend=backend)
    for count in (5, 9, 13, 30):
        image, text = torch.randn(2, count, 4)
        torch.testing.assert_close(compiled(image, text, 3.0), vk.sigmoid_loss(image, text, 3.0))
    assert len(graphs) <= 2


@pytest.mark.parametrize("impl", ("auto", "torch", "reference"))
@pytest.mark.parametrize("rank_counts", (None, (0,)))
def test_a_batch_without_a_pair_is_refused(impl, rank_counts):
    with pytest.raises(ValueError, match="a batch must hold at least one pair, got N = 0 on one process"):
        vk.sigmoid_loss(**features(InputMaker(torch.float32), 0, 8), rank_counts=rank_counts, impl=impl)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_features": torch.zeros(5, 3)}, r"text_features must be \[N, D\] = \[4, 3\], got \[5, 3\]"),
        ({"text_features": torch.zeros(4, 2)}, r"text_features must be \[N, D\] = \[4, 3\], got \[4, 2\]"),
        ({"image_features": torch.zeros(4)}, r"image_features must be \[N, D\] = \[any, any\], got \[4\]"),
        ({"text_features": torch.zeros(4, 3).half()}, "text_features must be float32, got float16"),
        ({"logit_scale": torch.ones(2)}, r"logit_scale must be a number or have shape \(\) or \(1,\), got \[2\]"),
        ({"logit_bias": torch.ones(1, 1)}, r"logit_bias must be a number or have shape \(\) or \(1,\), got \[1, 1\]"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be \[N\] = \[4\], got \[3\]"),
        ({"labels": torch.zeros(4)}, "labels must be one of int64, int32, got float32"),
        ({"rank_counts": (2, 2)}, r"rank_counts must hold one count for each of 1 ranks, got \[2, 2\]"),
        ({"rank_reduction": "max"}, 'rank_reduction must be "mean" or "sum", got "max"'),
        ({"exchange": "all"}, 'exchange must be "gather" or "ring", got "all"'),
        ({"group": "world"}, "group must be a torch.distributed process group that holds this rank, got 'world'"),
        ({"impl": "cuda"}, 'impl must be "auto" or one of .* for sigmoid_loss, got "cuda"'),
        ({"impl": "triton"}, "on a CPU it runs in Triton's interpreter only"),
    ],
)
def test_mistakes_are_one_clear_line(change, message):
    arguments = {"image_features": torch.zeros(4, 3), "text_features": torch.zeros(4, 3), "logit_scale": 1.0}
    with pytest.raises(ValueError, match=message):
        vk.sigmoid_loss(**arguments | change)


def test_benchmarks_and_peer_compute_the_same():
    arguments = SPECS[0].benchmarks["quickstart_n128_d64"](InputMaker(torch.float32))
    torch.testing.assert_close(SPECS[0].peers["torch"](**arguments), vk.sigmoid_loss(**arguments, impl="torch"))


def test_libraries_on_a_card_are_called_as_they_want_to_be(monkeypatch):
    """Stand-ins with the libraries' arguments; one that computes something else is not timed."""
    wrong = 0.0

    def fused_siglip_loss(img_features, txt_features, log_temperature, bias):
        return peers.eager(img_features, txt_features, log_temperature.exp(), bias + wrong)

    class SigLipLoss(torch.nn.Module):
        def forward(self, image_features, text_features, logit_scale, logit_bias, output_dict=False):
            return peers.eager(image_features, text_features, logit_scale, logit_bias)

    for name, held in (("siglip_kernel", fused_siglip_loss), ("open_clip.loss", SigLipLoss)):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{held.__name__: held}))
    arguments = inputs(dtype=torch.float32)
    libraries = [ON_A_CARD[name] for name in ("open_clip SigLipLoss", "siglip-kernel")]
    for library in libraries:
        call, differentiated = library.prepare(**arguments)
        torch.testing.assert_close(call(), vk.sigmoid_loss(**arguments))
        assert len(differentiated) == 4
    wrong = 1.0
    with pytest.raises(ValueError, match="it computes something else"):
        libraries[1].prepare(**arguments)


MUTANTS = {
    "tiles of other texts left out": (torch_kernels, "for j in texts.cut(TILE):", "for j in texts.cut(TILE)[:1]:"),
    "partners that count as strangers": (torch_kernels, "pairs.partners(tile, i, j).neg_()", "pass"),
    "a diagonal in every tile": (torch_kernels, "pairs.partners(tile, i, j)", "tile.diagonal()"),
    "labels that repel": (torch_kernels, "self._labels[i.span, None] != ", "self._labels[i.span, None] == "),
    "a bias left out": (torch_kernels, ".add_(self._bias)", ""),
    "a scale that aligns with its own product": (torch_kernels, "weights, products, out", "weights, logits, out"),
    "text gradients of the first tile alone": (torch_kernels, "toward_text[texts.within(j)]", "toward_text[: len(j.features)]"),
    "a scale missing from the gradients": (driver, "of_features = scale * factor", "of_features = factor"),
    "a sum for a mean": (driver, "mean = 1 / rows.total", "mean = 1"),
    "ids of the first tile alone": (torch_kernels, "arange(block.start, block.span.stop,", "arange(len(block.features),"),
    "labels of the first tile alone": (torch_kernels, "self._ids[block.span]", "self._ids[: len(block.features)]"),
    "a compiled pass that is not summed": (torch_kernels, "sums += of_tile", "pass"),
}


def is_right(loss_function, dtype=torch.float64):
    """A fault is far larger than what float32 rounds."""
    near = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    for labels in (False, True):
        arguments = inputs(labels, count=21, dtype=dtype)
        tensors = [arguments[name].detach() for name in TENSORS]
        found = loss_function(*tensors, arguments.get("labels"), "", None, "mean", "gather", True)
        loss, *gradients = value_and_gradients(arguments, impl="reference")
        expected = (loss, *(gradient / 3 for gradient in gradients))
        if not all(torch.allclose(f, e, **near) for f, e in zip(found, expected, strict=True)):
            return False
    return True


@pytest.mark.parametrize("fault", [None, *MUTANTS])
def test_a_fault_is_seen(fault, tmp_path, small_tiles):
    module, *changed = MUTANTS.get(fault, (torch_kernels, "", ""))
    mutant = load_mutant(module, *changed, tmp_path)
    if module is driver:
        loss_function = partial(mutant.sigmoid_loss, torch_kernels.Tiles)
    else:
        mutant.TILE = 8
        loss_function = mutant.sigmoid_loss
    right = is_right(loss_function)
    if BUILT and module is torch_kernels:
        right &= is_right(mutant.compiled_sigmoid_loss, torch.float32)
    assert right == (fault is None)
