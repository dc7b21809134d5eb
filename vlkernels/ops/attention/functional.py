"""``vk.attention`` and ``vk.attention_qkvpacked``: checks, the choice of implementation, the op and its backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vlkernels.core import checks, dispatch, library, native
from vlkernels.core.dispatch import Implementation
from vlkernels.core.layout import SegmentLayout, lasting
from vlkernels.core.mask import FULL, SegmentMask
from vlkernels.core.random import Rng, check_stream, dropout_threshold, resolve_rng
from vlkernels.core.triton_runtime import TritonImplementation
from vlkernels.ops.attention import reference
from vlkernels.ops.attention.bias import RelativeBias
from vlkernels.ops.attention.call import BIASES, SCHEMA, Call, split
from vlkernels.ops.attention.cpu import compiled, grouped
from vlkernels.ops.attention.flash import calls as flash, libraries
from vlkernels.ops.attention.gpu import launches

IMPLEMENTATIONS = (
    Implementation(
        "cpp",
        devices=("cpu",),
        available=functools.partial(native.missing, "attention_cpp_forward", "CPU"),
        supports=compiled.refusal,
    ),
    # It reads the lengths on the host, which only on a CPU costs nothing.
    Implementation("torch", devices=("cpu",)),
    TritonImplementation(supports=launches.refusal),
    Implementation(
        "flash",
        devices=("cuda",),
        available=libraries.missing,
        supports=flash.refusal,
        on_request=("cuda",),
    ),
    Implementation("reference"),
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SegmentLayout,
    mask: SegmentMask | None = None,
    kv_layout: SegmentLayout | None = None,
    kv_index: Tensor | None = None,
    bias: Tensor | RelativeBias | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Rng | None = None,
    stream: int = 0,
    deterministic: bool = True,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``out_i = sum_j P_ij v_j``, ``P_ij = exp(softmax_scale * q_i . k_j + bias_ij - lse_i)`` over the keys j that i may see.

    Example::

        >>> layout = vk.SegmentLayout([[3, 5], [2, 4]])             # two samples: image then text
        >>> q, k, v = torch.randn(3, 14, 2, 8).unbind()
        >>> out = vk.attention(q, k, v, layout=layout, mask=vk.SegmentMask.prefix_lm())
        >>> first = [x[:8].transpose(0, 1) for x in (q, k, v)]
        >>> visible = torch.ones(8, 8).tril().bool()
        >>> visible[:, :3] = True
        >>> expected = torch.nn.functional.scaled_dot_product_attention(*first, attn_mask=visible)
        >>> torch.testing.assert_close(out[:8], expected.transpose(0, 1))

    Args:
        q: ``[Tq, H, K]``, the packed tokens of ``layout``; float64, float32, bfloat16 or float16.
        k, v: ``[Tk, Hkv, K]`` in the dtype of ``q``; query head h reads key head ``h // (H / Hkv)``. Only the last dimension
            of q, k, v need be contiguous (else they are copied): views of a fused projection are read in place.
        layout: where the segments of each sample lie.
        mask: which query segment sees which key segment; ``None`` is full.
        kv_layout: the layout of k and v when they are another stream (cross-attention); sample b reads sample b.
        kv_index: integer ``[B]``: sample b reads key sample ``kv_index[b]`` instead. Several may read the same one; its
            gradient is their sum.
        bias: ``[B or 1, H or 1, Lq, Lk]`` added to the scores, by position in the samples, at least ``max_seqlen`` long on
            either side; -inf hides a key. Or a :class:`RelativeBias` on the tokens of ``layout`` (and ``kv_layout``).
        softmax_scale: a number, by default ``1 / sqrt(K)``.
        dropout_p: probability that an element of P is dropped, rounded to 1/256. No mask is stored.
        rng: state of the dropout; ``None`` draws one from PyTorch's generator. It must not advance before the backward.
            Draws are keyed by (stream, sample id, position in the sample, key's position in its sample, head).
        stream: constant of this call site: different streams drop different elements.
        deterministic: the same bits in every run. Every implementation here is; ``False`` lets a faster one serve.
        return_lse: also return ``lse [H, Tq]``, the natural logarithm of the sum of exponentials, float32 (float64 for
            float64), differentiable: partial results over disjoint keys combine through it.
        impl: ``"auto"``, ``"cpp"``, ``"torch"``, ``"triton"``, ``"flash"`` (flash-attn's kernels, or PyTorch's) or ``"reference"``.

    Returns:
        ``out`` like ``q``, or ``(out, lse)``. A query that sees nothing, or a row that belongs to nobody, gives out 0,
        lse -inf and gradients 0.

    Gradients: to q, k, v and bias (or its tables); a key that several samples read gets their sum. The backward has no
        derivative of its own except on the reference.

    Numerics: scores, softmax and sums are float32 for the half types, float64 for float64.

    Memory: the backward keeps q, k, v, lse and, unless ``"cpp"`` serves, out, and computes P again: no ``[L, L]`` array
        outlives a step (one does on the reference).

    Errors: ``ValueError`` for shapes, dtypes, devices or tables that do not fit and for ``dropout_p`` outside [0, 1).

    Source: Dao, "FlashAttention-2", 2023, for the backward from lse.
    """
    _check_kinds(layout, mask, kv_layout, bias)
    checks.check_floating("q", q)
    checks.check_shape("q", q, "[Tq, H, K]", (layout.num_tokens, None, None))
    keys = layout if kv_layout is None else kv_layout
    width = q.shape[2]
    _check_width(width)
    for name, x in (("k", k), ("v", v)):
        checks.check_shape(name, x, "[Tk, Hkv, K]", (keys.num_tokens, k.shape[1] if k.dim() == 3 else None, width))
        checks.check_dtype(name, x, (q.dtype,))
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the heads of q must be a multiple of those of k, got H = {q.shape[1]}, Hkv = {k.shape[1]}")
    checks.check_same_device(q=q, k=k, v=v, bias=_located(bias), layout=layout.starts, kv_layout=keys.starts, kv_index=kv_index)
    _check_samples(layout, kv_layout, kv_index)
    return _attend(
        [q, k, v], layout, mask, kv_layout, kv_index, bias, softmax_scale, dropout_p, rng, stream, deterministic, return_lse, impl
    )


def attention_qkvpacked(
    qkv: Tensor,
    *,
    layout: SegmentLayout,
    mask: SegmentMask | None = None,
    bias: Tensor | RelativeBias | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng: Rng | None = None,
    stream: int = 0,
    deterministic: bool = True,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` of ``q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]`` with one gradient: no split, no cat.

    Example::

        >>> layout = vk.SegmentLayout([[4], [7]])
        >>> qkv = torch.randn(11, 3, 2, 8)
        >>> torch.testing.assert_close(vk.attention_qkvpacked(qkv, layout=layout), vk.attention(*qkv.unbind(1), layout=layout))

    Args:
        qkv: ``[T, 3, H, K]``, the output of a fused projection; only the last dimension need be contiguous (else it is copied).

    The other arguments are those of :func:`attention`.

    Returns: as :func:`attention`.

    Gradients: to qkv, in one tensor of its shape, and to bias.

    Numerics: as :func:`attention`.

    Memory: as :func:`attention`.

    Errors: ``ValueError`` for what :func:`attention` refuses and a qkv that is not ``[T, 3, H, K]``.

    Source: as :func:`attention`.
    """
    _check_kinds(layout, mask, None, bias)
    checks.check_floating("qkv", qkv)
    checks.check_shape("qkv", qkv, "[T, 3, H, K]", (layout.num_tokens, 3, None, None))
    _check_width(qkv.shape[3])
    checks.check_same_device(qkv=qkv, bias=_located(bias), layout=layout.starts)
    return _attend([qkv], layout, mask, None, None, bias, softmax_scale, dropout_p, rng, stream, deterministic, return_lse, impl)


def _attend(
    qkv: list[Tensor],
    layout: SegmentLayout,
    mask: SegmentMask | None,
    kv_layout: SegmentLayout | None,
    kv_index: Tensor | None,
    bias: Tensor | RelativeBias | None,
    softmax_scale: float | None,
    dropout_p: float,
    rng: Rng | None,
    stream: int,
    deterministic: bool,
    return_lse: bool,
    impl: str,
) -> Tensor | tuple[Tensor, Tensor]:
    q = split(qkv)[0]
    keys = layout if kv_layout is None else kv_layout
    if mask is not None:
        mask.check(layout, kv_layout)
    kind = _check_bias(bias, q, layout, keys)
    if isinstance(softmax_scale, Tensor):
        raise ValueError("softmax_scale must be a number, got a Tensor: multiply q by one that is learned")
    if dropout_p:
        checks.check_probability("dropout_p", dropout_p)
    check_stream(stream)
    op = "attention" if len(qkv) == 3 else "attention_qkvpacked"
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    facts = {
        "dtype": q.dtype,
        "head_dim": q.shape[2],
        "keys": keys.max_seqlen,
        "bias": kind,
        "softmax_scale": scale,
        "deterministic": deterministic,
        "dropout": dropout_threshold(dropout_p) > 0,
        "table": flash.full_table(layout, keys) if mask is None else mask.codes,
        "aligned": kv_layout is None and kv_index is None,
        "shared_keys": kv_index is not None,
        "grouped": len(qkv) == 3 and qkv[0].shape[1] != qkv[1].shape[1],
        "lse_gradient": return_lse and torch.is_grad_enabled() and any(x.requires_grad for x in qkv),
    }
    impl = dispatch.resolve(op, impl, IMPLEMENTATIONS, q.device, facts)
    if impl == "reference":
        return reference.attention(
            *split(qkv), layout=layout, mask=mask, kv_layout=kv_layout, kv_index=kv_index, bias=bias,
            softmax_scale=softmax_scale, dropout_p=dropout_p, rng=rng, stream=stream, return_lse=return_lse,
        )  # fmt: skip
    qkv = [x if x.stride(-1) == 1 else x.contiguous() for x in qkv]
    if impl == "flash":
        return flash.attention(
            *split(qkv), layout=layout, mask=mask, kv_layout=kv_layout, kv_index=kv_index, softmax_scale=softmax_scale,
            deterministic=deterministic, return_lse=return_lse,
        )  # fmt: skip
    table = _full_table(layout.num_segments * keys.num_segments, q.device) if mask is None else mask.table(q.device)
    state = resolve_rng(rng, q.device) if dropout_threshold(dropout_p) else None
    kv_starts, kv_lengths = (None, None) if kv_layout is None else (kv_layout.starts, kv_layout.lengths)
    kv_index = None if kv_index is None else kv_index.contiguous()
    rows = qkv, layout.starts, layout.lengths, kv_starts, kv_lengths, kv_index
    if impl == "cpp":
        threshold = dropout_threshold(dropout_p)
        out, lse = compiled.attend(*rows, table, layout.sample_ids, state, scale, threshold, stream)
    else:
        longest = max(layout.max_seqlen, keys.max_seqlen)
        biases, radius = _bias_inputs(bias, q)
        call = Call(*rows, table, *biases, layout.sample_ids, state, scale, dropout_p, stream, longest, radius)
        out, lse = _differentiable(*call, impl)
    return (out, lse) if return_lse else out


def _full_table(cells: int, device: torch.device) -> Tensor:
    # One tensor for all calls: the layers of a model then share the work list that was made from it.
    return _new_full_table(cells, device) if torch.compiler.is_compiling() else _kept_full_table(cells, device)


def _new_full_table(cells: int, device: torch.device) -> Tensor:
    return torch.full((cells,), FULL, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=64)
def _kept_full_table(cells: int, device: torch.device) -> Tensor:
    return lasting(lambda: _new_full_table(cells, device))


def _check_kinds(layout: Any, mask: Any, kv_layout: Any, bias: Any) -> None:
    layouts = ("layout", layout, SegmentLayout), ("kv_layout", kv_layout, SegmentLayout)
    for name, value, kind in (*layouts, ("mask", mask, SegmentMask)):
        if not isinstance(value, kind) and (value is not None or name == "layout"):
            raise ValueError(f"{name} must be a {kind.__name__}, got a {type(value).__name__}")
    if bias is not None and not isinstance(bias, (Tensor, RelativeBias)):
        raise ValueError(f"bias must be a Tensor or a RelativeBias, got a {type(bias).__name__}")


def _check_width(width: int) -> None:
    if width == 0:
        raise ValueError("the heads must have a width K of at least 1, got 0")


def _check_samples(layout: SegmentLayout, kv_layout: SegmentLayout | None, kv_index: Tensor | None) -> None:
    keys = layout if kv_layout is None else kv_layout
    if kv_index is None:
        if keys.num_samples != layout.num_samples:
            raise ValueError(
                f"kv_layout must have the samples of layout, B = {layout.num_samples}, got {keys.num_samples}: pass kv_index"
            )
        return
    checks.check_integer("kv_index", kv_index)
    checks.check_shape("kv_index", kv_index, "[B]", (layout.num_samples,))
    checks.check_values_between("kv_index", kv_index, 0, keys.num_samples)


def _located(bias: Tensor | RelativeBias | None) -> Tensor | None:
    """A tensor on the device of the bias."""
    return bias.coordinates if isinstance(bias, RelativeBias) else bias


def _check_bias(bias: Tensor | RelativeBias | None, q: Tensor, layout: SegmentLayout, keys: SegmentLayout) -> str | None:
    """Raise unless the bias fits; its kind, ``"tensor"``, ``"relative"`` or ``None``."""
    if bias is None:
        return None
    if isinstance(bias, RelativeBias):
        _check_relative_bias(bias, q, layout, keys)
        return "relative"
    checks.check_floating("bias", bias)
    fits = bias.dim() == 4 and bias.shape[0] in (1, layout.num_samples) and bias.shape[1] in (1, q.shape[1])
    if not fits or bias.shape[2] < layout.max_seqlen or bias.shape[3] < keys.max_seqlen:
        wanted = f"[{layout.num_samples} or 1, {q.shape[1]} or 1, >= {layout.max_seqlen}, >= {keys.max_seqlen}]"
        raise ValueError(f"bias must be [B or 1, H or 1, Lq, Lk] = {wanted}, got {list(bias.shape)}")
    return "tensor"


def _check_relative_bias(bias: RelativeBias, q: Tensor, layout: SegmentLayout, keys: SegmentLayout) -> None:
    if bias.is_stale():
        raise ValueError("the tables of bias have changed since it was made: make a RelativeBias in every forward pass")
    if bias.num_heads != q.shape[1]:
        raise ValueError(f"the tables of bias must have the heads of q, H = {q.shape[1]}, got {bias.num_heads}")
    checks.check_shape("coordinates of bias", bias.coordinates, "[Tq, C]", (layout.num_tokens, None))
    of_keys = "coordinates" if bias.kv_coordinates is None else "kv_coordinates"
    checks.check_shape(f"{of_keys} of bias", getattr(bias, of_keys), "[Tk, C]", (keys.num_tokens, None))


_Biases = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _bias_inputs(bias: Tensor | RelativeBias | None, q: Tensor) -> tuple[_Biases, int]:
    """The raw op's (bias, distance_bias, coordinates, kv_coordinates), and its radius."""
    if not isinstance(bias, RelativeBias):
        return (bias, None, None, None), 0
    distance_bias = bias.distance_bias.to(torch.promote_types(q.dtype, torch.float32))
    return (None, distance_bias, bias.coordinates, bias.kv_coordinates), bias.radius


def _forward_fake(qkv: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    q = split(qkv)[0]
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool, *inputs: Any
) -> list[Tensor]:
    call = Call(*inputs[:-1])
    wanted = [*call.qkv, *_biases(call)] if bias_grad else call.qkv
    return [x.new_empty(x.shape) for x in wanted]


def _biases(call: Call) -> list[Tensor]:
    return [call[i] for i in BIASES if call[i] is not None]


_forward = library.define(
    f"attention_forward({SCHEMA}, str impl) -> (Tensor, Tensor)",
    fake=_forward_fake,
    kernels={"torch": grouped.forward, "triton": launches.forward},
)
# ``bias_grad``: the gradient of the bias that was given follows those of qkv.
_backward = library.define_backward(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool bias_grad, {SCHEMA}, str impl) -> Tensor[]",
    fake=_backward_fake,
    kernels={"torch": grouped.backward, "triton": launches.backward},
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, *rest = inputs
    tensors = rest[:_TENSORS]
    ctx.save_for_backward(*qkv, *tensors, *output)
    ctx.members = len(qkv)
    ctx.options = rest[_TENSORS:]
    ctx.set_materialize_grads(False)


# Of the inputs after qkv, how many are tensors: they come first.
_TENSORS = Call._fields.index("softmax_scale") - 1


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    qkv, tensors, (out, lse) = list(saved[: ctx.members]), saved[ctx.members : -2], saved[-2:]
    wanted = [i for i in BIASES if ctx.needs_input_grad[i]]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grad_lse = None if grad_lse is None else grad_lse.masked_fill(lse == -torch.inf, 0)  # of a constant
    found = _backward(grad_out, grad_lse, out, lse, bool(wanted), qkv, *tensors, *ctx.options)
    grads: list[Any] = [None] * (len(Call._fields) + 1)
    grads[0] = list(found[: ctx.members])
    if wanted:
        grads[wanted[0]] = found[-1]
    return tuple(grads)


_differentiable = library.differentiable(_forward, setup_context=_setup_context, backward=_differentiate)
