"""What is special to embed_layer_norm; the generic contract is in test_contract.py."""

import pytest
import torch

import vlkernels as vk
from vlkernels.core import native
from vlkernels.core.random import dropout_scale, keep_mask

needs_kernel = pytest.mark.skipif(
    native.missing("embed_layer_norm_forward", "CPU") is not None, reason="no compiled library"
)
IMPLS = ["reference", pytest.param("cpp", marks=needs_kernel)]


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
def test_threads_do_not_change_a_bit():
    ids, tables, weight = make()
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = vk.embed_layer_norm(ids, tables, weight, impl="cpp")
            results.append((y, *torch.autograd.grad(y, (*tables, weight), torch.ones_like(y).cumsum(0))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@needs_kernel
def test_a_frozen_table_costs_no_gradient():
    ids, tables, weight = make()
    tables[0].requires_grad_(False)
    y = vk.embed_layer_norm(ids, tables, weight, impl="cpp")
    with torch.profiler.profile() as profile:
        y.sum().backward()
    calls = [event.name for event in profile.events() if event.name.endswith("table_backward")]
    assert len(calls) == 2 and tables[0].grad is None


@needs_kernel
def test_compiles_without_a_graph_break():
    def embed(ids, tables, weight, rng):
        return vk.embed_layer_norm(ids, tables, weight, dropout_p=0.1, rng=rng) * 2

    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5, 9):
        ids, tables, weight = make(rows, sizes=(30, 7))
        traced, eager = (f(ids, tables, weight, vk.Rng(2)) for f in (compiled, embed))
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
        ({"layout": vk.SegmentLayout([[5]])}, "must have layout.num_tokens = 5 rows, got 2"),
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
def test_the_kernel_itself_refuses_an_id_past_the_table():
    """Compiled graphs skip the checks of values, and must not read foreign memory."""
    arguments = (
        torch.tensor([[7]], dtype=torch.int32),
        [torch.ones(4, 8)],
        None,
        None,
        None,
        None,
        None,
        0,
        0,
        1e-5,
    )
    with pytest.raises(RuntimeError, match=r"ids\[:, 0\] must be below 4, got 7"):
        torch.ops.vlkernels.embed_layer_norm_forward(*arguments)


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
