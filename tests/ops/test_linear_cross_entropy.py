"""What is special to the linear cross-entropy: chunks, ignored rows, teachers, memory, errors."""

import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import vlkernels as vk
from torch.utils._python_dispatch import TorchDispatchMode

from vlkernels.core import dispatch, native
from vlkernels.core.spec import Case, InputMaker
from vlkernels.ops.linear_cross_entropy import benchmarks, cpu, driver, peers, torch_kernels
from vlkernels.ops.linear_cross_entropy.spec import SPECS
from vlkernels.testing import contract

SPEC = SPECS[0]
ROWS, WIDTH, ENTRIES = 25, 8, 60
needs_kernel = pytest.mark.skipif(native.missing("classify") is not None, reason=str(native.missing("classify")))
CHUNKED = [pytest.param("torch"), pytest.param("cpp", marks=needs_kernel)]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(driver, "CPU_CHUNK_LOGITS", 4 * ENTRIES)


def problem(dtype=torch.float64, ignored=True):
    fill = InputMaker(dtype)
    targets = fill.integers(0, ENTRIES, (ROWS,))
    if ignored:
        targets[::3] = -100
    return fill.normal(ROWS, WIDTH), fill.normal(ENTRIES, WIDTH), targets, fill.normal(ENTRIES)


OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.2, "z_loss": 1e-2},
    "taught": {"distillation": 0.4, "temperature": 2.0},
}


# Rows, width, entries: beside whole tiles and cache lines, and BERT's vocabulary, which is no multiple of 8.
RAGGED = ((1, 8, 5), (2, 64, 1000), (63, 768, 5), (65, 64, 1000), (257, 8, 1000), (2, 64, 30522))


def ragged_case(rows, width, entries):
    def make(fill):
        targets = fill.integers(0, entries, (rows,))
        targets[1::3] = -100
        weight = fill.normal(entries, width, scale=width**-0.5)
        return {"hidden": fill.normal(rows, width), "weight": weight, "targets": targets, "bias": fill.normal(entries)}

    return Case(f"{rows}x{width}x{entries}", make)


@pytest.mark.parametrize("impl", CHUNKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", RAGGED)
def test_ragged_sizes(sizes, dtype, impl):
    contract.verify(SPEC, ragged_case(*sizes), dtype, impl)


def test_an_evaluation_keeps_nothing():
    hidden, weight, targets, bias = problem()
    with torch.no_grad():
        loss = vk.linear_cross_entropy(hidden, weight, targets, bias=bias, impl="torch")
    options = -100, 0.0, 0.0, 0.0, 1.0, "mean", False
    found = torch_kernels.forward(hidden.detach(), weight.detach(), bias.detach(), targets, None, None, None, *options)
    assert torch.equal(found[0], loss) and not any(t.numel() for t in found[1:4])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("option", OPTIONS)
def test_chunks_give_what_all_logits_give(option, ignored, reduction, small_chunks):
    results = []
    for impl in ("torch", "reference"):
        hidden, weight, targets, bias = problem(ignored=ignored)
        fill = InputMaker(torch.float64, seed=1)
        teacher = (fill.normal(ROWS, 5, grad=False), fill.normal(ENTRIES, 5, grad=False), None)
        options = OPTIONS[option] | ({"teacher": teacher} if option == "taught" else {})
        loss = vk.linear_cross_entropy(
            hidden, weight, targets, bias=bias, reduction=reduction, impl=impl, **options
        )
        along = torch.linspace(1, 2, ROWS, dtype=torch.float64) if reduction == "none" else None
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias), along)))
    for mine, true in zip(*results, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_cannot_be_counted_are_carried_along_with_weight_zero(reduction, small_chunks, monkeypatch):
    monkeypatch.setattr(driver, "_may_count", lambda targets: False)
    results = []
    for impl in ("torch", "reference"):
        hidden, weight, targets, bias = problem()
        loss = vk.linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, impl=impl)
        along = torch.linspace(1, 2, ROWS, dtype=torch.float64) if reduction == "none" else None
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias), along)))
    for mine, true in zip(*results, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-13)


def test_weight_gradients_of_bfloat16_chunks_add_up_in_float32(monkeypatch):
    monkeypatch.setattr(driver, "CPU_CHUNK_LOGITS", 2 * 16)
    fill = InputMaker(torch.bfloat16)
    hidden, weight, targets = fill.normal(512, 8), fill.normal(16, 8), fill.integers(0, 16, (512,))
    mine = torch.autograd.grad(vk.linear_cross_entropy(hidden, weight, targets, impl="torch"), weight)[0]
    exact = hidden.detach().double(), weight.detach().double().requires_grad_()
    true = torch.autograd.grad(vk.linear_cross_entropy(*exact, targets, impl="reference"), exact[1])[0]
    eager = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), weight)[0]
    assert (mine.double() - true).abs().max() <= 2 * (eager.double() - true).abs().max()


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_tensor_has_the_logits_of_all_rows(small_chunks):
    hidden, weight, targets, bias = (t.detach() for t in problem(ignored=False))
    with LargestTensor() as largest:
        torch_kernels.forward(
            hidden, weight, bias, targets, None, None, None, -100, 0.1, 0.1, 0.0, 1.0, "mean", True
        )  # fmt: skip
    assert largest.numel == ENTRIES * WIDTH < ROWS * ENTRIES


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_second_backward_computes_again_what_the_first_took(reduction, small_chunks):
    hidden, weight, targets, bias = problem()
    loss = vk.linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, impl="torch").sum()
    first = torch.autograd.grad(loss, (hidden, weight, bias), torch.tensor(2.0).double(), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    again = torch.autograd.grad(loss, (hidden, weight, bias), torch.tensor(6.0).double())
    for mine, before, true in zip(again, kept, first, strict=True):
        assert torch.equal(before, true)
        torch.testing.assert_close(mine, 3 * before, rtol=1e-11, atol=1e-13)


def test_a_gradient_is_not_copied():
    """What the forward kept becomes the parameter's gradient: of a large vocabulary there is one in memory."""
    hidden, weight, targets, _ = problem(torch.float32)
    loss = vk.linear_cross_entropy(hidden, weight, targets, impl="torch")
    kept = loss.grad_fn.kept[1].data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == kept


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_all_targets_ignored_is_a_loss_of_zero(impl):
    hidden, weight, targets, bias = problem()
    loss = vk.linear_cross_entropy(
        hidden, weight, torch.full_like(targets, -100), bias=bias, z_loss=1.0, impl=impl
    )
    loss.backward()
    assert loss == 0 and not any(t.grad.any() for t in (hidden, weight, bias))


def test_ignored_rows_are_not_even_read():
    hidden, weight, targets, _ = problem(torch.float32)
    hidden.data[::3] = torch.nan
    loss = vk.linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all() and not hidden.grad[::3].any()


def test_another_ignore_index_may_lie_inside_the_vocabulary():
    hidden, weight, targets, bias = problem(torch.float32, ignored=False)
    mine = vk.linear_cross_entropy(hidden, weight, targets, bias=bias, ignore_index=int(targets[0]))
    true = F.cross_entropy(F.linear(hidden, weight, bias), targets, ignore_index=int(targets[0]))
    torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_distillation_is_that_of_albef_and_of_distilbert(impl):
    hidden, weight, targets, bias = problem(ignored=False)
    fill = InputMaker(torch.float64, seed=1)
    teacher = tuple(fill.normal(*shape).requires_grad_() for shape in ((ROWS, 5), (ENTRIES, 5), (ENTRIES,)))
    logits, taught = F.linear(hidden, weight, bias), F.linear(*teacher)
    soft = -(F.log_softmax(logits, dim=1) * F.softmax(taught, dim=1)).sum(1).mean()
    albef = 0.6 * F.cross_entropy(logits, targets) + 0.4 * soft
    mine = vk.linear_cross_entropy(
        hidden, weight, targets, bias=bias, teacher=teacher, distillation=0.4, impl=impl
    )
    torch.testing.assert_close(mine, albef, rtol=1e-12, atol=0)

    def softened(x):
        return F.log_softmax(x / 3, dim=1)

    divergence = F.kl_div(softened(logits), softened(taught), reduction="batchmean", log_target=True) * 9
    mine = vk.linear_cross_entropy(
        hidden, weight, targets, bias=bias, teacher=teacher, distillation=1.0, temperature=3.0, impl=impl
    )
    for gradient, true in zip(
        torch.autograd.grad(mine, (hidden, bias)), torch.autograd.grad(divergence, (hidden, bias))
    ):
        torch.testing.assert_close(gradient, true, rtol=1e-10, atol=1e-14)
    assert all(t.grad is None for t in teacher)


def test_float16_gradients_survive_until_the_loss_scale():
    fill = InputMaker(torch.float16)
    hidden, weight, targets = (
        fill.normal(2000, 4, scale=0.1),
        fill.normal(300, 4, scale=0.1),
        fill.integers(0, 300, (2000,)),
    )
    (vk.linear_cross_entropy(hidden, weight, targets) * 2.0**14).backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    (vk.linear_cross_entropy(*exact, targets, impl="reference") * 2.0**14).backward()
    for mine, true in zip((hidden, weight), exact):
        assert (mine.grad.double() - true.grad).abs().max() < 2e-3 * true.grad.abs().max()


def test_auto_never_takes_the_reference():
    hidden, weight, targets, _ = problem(torch.float32)
    with dispatch.recorded() as served:
        vk.linear_cross_entropy(hidden, weight, targets)
    assert served == [("linear_cross_entropy", "torch" if native.missing("classify") else "cpp")]


@needs_kernel
@pytest.mark.parametrize("isa", native.CPU_ISA_LEVELS)
@pytest.mark.parametrize("name", ["longer_than_a_tile", "extreme", "confident", "z_loss_none"])
def test_every_instruction_set_keeps_the_contract(name, isa):
    try:
        native.limit_cpu_isa(isa)
        contract.verify(SPEC, next(case for case in SPEC.cases if case.name == name), torch.float32, "cpp")
    finally:
        native.limit_cpu_isa(native.CPU_ISA_LEVELS[-1])


def passes(logits, targets, **options):
    """Losses, derivatives and their sums over the rows, by the compiled passes; logits [rows, V] are left alone."""
    columns = logits.T.clone(memory_format=torch.contiguous_format)
    given = {"bias": None, "cotangents": None, "label_smoothing": 0.0, "z_loss": 0.0} | options
    losses, over_rows = cpu.classify(
        columns, given["bias"], targets, given["cotangents"], given["label_smoothing"], given["z_loss"], True
    )
    return losses, columns.T, over_rows


@needs_kernel
@pytest.mark.parametrize("isa", native.CPU_ISA_LEVELS)
@pytest.mark.parametrize("rows", [1, 15, 16, 67])
def test_the_compiled_passes_are_a_cross_entropy_over_any_number_of_blocks(rows, isa):
    fill = InputMaker(torch.float32)
    logits, bias = fill.normal(rows, 1600, grad=False, scale=5), fill.normal(1600, grad=False)
    cotangents, targets = fill.normal(rows, grad=False), fill.integers(0, 1600, (rows,))
    options = {"label_smoothing": 0.1, "z_loss": 1e-2}
    try:
        native.limit_cpu_isa(isa)
        losses, slopes, over_rows = passes(logits, targets, bias=bias, cotangents=cotangents, **options)
    finally:
        native.limit_cpu_isa(native.CPU_ISA_LEVELS[-1])
    exact = logits.double().requires_grad_()
    shifted = exact + bias.double()
    true = F.cross_entropy(shifted, targets, reduction="none", label_smoothing=0.1) + 1e-2 * shifted.logsumexp(1) ** 2
    (gradient,) = torch.autograd.grad(true, exact, cotangents.double())
    torch.testing.assert_close(losses.double(), true, rtol=1e-5, atol=0)
    torch.testing.assert_close(slopes.double(), gradient, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(over_rows.double(), gradient.sum(0), rtol=1e-5, atol=1e-6)


@needs_kernel
def test_a_row_that_knows_its_target_keeps_the_digits_of_a_small_loss():
    logits = torch.zeros(3, 1000)
    logits[:, 7] = torch.tensor([30.0, 60.0, 80.0])
    losses, slopes, _ = passes(logits, torch.full((3,), 7))
    true = torch.log1p(999 * (-logits[:, 7].double()).exp())
    torch.testing.assert_close(losses.double(), true, rtol=1e-5, atol=0)
    torch.testing.assert_close(slopes[:, 7].double(), -true, rtol=1e-5, atol=0)


@needs_kernel
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [3, 5])  # the target, another entry
def test_what_is_not_finite_stays_so(at, value, smoothing):
    logits = torch.randn(2, 40, dtype=torch.float32)
    bias = torch.zeros(40)
    bias[at] = value
    losses, slopes, _ = passes(logits, torch.tensor([3, 3]), bias=bias, label_smoothing=smoothing)
    exact = (logits + bias).requires_grad_()
    true = F.cross_entropy(exact, torch.tensor([3, 3]), reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses, true, equal_nan=True)
    if true.isfinite().all():
        torch.testing.assert_close(slopes, torch.autograd.grad(true.sum(), exact)[0])


@needs_kernel
def test_the_compiled_passes_give_the_same_bits_on_any_number_of_threads():
    fill, threads = InputMaker(torch.float32), torch.get_num_threads()
    logits, targets = fill.normal(130, 5000, grad=False, scale=3), fill.integers(0, 5000, (130,))
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(passes(logits, targets, label_smoothing=0.1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@needs_kernel
def test_the_kernel_refuses_what_it_cannot_read():
    logits, targets, of_rows = torch.zeros(5, 3), torch.zeros(3, dtype=torch.int64), torch.ones(3)
    right = [logits, torch.zeros(5), targets, of_rows, 0.0, 0.0]
    wrong = [
        *((0, t) for t in (logits.double(), logits.T, logits[0])),
        *((1, t) for t in (torch.zeros(3), torch.zeros(5).double())),
        *((2, t) for t in (targets.int(), targets[:2], targets + 5, targets - 1)),
        *((3, t) for t in (of_rows[:2], of_rows.double())),
    ]
    cpu.classify(*right, True)
    for position, argument in wrong:
        with pytest.raises(RuntimeError, match="must"):
            cpu.classify(*(argument if k == position else r for k, r in enumerate(right)), True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(9, 4)}, r"weight must be \[V, D\] = \[any, 3\], got \[9, 4\]"),
        ({"weight": torch.zeros(0, 3)}, r"weight must have at least one row, got \[0, 3\]"),
        ({"weight": torch.zeros(9, 3).half()}, "weight must be float32, got float16"),
        (
            {"targets": torch.tensor([0, 9])},
            r"targets \(ignore_index aside\) must lie in \[0, 9\), got values from 0 to 9",
        ),
        ({"targets": torch.tensor([-1, 3])}, r"must lie in \[0, 9\), got values from -1 to 3"),
        ({"targets": torch.zeros(2)}, "targets must be one of int64, int32, got float32"),
        ({"bias": torch.zeros(8)}, r"bias must be \[V\] = \[9\], got \[8\]"),
        ({"reduction": "max"}, 'reduction must be "mean", "sum" or "none", got "max"'),
        ({"z_loss": -1.0}, "z_loss must be at least 0, got -1.0"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"distillation": 0.5}, r"distillation = 0.5 needs a teacher: \(hidden, weight, bias or None\)"),
        (
            {"distillation": 0.5, "teacher": (torch.zeros(2, 5), torch.zeros(8, 5), None)},
            r"the teacher's weight must be \[V, any\] = \[9, 5\], got \[8, 5\]",
        ),
    ],
)
def test_mistakes_are_one_clear_line(change, message):
    arguments = {
        "hidden": torch.zeros(2, 3),
        "weight": torch.zeros(9, 3),
        "targets": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        vk.linear_cross_entropy(**arguments | change)


@pytest.mark.parametrize("name", ["torch", "F.linear_cross_entropy"])
def test_benchmarks_and_peers_compute_the_same(name):
    arguments = SPEC.benchmarks["quickstart_m300_v2000_d128"].make(InputMaker(torch.float32))
    call, inputs = SPEC.peers[name].prepare(**arguments)  # raises where they differ
    loss = call()
    torch.testing.assert_close(loss, vk.linear_cross_entropy(**arguments))
    assert len(torch.autograd.grad(loss, inputs)) == 3


def test_peers_that_are_not_installed_say_so():
    builds = benchmarks.CARD_BUILDS
    arguments = benchmarks.head(InputMaker(torch.float32), 4, 8, 10)
    for name, module in (("Liger", "liger_kernel"), ("cut cross-entropy", "cut_cross_entropy"), ("QuACK", "quack")):
        if importlib.util.find_spec(module) is None:
            with pytest.raises(ModuleNotFoundError, match=module):
                builds[name](**arguments)


def test_a_peer_without_our_bias_is_not_timed(monkeypatch):
    stand_in = types.SimpleNamespace(chunked_linear_cross_entropy=peers.dense)
    monkeypatch.setitem(sys.modules, "quack.linear_cross_entropy", stand_in)
    quack = benchmarks.CARD_PEERS["QuACK"]
    with pytest.raises(NotImplementedError, match="its chunks take no bias"):
        quack.prepare(**benchmarks.head(InputMaker(torch.float32), 4, 8, 10))
    quack.prepare(**benchmarks.head(InputMaker(torch.float32), 4, 8, 10, bias=False))


def test_any_number_of_rows_compiles_each_kernel_once():
    pytest.importorskip("triton")
    from benchmarks import offline
    from vlkernels.ops.linear_cross_entropy.gpu import variants

    compiled = {}
    with offline.card(90):
        for rows in (1, 2, 16, 130, 1030, 9000):
            for kernel, launch in variants.launches(torch.bfloat16, 64, False, 90, rows=rows).items():
                compiled.setdefault(kernel, set()).add(launch.compile().hash)
    assert {kernel: len(hashes) for kernel, hashes in compiled.items()} == {"statistics": 1, "losses": 1, "slopes": 1}
