"""What is special to embed_layer_norm; the generic contract is in test_contract.py."""

import pytest
import torch
import torch.nn.functional as F

import vlkernels as vk
from tests.emulated import sparse
from vlkernels.core import native
from vlkernels.core.random import dropout_scale, keep_mask
from vlkernels.ops.embed_layer_norm import functional

needs_kernel = pytest.mark.skipif(
    native.missing("embed_layer_norm_forward", "CPU") is not None, reason="no compiled library"
)
IMPLS = ["reference", pytest.param("cpp", marks=needs_kernel)]


GRADIENT_ROADS = [(40, 96), (5000, 128), (4100, 131)]  # a table in the caches, past them, past them unaligned


def make(rows=300, sizes=(90, 20, 2), width=40, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(0, size, (rows,), generator=generator) for size in sizes], dim=1)
    tables = [torch.randn(size, width, generator=generator).to(dtype).requires_grad_() for size in sizes]
    weight = torch.randn(width, generator=generator).requires_grad_()
    return ids, tables, weight


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_comes_after_the_norm_with_the_core_mask(impl):
    ids, tables, weight = make(rows=9)
    plain = vk.embed_layer_norm(ids, tables, weight, impl=impl)
    dropped = vk.embed_layer_norm(ids, tables, weight, dropout_p=0.3, rng=vk.Rng(4), stream=6, impl=impl)
    kept = keep_mask(vk.Rng(4).state, 6, 0, torch.arange(9)[:, None], torch.arange(40), 0.3)
    torch.testing.assert_close(dropped, torch.where(kept, plain * dropout_scale(0.3), 0.0))


@needs_kernel
def test_a_token_that_fills_the_batch_loses_nothing_in_half_precision():
    """2,000 gradients into one row: added in bfloat16 one by one they would stop growing."""
    width, rows = 32, 2000
    ids = torch.zeros(rows, 1, dtype=torch.int64)
    table = torch.randn(3, width).bfloat16().requires_grad_()
    y = vk.embed_layer_norm(ids, [table], None, eps=1e-5, impl="cpp")
    cotangent = torch.randn(width).expand(rows, width).bfloat16()
    (gradient,) = torch.autograd.grad(y, table, cotangent)
    one = torch.autograd.grad(
        vk.embed_layer_norm(ids[:1], [table], None, eps=1e-5, impl="cpp"), table, cotangent[:1]
    )[0]
    torch.testing.assert_close(gradient[0].float(), rows * one[0].float(), rtol=0.005, atol=0)
    assert not gradient[1:].any()


@needs_kernel
@pytest.mark.parametrize("rows", [300, 6])  # of a few rows one thread sums several parts of a table
def test_threads_do_not_change_a_bit(rows):
    ids, tables, _ = make(rows, sizes=(2000, 20, 2), width=300)
    weight = torch.randn(3, 300, requires_grad=True)
    norm_ids = torch.randint(-1, 3, (rows,), generator=torch.Generator().manual_seed(1))
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = vk.embed_layer_norm(ids, tables, weight, norm_ids=norm_ids, impl="cpp")
            results.append((y, *torch.autograd.grad(y, (*tables, weight), torch.ones_like(y).cumsum(0))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("impl", IMPLS)
def test_text_and_regions_arrive_in_packed_order_each_with_its_norm(impl):
    """The call is what UNITER writes as two embedders, a concatenation and a gather."""
    layout, width = vk.SegmentLayout([[3, 2], [2, 0], [0, 4]], capacity=13), 24
    words, regions = torch.randn(9, width), torch.randn(6, width)
    weight, bias = torch.randn(2, width), torch.randn(2, width)
    word_ids = torch.tensor([[8, 1, 2], [8, 8, 0], [0, 0, 0]])
    region_ids = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [2, 3, 4, 5]])
    text = F.layer_norm(words[word_ids], (width,), weight[0], bias[0])
    image = F.layer_norm(regions[region_ids], (width,), weight[1], bias[1])
    segment = layout.token_segment()
    ids = vk.pack((word_ids, region_ids), layout)
    columns = [torch.where(segment == s, ids, -1) for s in (0, 1)]
    y = vk.embed_layer_norm(
        torch.stack(columns, 1), [words, regions], weight, bias=bias, norm_ids=segment, eps=1e-5, impl=impl
    )
    torch.testing.assert_close(y, vk.pack((text, image), layout))


@pytest.mark.parametrize("impl", IMPLS)
def test_several_norms_are_each_the_single_norm(impl):
    ids, tables, _ = make()
    weight, bias = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40, requires_grad=True)
    norm_ids = torch.arange(300) % 2 * 2
    y = vk.embed_layer_norm(ids, tables, weight, bias=bias, norm_ids=norm_ids, impl=impl)
    dweight, dbias = torch.autograd.grad(y.square().sum(), (weight, bias))
    assert not dweight[1].any() and not dbias[1].any()
    for norm in (0, 2):
        rows = norm_ids == norm
        alone = vk.embed_layer_norm(ids[rows], tables, weight[norm], bias=bias[norm], impl=impl)
        torch.testing.assert_close(y[rows], alone)
        found = torch.autograd.grad(alone.square().sum(), (weight, bias))
        torch.testing.assert_close((dweight[norm], dbias[norm]), tuple(g[norm] for g in found))


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_a_norm_are_nobodys(impl):
    dense, weight = torch.randn(50, 24, requires_grad=True), torch.randn(2, 24, requires_grad=True)
    norm_ids = torch.arange(50) % 3 - 1
    options = {"dropout_p": 0.2, "rng": vk.Rng(3), "impl": impl}
    y = vk.embed_layer_norm(None, [], weight, bias=weight, dense=dense, norm_ids=norm_ids, **options)
    (gradient,) = torch.autograd.grad(y.square().sum(), dense)
    assert not y[norm_ids < 0].any() and not gradient[norm_ids < 0].any()
    assert (y[norm_ids >= 0] != 0).any(1).all() and (gradient[norm_ids >= 0] != 0).any(1).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value, eps", [(float("nan"), 1e-12), (float("inf"), 1e-12), (1.0, 0.0)])
def test_nobodys_rows_may_hold_anything(impl, value, eps):
    """Rows that were never written, or that have no variance: nothing of them reaches a gradient."""
    dense, parameters = torch.randn(6, 8), torch.randn(2, 2, 8)
    norm_ids = torch.tensor([0, -1, 1, -1, 0, 1])

    def run(fill):
        inputs = [t.clone().requires_grad_() for t in (dense, *parameters)]
        z = torch.where((norm_ids < 0)[:, None], fill, inputs[0])
        y = vk.embed_layer_norm(
            None, [], inputs[1], bias=inputs[2], dense=z, norm_ids=norm_ids, eps=eps, impl=impl
        )
        return y.detach(), *torch.autograd.grad(y.square().sum(), inputs)

    for found, expected in zip(run(value), run(torch.arange(8.0)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norms, width", [(0, 8), (2, 0)])
def test_there_may_be_no_norm_and_no_column(impl, norms, width):
    table, weight = torch.randn(5, width, requires_grad=True), torch.randn(norms, width, requires_grad=True)
    ids, norm_ids = torch.zeros(3, 1, dtype=torch.int64), torch.full((3,), -1)
    y = vk.embed_layer_norm(ids, [table], weight, bias=weight, norm_ids=norm_ids, impl=impl)
    gradients = torch.autograd.grad(y.sum(), (table, weight))
    assert not y.any() and not any(g.any() for g in gradients)
    assert [g.shape for g in gradients] == [table.shape, weight.shape]


@needs_kernel
def test_norm_ids_of_any_stride_and_ids_of_either_dtype():
    ids, tables, _ = make(rows=8)
    norm_ids, weight = torch.randint(0, 2, (8, 3)), torch.randn(2, 40)
    wide = vk.embed_layer_norm(ids, tables, weight, norm_ids=norm_ids[:, 1], impl="cpp")
    narrow = vk.embed_layer_norm(ids.int(), tables, weight, norm_ids=norm_ids[:, 1].int(), impl="cpp")
    assert torch.equal(wide, narrow)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("table_rows, width", GRADIENT_ROADS)
def test_a_row_used_once_gets_its_gradient_bit_for_bit(table_rows, width, dtype):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(table_rows, width, generator=generator).to(dtype).requires_grad_()
    dense = torch.zeros(60, width, dtype=dtype, requires_grad=True)
    ids = torch.cat((torch.randperm(table_rows, generator=generator)[:39], torch.full((21,), -1)))[:, None]
    y = vk.embed_layer_norm(ids, [table], None, dense=dense, impl="cpp")
    upstream = torch.randn(60, width, generator=generator).to(dtype)
    dtable, dz = torch.autograd.grad(y, (table, dense), upstream)
    expected = torch.zeros_like(table).index_copy_(0, ids[:39, 0], dz[:39])
    assert torch.equal(dtable, expected)


@needs_kernel
@pytest.mark.parametrize("isa", native.CPU_ISA_LEVELS)
@pytest.mark.parametrize("table_rows, width", GRADIENT_ROADS)
def test_the_gradient_of_a_table_on_every_instruction_set(table_rows, width, isa):
    """The rows are small integers, so every order of addition gives the same sums."""
    gradient = torch.randint(-8, 9, (500, width)).float()
    ids = torch.cat((torch.randint(-1, table_rows, (300,)), torch.full((200,), table_rows - 1))).int()[:, None]
    try:
        native.limit_cpu_isa(isa)
        (dtable,) = torch.ops.vlkernels.embed_layer_norm_tables_backward(gradient, ids, [0], [table_rows])
    finally:
        native.limit_cpu_isa(native.CPU_ISA_LEVELS[-1])
    used = ids[:, 0] >= 0
    expected = torch.zeros(table_rows, width).index_add_(0, ids[used, 0].long(), gradient[used])
    assert torch.equal(dtable, expected)


@needs_kernel
def test_a_frozen_table_costs_no_gradient(monkeypatch):
    ids, tables, weight = make()
    tables[0].requires_grad_(False)
    y = vk.embed_layer_norm(ids, tables, weight, impl="cpp")
    asked, of_tables = [], functional._table_gradients
    monkeypatch.setattr(functional, "_table_gradients", lambda *call: asked.append(call[2:]) or of_tables(*call))
    y.sum().backward()
    assert asked == [([1, 2], [20, 2])] and tables[0].grad is None


@needs_kernel
@pytest.mark.parametrize("several_norms", [False, True])
def test_compiles_without_a_graph_break(several_norms):
    def embed(ids, tables, weight, norm_ids, rng):
        return vk.embed_layer_norm(ids, tables, weight, norm_ids=norm_ids, dropout_p=0.1, rng=rng) * 2

    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5, 9):
        ids, tables, weight = make(rows, sizes=(30, 7))
        norm_ids = None
        if several_norms:
            norm_ids, weight = torch.arange(rows) % 3 - 1, torch.randn(2, 40, requires_grad=True)
        traced, eager = (f(ids, tables, weight, norm_ids, vk.Rng(2)) for f in (compiled, embed))
        torch.testing.assert_close(traced, eager)
        wanted = (*tables, weight)
        torch.testing.assert_close(
            torch.autograd.grad(traced.sum(), wanted), torch.autograd.grad(eager.sum(), wanted)
        )


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"ids": torch.tensor([[3, 0], [4, 1]])},
            r"ids\[:, 0\] \(rows of tables\[0\], or -1\) must lie in \[-1, 4\), got values from 3 to 4",
        ),
        (
            {"ids": torch.tensor([[0, -2], [1, 1]])},
            r"ids\[:, 1\] .* must lie in \[-1, 2\), got values from -2 to 1",
        ),
        ({"ids": torch.tensor([[0], [1]])}, r"ids must be \[T, C\] = \[2, 2\], got \[2, 1\]"),
        ({"ids": None}, r"2 tables need ids \[T, 2\], got None"),
        ({"ids": torch.zeros(2, 2)}, "ids must be one of int64, int32, got float32"),
        ({"ids": None, "tables": []}, "nothing to embed"),
        (
            {"tables": [torch.ones(4, 8), torch.ones(2, 9)]},
            r"tables\[1\] must be \[V, D\] = \[any, 8\], got \[2, 9\]",
        ),
        ({"dense": torch.ones(3, 8)}, r"dense must be \[T, D\] = \[2, 8\], got \[3, 8\]"),
        ({"weight": torch.ones(9)}, r"weight must be \[D\] = \[8\], got \[9\]"),
        (
            {"weight": torch.ones(3, 8)},
            r"weight \[3, 8\] holds a row per norm: pass norm_ids \[T\] = \[2\], got None",
        ),
        (
            {"bias": torch.ones(3, 8)},
            r"bias \[3, 8\] holds a row per norm: pass norm_ids \[T\] = \[2\], got None",
        ),
        ({"norm_ids": torch.tensor([0, 1])}, r"norm_ids need weight \[N, D\] = \[any, 8\], got None"),
        (
            {"norm_ids": torch.tensor([0, 0]), "weight": torch.ones(8)},
            r"weight must be \[N, D\] with norm_ids = \[any, 8\], got \[8\]",
        ),
        (
            {"norm_ids": torch.tensor([0, 0]), "weight": torch.ones(2, 8), "bias": torch.ones(3, 8)},
            r"bias must be \[N, D\] with norm_ids = \[2, 8\], got \[3, 8\]",
        ),
        (
            {"norm_ids": torch.tensor([0, 2]), "weight": torch.ones(2, 8)},
            r"norm_ids \(rows of weight, or -1\) must lie in \[-1, 2\), got values from 0 to 2",
        ),
        (
            {"norm_ids": torch.tensor([0]), "weight": torch.ones(2, 8)},
            r"norm_ids must be \[T\] = \[2\], got \[1\]",
        ),
        (
            {"norm_ids": torch.tensor([0.0, 1.0]), "weight": torch.ones(2, 8)},
            "norm_ids must be one of int64, int32, got float32",
        ),
        (
            {"norm_ids": torch.tensor([0, 1]), "weight": torch.ones(2, 8, dtype=torch.float16)},
            "weight must be float32, got float16",
        ),
        ({"weight": torch.ones(8, device="meta")}, "all tensors must be on one device, got .* weight on meta"),
        ({"tables": [torch.ones(4, 8), torch.ones(2, 8).half()]}, r"tables\[1\] must be float32, got float16"),
        ({"layout": vk.SegmentLayout([[5]])}, "must have layout.num_tokens = 5 rows, got 2"),
        ({"layout": vk.SegmentLayout([[2]]).to("meta")}, "layout must be on the device of the tables, cpu, got meta"),
    ],
)
def test_errors_name_the_argument_and_the_values(change, message):
    arguments = {
        "ids": torch.tensor([[0, 0], [3, 1]]),
        "tables": [torch.ones(4, 8), torch.ones(2, 8)],
        "weight": None,
    } | change
    with pytest.raises(ValueError, match=message):
        vk.embed_layer_norm(**arguments)


@needs_kernel
@pytest.mark.parametrize(
    "ids, weight, norm_ids, message",
    [
        ([[7]], None, None, r"ids\[:, 0\] must be -1 or below 4, got 7"),
        ([[-100]], None, None, r"ids\[:, 0\] must be -1 or below 4, got -100"),
        ([[3]], torch.ones(2, 8), [2], "norm_ids must be -1 or below 2, got 2"),
        ([[3]], torch.ones(2, 8), [-2], "norm_ids must be -1 or below 2, got -2"),
        ([[3]], torch.ones(2, 8), [1, 1], "norm_ids must have 1 elements, got 2"),
        ([[3]], torch.ones(8), [0], r"norm_ids need a weight \[norms, width\]"),
        ([[3]], torch.ones(2, 8), None, "weight must have 8 elements, got 16"),
    ],
)
def test_the_kernel_itself_refuses_to_read_foreign_memory(ids, weight, norm_ids, message):
    """Compiled graphs skip the checks of values."""
    ids, norm_ids = (t if t is None else torch.tensor(t, dtype=torch.int32) for t in (ids, norm_ids))
    arguments = (ids, [torch.ones(4, 8)], None, weight, None, norm_ids, None, None, 0, 0, 1e-5)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vlkernels.embed_layer_norm_forward(*arguments)


@needs_kernel
@pytest.mark.parametrize(
    "dy, weight, bias, message",
    [
        (torch.ones(8), None, None, r"rows must be \[rows, width\], got 1 dimensions"),
        (torch.ones(8, 8), torch.ones(8), torch.ones(1), "parameter must have 8 elements, got 1"),
        (torch.ones(8, 8), torch.ones(7), None, "weight must have 8 elements, got 7"),
    ],
)
def test_the_kernels_backward_refuses_to_touch_foreign_memory(dy, weight, bias, message):
    ids, statistics = torch.zeros(8, 1, dtype=torch.int32), torch.ones(8)
    where = statistics, statistics, ids, [torch.ones(4, 8)], None
    with pytest.raises(RuntimeError, match=message):
        torch.ops.vlkernels.embed_layer_norm_backward(dy, *where, weight, bias, None, None, None, 0, 0)


@needs_kernel
def test_more_ids_than_can_be_sorted_are_refused():
    ids, gradient = (sparse(2**31, 1, dtype) for dtype in (torch.int32, torch.bfloat16))
    with pytest.raises(RuntimeError, match="ids must be at most 2147483647, got 2147483648"):
        torch.ops.vlkernels.embed_layer_norm_tables_backward(gradient, ids, [0], [600_000])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_table_may_have_no_rows_and_what_is_not_chosen_adds_nothing(impl):
    """Computed rows: a batch of captions alone has none, and a NaN among them stays where it is chosen."""
    ids, tables, weight = make(rows=6, sizes=(9,))
    expected = vk.embed_layer_norm(ids, tables, weight, impl=impl)
    for rows in (torch.empty(0, 40), torch.full((3, 40), torch.nan)):
        rows.requires_grad_()
        both = torch.cat((ids, torch.full_like(ids, -1)), dim=1)
        found = vk.embed_layer_norm(both, [*tables, rows], weight, impl=impl)
        torch.testing.assert_close(found, expected)
        found.sum().backward()
        assert rows.grad.shape == rows.shape and not rows.grad.any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.tensor(0), [torch.randn(2, 4)], None), r"ids must be \[T, C\] = \[any, 1\], got \[\]"),
        ((torch.tensor([[0]]), [torch.tensor(1.0)], None), r"tables\[0\] must be \[V, D\] = \[any, any\], got \[\]"),
    ],
)
def test_scalars_get_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        vk.embed_layer_norm(*arguments)
