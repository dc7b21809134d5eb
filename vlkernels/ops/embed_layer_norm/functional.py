"""``vk.embed_layer_norm``: checks, the choice of implementation, the op and its backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlkernels.core import checks, dispatch, library, native
from vlkernels.core.dispatch import Facts, Implementation
from vlkernels.core.layout import SegmentLayout
from vlkernels.core.random import Rng, check_stream, dropout_threshold, resolve_rng
from vlkernels.ops.embed_layer_norm import reference

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


WIDEST_CUDA_ROW = 16_384  # csrc/primitives/row_plan.h
MOST_CUDA_TABLES = 16  # csrc/embed_layer_norm/embed_layer_norm.h
MOST_CUDA_IDS = 2**31 - 1  # positions in their sorted order are int32


def _kernel_supports(facts: Facts) -> str | None:
    if facts["dtype"] not in KERNEL_DTYPES:
        return f"it computes in float32, the data is {facts['dtype']}"
    return None


def _cuda_supports(facts: Facts) -> str | None:
    if facts["width"] > WIDEST_CUDA_ROW:
        return f"it serves D up to {WIDEST_CUDA_ROW:,}, the rows have D = {facts['width']:,}"
    if facts["tables"] > MOST_CUDA_TABLES:
        return f"it serves up to {MOST_CUDA_TABLES} tables, got {facts['tables']}"
    if facts["rows"] * facts["tables"] > MOST_CUDA_IDS or facts["table_rows"] > MOST_CUDA_IDS:
        return f"it serves up to {MOST_CUDA_IDS:,} ids and rows of tables, got {facts['rows']:,} rows of {facts['tables']} ids"
    return _kernel_supports(facts)


IMPLEMENTATIONS = (
    Implementation(
        "cuda",
        devices=("cuda",),
        available=functools.partial(native.missing, "embed_layer_norm_forward", "CUDA"),
        supports=_cuda_supports,
    ),
    Implementation(
        "cpp",
        devices=("cpu",),
        available=functools.partial(native.missing, "embed_layer_norm_forward", "CPU"),
        supports=_kernel_supports,
    ),
    Implementation("reference"),
)


def embed_layer_norm(
    ids: Tensor | None,
    tables: Sequence[Tensor],
    weight: Tensor | None,
    *,
    bias: Tensor | None = None,
    dense: Tensor | None = None,
    norm_ids: Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    layout: SegmentLayout | None = None,
    rng: Rng | None = None,
    stream: int = 0,
    impl: str = "auto",
) -> Tensor:
    """``y = dropout(LN(sum_c tables[c][ids[:, c]] + dense))``, rows in packed order, in one pass over memory.

    With ``norm_ids`` each row takes its own norm: ``y[t] = dropout(xhat[t] * weight[norm_ids[t]] +
    bias[norm_ids[t]])``, ``xhat = (z - mean(z)) / sqrt(var(z) + eps)``. So text rows, of words and positions,
    and region rows, of a table of computed rows, get their own norms in one call.

    Example:
        >>> import torch, vlkernels as vk
        >>> words, positions = torch.randn(50, 32), torch.randn(9, 32)
        >>> ids = torch.tensor([[7, 0], [49, 1], [3, 2], [-1, 3]])
        >>> weight, bias = torch.randn(32), torch.randn(32)
        >>> y = vk.embed_layer_norm(ids, (words, positions), weight, bias=bias, eps=1e-5)
        >>> z = torch.cat((words[[7, 49, 3]], torch.zeros(1, 32))) + positions[:4]
        >>> torch.testing.assert_close(y, torch.nn.functional.layer_norm(z, (32,), weight, bias))

        Text, text, region, text in one stream, with a norm for text and a norm for regions:

        >>> regions, norm_ids = torch.randn(1, 32), torch.tensor([0, 0, 1, 0])
        >>> ids = torch.tensor([[7, -1], [49, -1], [-1, 0], [3, -1]])
        >>> weight, bias = torch.randn(2, 32), torch.randn(2, 32)
        >>> y = vk.embed_layer_norm(ids, (words, regions), weight, bias=bias, norm_ids=norm_ids, eps=1e-5)
        >>> text = torch.nn.functional.layer_norm(words[[7, 49, 3]], (32,), weight[0], bias[0])
        >>> image = torch.nn.functional.layer_norm(regions, (32,), weight[1], bias[1])
        >>> torch.testing.assert_close(y, torch.cat((text[:2], image, text[2:])))

    Args:
        ids: ``[T, C]`` int32 or int64, a column per table; -1: that table adds nothing to the row. ``None``
            without tables.
        tables: C tensors ``[V_c, D]`` of one dtype: float32, bfloat16 or float16 (float64 on the reference).
            May be empty.
        weight, bias: ``[D]`` in the dtype of the tables or float32, or ``None`` (one and zero). With
            ``norm_ids`` ``[N, D]``, a row per norm; the bias may still be ``None``.
        dense: ``[T, D]`` in the dtype of the tables: projected patches or regions, rows of zeros elsewhere.
        norm_ids: ``[T]`` int32 or int64: the norm of every row, such as ``layout.token_segment()``; -1: the
            row is nobody's, its output and its gradients are zero. Meant for a few norms: the backward needs
            up to 64 partial rows of each.
        eps: added to the variance.
        dropout_p: probability that an element is dropped after the norm, as in BERT; rounded to 1/256. No
            mask is stored.
        layout: the rows are its tokens; dropout is keyed by sample id and position in the sample. Without it
            by sample 0 and the index of the row.
        rng: state of the dropout; ``None`` draws one from PyTorch's generator. It must not advance before the
            backward.
        stream: constant of this call site: different streams drop different elements.
        impl: ``"auto"``, ``"cuda"``, ``"cpp"`` or ``"reference"``.

    Returns:
        ``[T, D]`` in the dtype of the tables.

    Gradients: to the tables (dense), ``dense``, ``weight`` and ``bias``; the same bits in every run and for
        any number of threads, and on every card: a table row adds its tokens in packed order. The kernel's backward
        has no derivative of its own.
    Numerics: the sum, the statistics (two-pass variance), the norm and the tables' sums in float32.
    Memory: the backward keeps two floats per row and sums the embeddings again; dropout keeps nothing.
    Errors: ``ValueError`` where shapes, dtypes or devices disagree; on the CPU for an id outside [-1, V_c) or
        [-1, N), on a card a device-side assertion by the kernel; for ``norm_ids`` without ``weight`` ``[N, D]``, and
        the reverse.
    Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2018.
    """
    tables = list(tables)
    _check(ids, tables, weight, bias, dense, norm_ids, dropout_p, layout)
    check_stream(stream)
    like, rows = tables[0] if tables else dense, (ids if tables else dense).shape[0]
    facts = {
        "dtype": like.dtype,
        "width": like.shape[1],
        "rows": rows,
        "tables": len(tables),
        "table_rows": sum(table.shape[0] for table in tables),
    }
    served_by = dispatch.resolve("embed_layer_norm", impl, IMPLEMENTATIONS, like.device, facts)
    if served_by != "cuda" or like.device.type == "cpu":  # CUDA kernels look at ids themselves
        _check_values(ids, tables, weight, norm_ids)
    if served_by == "reference":
        return reference.embed_layer_norm(
            ids,
            tables,
            weight,
            bias=bias,
            dense=dense,
            norm_ids=norm_ids,
            eps=eps,
            dropout_p=dropout_p,
            layout=layout,
            rng=rng,
            stream=stream,
        )
    threshold = dropout_threshold(dropout_p)
    return _differentiable(
        ids.contiguous() if tables else None,
        [table.contiguous() for table in tables],
        None if dense is None else dense.contiguous(),
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        None if norm_ids is None else norm_ids.contiguous(),
        resolve_rng(rng, like.device) if threshold else None,
        layout.token_keys() if threshold and layout is not None else None,
        stream,
        threshold,
        eps,
    )[0]


def _check(
    ids: Tensor | None,
    tables: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    dense: Tensor | None,
    norm_ids: Tensor | None,
    dropout_p: float,
    layout: SegmentLayout | None,
) -> None:
    if not tables and dense is None:
        raise ValueError("there is nothing to embed: pass tables, dense, or both")
    if tables and ids is None:
        raise ValueError(f"{len(tables)} tables need ids [T, {len(tables)}], got None")
    name, symbols, like = ("tables[0]", "[V, D]", tables[0]) if tables else ("dense", "[T, D]", dense)
    checks.check_floating(name, like)
    checks.check_shape(name, like, symbols, (None, None))
    if tables:
        checks.check_integer("ids", ids)
        checks.check_shape("ids", ids, "[T, C]", (ids.shape[0] if ids.dim() else None, len(tables)))
    width, rows = like.shape[1], (ids if tables else dense).shape[0]
    for c, table in enumerate(tables):
        checks.check_shape(f"tables[{c}]", table, "[V, D]", (None, width))
        checks.check_dtype(f"tables[{c}]", table, (like.dtype,))
    if dense is not None:
        checks.check_shape("dense", dense, "[T, D]", (rows, width))
        checks.check_dtype("dense", dense, (like.dtype,))
    _check_norms(weight, bias, norm_ids, rows, like)
    named = {f"tables[{c}]": table for c, table in enumerate(tables)}
    named |= {"ids": ids if tables else None, "dense": dense, "norm_ids": norm_ids}
    checks.check_same_device(**named, weight=weight, bias=bias)
    checks.check_probability("dropout_p", dropout_p)
    if layout is not None and rows != layout.num_tokens:
        raise ValueError(f"ids and dense must have layout.num_tokens = {layout.num_tokens} rows, got {rows}")
    if layout is not None and layout.starts.device != like.device:
        raise ValueError(f"layout must be on the device of the tables, {like.device}, got {layout.starts.device}")


def _check_values(ids: Tensor | None, tables: list[Tensor], weight: Tensor | None, norm_ids: Tensor | None) -> None:
    for c in _suspicious_columns(ids, tables):
        checks.check_values_between(f"ids[:, {c}] (rows of tables[{c}], or -1)", ids[:, c], -1, tables[c].shape[0])
    if norm_ids is not None:
        checks.check_values_between("norm_ids (rows of weight, or -1)", norm_ids, -1, weight.shape[0])


def _check_norms(
    weight: Tensor | None, bias: Tensor | None, norm_ids: Tensor | None, rows: int, like: Tensor
) -> None:
    width = like.shape[1]
    if norm_ids is None:
        for name, parameter in (("weight", weight), ("bias", bias)):
            if parameter is not None and parameter.dim() == 2:
                raise ValueError(
                    f"{name} {list(parameter.shape)} holds a row per norm: "
                    f"pass norm_ids [T] = [{rows}], got None"
                )
        symbols, shape = "[D]", (width,)
    else:
        checks.check_integer("norm_ids", norm_ids)
        checks.check_shape("norm_ids", norm_ids, "[T]", (rows,))
        if weight is None:
            raise ValueError(f"norm_ids need weight [N, D] = [any, {width}], got None")
        symbols, shape = "[N, D] with norm_ids", (weight.shape[0] if weight.dim() == 2 else None, width)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            checks.check_shape(name, parameter, symbols, shape)
            checks.check_dtype(name, parameter, (like.dtype, torch.float32))


def _suspicious_columns(ids: Tensor | None, tables: list[Tensor]) -> Sequence[int]:
    """The columns of ``ids`` to be looked at one by one: on the CPU one pass clears them all."""
    if not tables or ids.numel() == 0 or torch.compiler.is_compiling():
        return ()
    if ids.device.type != "cpu":
        return range(len(tables))
    smallest, largest = (values.tolist() for values in ids.aminmax(dim=0))
    return [c for c, table in enumerate(tables) if smallest[c] < -1 or largest[c] >= table.shape[0]]


def _forward_fake(
    ids: Tensor | None,
    tables: list[Tensor],
    dense: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_ids: Tensor | None,
    rng_state: Tensor | None,
    keys: Tensor | None,
    stream: int,
    threshold: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    like = tables[0] if dense is None else dense
    rows = (ids if dense is None else dense).shape[0]
    mean = like.new_empty((rows,), dtype=torch.float32)
    return like.new_empty((rows, like.shape[1])), mean, torch.empty_like(mean)


def _backward_fake(
    dy: Tensor,
    mean: Tensor,
    rstd: Tensor,
    ids: Tensor | None,
    tables: list[Tensor],
    dense: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    sums = (mean.new_empty((0,)) if p is None else torch.empty_like(p) for p in (weight, bias))
    return torch.empty_like(dy), *sums


_forward = library.define(
    "embed_layer_norm_forward(Tensor? ids, Tensor[] tables, Tensor? dense, Tensor? weight, Tensor? bias, "
    "Tensor? norm_ids, Tensor? rng_state, Tensor? keys, SymInt stream, int threshold, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_forward_fake,
)
_backward = library.define_backward(
    "embed_layer_norm_backward(Tensor dy, Tensor mean, Tensor rstd, Tensor? ids, Tensor[] tables, "
    "Tensor? dense, Tensor? weight, Tensor? bias, Tensor? norm_ids, Tensor? rng_state, Tensor? keys, "
    "SymInt stream, int threshold) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
)
_table_gradients = library.define_backward(
    "embed_layer_norm_tables_backward(Tensor gradient, Tensor ids, int[] columns, SymInt[] table_rows) -> Tensor[]",
    fake=lambda gradient, ids, columns, table_rows: [gradient.new_empty((rows, gradient.shape[1])) for rows in table_rows],
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ids, tables, dense, weight, bias, norm_ids, rng_state, keys, stream, threshold, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(mean, rstd, ids, dense, weight, bias, norm_ids, rng_state, keys, *tables)
    ctx.stream, ctx.threshold = stream, threshold
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    mean, rstd, ids, dense, weight, bias, norm_ids, rng_state, keys, *tables = ctx.saved_tensors
    dz, dweight, dbias = _backward(
        dy.contiguous(),
        mean,
        rstd,
        ids,
        tables,
        dense,
        weight,
        bias,
        norm_ids,
        rng_state,
        keys,
        ctx.stream,
        ctx.threshold,
    )
    _, wants_tables, wants_dense, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    dtables: list[Tensor | None] = [None] * len(tables)
    columns = [c for c, wanted in enumerate(wants_tables) if wanted] if tables else []
    if columns:
        found = _table_gradients(dz, ids, columns, [tables[c].shape[0] for c in columns])
        for c, gradient in zip(columns, found, strict=True):
            dtables[c] = gradient
    return (
        None,
        dtables or None,
        dz if wants_dense else None,
        dweight if wants_weight else None,
        dbias if wants_bias else None,
        *[None] * 6,
    )


_differentiable = library.differentiable(_forward, setup_context=_setup_context, backward=_differentiate)
