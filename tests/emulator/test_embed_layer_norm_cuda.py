"""The CUDA kernels of embed_layer_norm, run thread by thread on the CPU from the sources and by the plan of the launcher."""

import pytest
import torch

import vlkernels as vk
from tests import emulated
from tests.emulated import embed_layer_norm as emulated_op
from tests.norm_cases import WIDTHS
from tests.norm_cases import normed_embedding as whole
from vlkernels.core import dispatch
from vlkernels.core.random import dropout_scale, keep_mask
from vlkernels.core.spec import Case
from vlkernels.ops.embed_layer_norm import functional
from vlkernels.ops.embed_layer_norm.spec import SPECS
from vlkernels.testing import contract

pytestmark = pytest.mark.skipif(emulated.refusal() is not None, reason=str(emulated.refusal()))
SPEC = SPECS[0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def emulator(monkeypatch):
    with emulated_op.serving(monkeypatch):
        module = emulated_op.kernels()
        yield module
        module.run_in_order()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
def test_contract(case, dtype):
    contract.verify(SPEC, case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [*WIDTHS, 2056, 4100, 8192, 16383])
def test_every_width(width, dtype):
    contract.verify(SPEC, whole(2 if width > 1024 else 13, width), dtype, "cuda")


@pytest.mark.parametrize("rows", [0, 1, 2, 31, 1087])
def test_any_number_of_rows(rows):
    contract.verify(SPEC, whole(rows, 24, None), torch.bfloat16, "cuda")


@pytest.mark.parametrize("tables", [7, 16])
def test_as_many_tables_as_there_are(tables):
    """LayoutLM's seven, of one norm; and as many as a warp has lanes for."""

    def make(fill):
        arguments = whole(50, 40, sizes=range(2, 2 + tables)).make(fill)
        weight, bias = fill.normal(40), fill.normal(40)
        return {name: a for name, a in arguments.items() if name != "norm_ids"} | {"weight": weight, "bias": bias}

    contract.verify(SPEC, Case("tables", make), torch.float32, "cuda")


def ids_of(rows, kind, table_rows=5000):
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(-1, table_rows, (rows,), generator=generator)
    if kind == "one row":
        return torch.full((rows,), table_rows - 3)
    if kind == "few rows":
        return ids.clamp(max=1)
    if kind == "a row that fills most of the batch":
        return torch.where(torch.rand(rows, generator=generator) < 0.9, 103, ids)
    return ids


@pytest.mark.parametrize("rows", [1, 32, 33, 700, 2500])
@pytest.mark.parametrize("kind", ["spread", "one row", "few rows", "a row that fills most of the batch", "nobody's"])
def test_a_table_row_is_the_sum_of_its_tokens(kind, rows):
    """Small integers: every order of addition gives the same sums. Rows of more tokens than a chunk, and none at all."""
    ids = torch.stack((ids_of(rows, kind), ids_of(rows, "spread", 3)), dim=1)
    if kind == "nobody's":
        ids[:] = -1
    gradient = torch.randint(-8, 9, (rows, 24), generator=torch.Generator().manual_seed(0)).float()
    found = emulated_op.tables_backward(gradient, ids, [0, 1], [5000, 3])
    for column, table in enumerate(found):
        used = ids[:, column] >= 0
        expected = torch.zeros_like(table).index_add_(0, ids[used, column], gradient[used])
        assert torch.equal(table, expected)


def test_a_row_used_once_gets_its_gradient_bit_for_bit():
    gradient, ids = torch.randn(40, 96).bfloat16(), torch.randperm(900)[:40].int()[:, None]
    (table,) = emulated_op.tables_backward(gradient, ids, [0], [900])
    assert torch.equal(table, torch.zeros(900, 96).bfloat16().index_copy_(0, ids[:, 0].long(), gradient))


def test_a_token_that_fills_the_batch_loses_nothing_in_half_precision():
    gradient = torch.randn(24).bfloat16().expand(2000, 24).contiguous()
    (table,) = emulated_op.tables_backward(gradient, torch.zeros(2000, 1, dtype=torch.int64), [0], [2])
    torch.testing.assert_close(table[0].float(), 2000 * gradient[0].float(), rtol=0.005, atol=0)
    assert not table[1].any()


def test_ids_of_either_dtype_give_the_same_bits():
    case = whole(40, 48)
    arguments = [case.make(contract.InputMaker(torch.float32)) for _ in range(2)]
    arguments[1] |= {name: arguments[1][name].int() for name in ("ids", "norm_ids")}
    outputs = [vk.embed_layer_norm(**a, impl="cuda") for a in arguments]
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(y.square().sum(), (*a["tables"], a["weight"])) for y, a in zip(outputs, arguments)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("rows, width", [(150, 24), (5, 264), (5, 1512), (3, 4104)])
def test_the_order_of_threads_does_not_change_a_bit(emulator, rows, width, seed):
    case = whole(rows, width, sizes=(300, 3))
    in_order = contract.run(SPEC.functional, case, torch.float32, impl="cuda")
    emulator.shuffle(seed)
    shuffled = contract.run(SPEC.functional, case, torch.float32, impl="cuda")
    for name, tensor in in_order.named().items():
        assert torch.equal(tensor, shuffled.named()[name]), name


@pytest.mark.parametrize("shift", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_that_begins_off_a_boundary(dtype, shift):
    """Such rows are served column by column."""

    def moved(tensor):
        room = torch.empty(tensor.numel() + shift, dtype=tensor.dtype)
        room[shift:] = tensor.detach().flatten()
        return room[shift:].view(tensor.shape).requires_grad_(tensor.requires_grad)

    def make(fill):
        arguments = whole(4, 768).make(fill)
        return arguments | {"tables": [moved(t) for t in arguments["tables"]], "bias": moved(arguments["bias"])}

    contract.verify(SPEC, Case("moved", make), dtype, "cuda")


def test_rows_that_lie_apart():
    words, dense = torch.randn(9, 100)[:, 10:58], torch.randn(48, 6).t()
    ids = torch.randint(0, 9, (6, 3))[:, 1:2]
    expected = vk.embed_layer_norm(ids, [words], None, dense=dense, impl="reference")
    torch.testing.assert_close(vk.embed_layer_norm(ids, [words], None, dense=dense, impl="cuda"), expected)


@pytest.mark.parametrize("width", [64, 77, 16384])
def test_dropout_is_the_core_mask(width):
    rows, p, stream = 3, 0.3, 9
    rng = vk.Rng(77)
    rng.advance(3)
    dense, bias = torch.randn(rows, width), torch.ones(width, requires_grad=True)
    y = vk.embed_layer_norm(
        None, [], torch.zeros(width), bias=bias, dense=dense, dropout_p=p, rng=rng, stream=stream, impl="cuda"
    )
    kept = keep_mask(rng.state, stream, 0, torch.arange(rows)[:, None], torch.arange(width), p)
    assert torch.equal(y, kept * dropout_scale(p))
    (gradient,) = torch.autograd.grad(y.sum(), bias)
    torch.testing.assert_close(gradient, (kept * dropout_scale(p)).sum(0))


def test_backward_twice():
    ids, tables = torch.randint(0, 5, (70, 2)), [torch.randn(5, 40, requires_grad=True) for _ in range(2)]
    loss = vk.embed_layer_norm(ids, tables, None, dropout_p=0.2, rng=vk.Rng(3), impl="cuda").square().sum()
    first, second = (torch.autograd.grad(loss, tables, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(
    "ids, norm_ids, message",
    [
        ([[0, 4]], [0], "ids of embed_layer_norm must be -1 or rows of their tables"),
        ([[-2, 0]], [0], "ids of embed_layer_norm must be -1 or rows of their tables"),
        ([[0, 0]], [2], "norm_ids of embed_layer_norm must be -1 or rows of weight"),
        ([[0, 0]], [-2], "norm_ids of embed_layer_norm must be -1 or rows of weight"),
    ],
)
def test_the_kernels_read_no_foreign_memory(ids, norm_ids, message):
    """Neither compiled graphs nor a card have a host that looks at values."""
    tables, weight = [torch.randn(4, 8), torch.randn(4, 8)], torch.randn(2, 8)
    with pytest.raises(RuntimeError, match=message):
        emulated_op.forward(torch.tensor(ids), tables, None, weight, None, torch.tensor(norm_ids), None, None, 0, 0, 1e-5)


def test_the_emulator_is_what_serves(emulator, monkeypatch):
    dense = torch.randn(4, 24)
    with dispatch.recorded() as served:
        vk.embed_layer_norm(None, [], None, dense=dense)
    assert served == [("embed_layer_norm", "cuda")]
    assert (emulator.widest_row, emulator.most_tables) == (functional.WIDEST_CUDA_ROW, functional.MOST_CUDA_TABLES)
    monkeypatch.setattr(emulated_op, "kernels", lambda: pytest.fail("called"))
    with pytest.raises(pytest.fail.Exception, match="called"):
        vk.embed_layer_norm(None, [], None, dense=dense)


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"width": 16385}, "serves D up to 16,384, the rows have D = 16,385"),
        ({"tables": 17}, "serves up to 16 tables, got 17"),
        ({"rows": 2**30}, "up to 2,147,483,647 ids and rows of tables, got 1,073,741,824 rows of 2 ids"),
        ({"table_rows": 2**31}, "up to 2,147,483,647 ids and rows of tables"),
        ({"dtype": torch.float64}, "it computes in float32, the data is torch.float64"),
    ],
)
def test_what_cuda_does_not_serve_is_said_in_a_line(facts, message):
    served = {"dtype": torch.float32, "width": 16384, "rows": 2**30 - 1, "tables": 2, "table_rows": 2**31 - 1}
    assert functional._cuda_supports(served) is None
    assert message in functional._cuda_supports(served | facts)


@pytest.mark.parametrize("width", [1024, 16384])
def test_more_elements_than_31_bits_count(emulator, width):
    """In a table and in the rows."""
    rows = 2**31 // width + 5
    table, dy, dz = (emulated.sparse(rows, width, torch.bfloat16) for _ in range(3))
    y = emulated.sparse(rows, width, torch.bfloat16)
    table[-1], dy[-1] = torch.randn(2, width).unbind()
    ids, mean, rstd = torch.full((rows, 1), rows - 1, dtype=torch.int32), torch.zeros(rows), torch.zeros(rows)
    call = emulated.fields(
        dtype=table.dtype, width=width, rows=rows, eps=1e-5, tables=[table.data_ptr()], table_rows=[rows], ids=ids, y=y,
        mean=mean, rstd=rstd, dy=dy, dz=dz, norms=1,
    )  # fmt: skip
    per_block = 4 if width == 1024 else 1
    emulator.only_blocks((rows - 1) // per_block, rows)
    emulator.forward(call)
    wide = table[-1].float().requires_grad_()
    expected = torch.nn.functional.layer_norm(wide, (width,))
    torch.testing.assert_close(y[-1], expected.detach().bfloat16())

    blocks = emulator.partial_rows(call)
    emulator.only_blocks((rows - 1) // per_block % blocks, (rows - 1) // per_block % blocks + 1)
    partials = torch.empty(blocks, 2, width)
    emulator.backward(call | emulated.fields(partials=partials))
    expected.backward(dy[-1].float())
    torch.testing.assert_close(dz[-1], wide.grad.bfloat16(), rtol=2e-2, atol=2e-2)


def test_the_gradient_of_a_table_of_more_elements_than_31_bits_count(emulator):
    """And so many tokens. Of each kernel the blocks that see the last row, one kernel after another."""
    width, rows = 16384, 2**31 // 16384 + 5
    gradient, table = (emulated.sparse(rows, width, torch.bfloat16) for _ in range(2))
    gradient[-2:] = torch.randint(-8, 9, (2, width)).bfloat16()
    ids = torch.full((rows, 1), -1)
    ids[-2:] = rows - 1
    call = emulated.fields(
        dtype=gradient.dtype, tokens=rows, width=width, id_stride=1, ids=ids, wide_ids=True, gradient=gradient, columns=[0],
        table_rows=[rows], tables=[table.data_ptr()],
    )  # fmt: skip
    integers, floats = emulator.table_workspace(call)
    workspace, partials = torch.zeros(integers, dtype=torch.int32), torch.empty(floats)
    call |= emulated.fields(integers=workspace, partials=partials)
    for first, last in ((0, 65), (rows // 256, rows // 256 + 1), ((rows - 1) // 8, (rows - 1) // 8 + 1)):
        emulator.only_blocks(first, last)
        emulator.table_gradients(call)
    assert torch.equal(table[-1, :256], gradient[-2:, :256].sum(0)) and not table[-2].any()
