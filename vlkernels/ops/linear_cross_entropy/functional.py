"""The linear cross-entropy as users call it: checks, choice of the implementation, differentiable ops."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlkernels.core import checks, dispatch, library, native
from vlkernels.core.dispatch import Facts, Implementation
from vlkernels.core.triton_runtime import TritonImplementation
from vlkernels.ops.linear_cross_entropy import cpu, reference, torch_kernels
from vlkernels.ops.linear_cross_entropy.call import saved_dtype
from vlkernels.ops.linear_cross_entropy.gpu import launches
from vlkernels.ops.linear_cross_entropy.reference import Teacher


def _without_teacher_in_float32(facts: Facts) -> str | None:
    if facts["teacher_dtype"] is not None:
        return "it has no teacher"
    return "it computes in float32, the inputs are float64" if facts["dtype"] == torch.float64 else None


IMPLEMENTATIONS = (
    TritonImplementation(supports=launches.refusal),
    Implementation(
        "cpp", devices=("cpu",), available=partial(native.missing, "classify"), supports=_without_teacher_in_float32
    ),
    Implementation("torch"),
    Implementation("reference"),
)
REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    teacher: Teacher | None = None,
    distillation: float = 0.0,
    temperature: float = 1.0,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of ``hidden weight^T + bias`` with ``targets``, without the [M, V] logits of all rows.

    Example:
        >>> import torch, torch.nn.functional as F, vlkernels as vk
        >>> hidden, weight, bias = torch.randn(6, 8), torch.randn(50, 8), torch.randn(50)
        >>> targets = torch.tensor([3, -100, 49, 0, -100, 7])
        >>> loss = vk.linear_cross_entropy(hidden, weight, targets, bias=bias)
        >>> torch.allclose(loss, F.cross_entropy(F.linear(hidden, weight, bias), targets), atol=1e-5)
        True

    Args:
        hidden: [M, D] floating.
        weight: [V, D], same dtype and device; any V.
        targets: integers [M] in [0, V), or ``ignore_index``: such rows have loss 0, gradient 0 and no part in
            the mean.
        bias: [V] floating.
        label_smoothing: e in [0, 1): targets are ``(1 - e) one-hot + e / V``.
        z_loss: adds ``z_loss * logsumexp(logits)^2`` to every row.
        teacher: ``(hidden, weight, bias or None)`` of a teacher over the same M rows and V entries; no
            gradient.
        distillation: a in [0, 1]: a row's loss is ``(1 - a) CE(target) + a t^2 CE(softmax(teacher / t),
            logits / t)``.
        temperature: t > 0.
        reduction: "mean" over rows that are not ignored (0 when all are), "sum" or "none" ([M]).
        impl: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        The loss in float32 (float64 for float64 inputs).

    Gradients: to hidden, weight and bias; with "mean" and "sum" computed in the forward, when anything
    requires them, and given away by the first backward; with "none", and in a second backward, the logits are
    computed again.
    Numerics: losses, and gradients of weight and bias over all rows, accumulate in float32 (float64 for
    float64).
    Memory: the gradients and one chunk of logits: 2^23 on a CPU, 2^25 elsewhere, 32 MiB in Triton.
    Errors: ``ValueError`` for shapes, dtypes, ranges, and targets outside [0, V) on a CPU (a device-side
    assertion on a GPU).
    Source: Hsu et al. 2024 (Liger) for gradients in the forward; Li et al. 2021 (ALBEF), Sanh et al. 2019 for
    the teacher.
    """
    _check(hidden, weight, targets, bias, label_smoothing, z_loss, distillation, temperature, reduction)
    _check_teacher(teacher, distillation, hidden, weight)
    if len(targets):
        live = torch.where(targets == ignore_index, 0, targets)
        checks.check_values_between("targets (ignore_index aside)", live, 0, weight.shape[0])
    teachers = (None, None, None) if teacher is None or distillation == 0 else teacher
    facts = {"dtype": hidden.dtype, "teacher_dtype": None if teachers[0] is None else teachers[0].dtype}
    chosen = dispatch.resolve("linear_cross_entropy", impl, IMPLEMENTATIONS, hidden.device, facts)
    if chosen == "reference":
        return reference.linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            teacher=teacher,
            distillation=distillation,
            temperature=temperature,
            reduction=reduction,
        )
    gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    )
    options = (ignore_index, float(label_smoothing), float(z_loss), float(distillation), float(temperature))
    in_forward = gradient and reduction != "none"
    return _loss(hidden, weight, bias, targets, *teachers, *options, reduction, in_forward, chosen)[0]


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    distillation: float,
    temperature: float,
    reduction: str,
) -> None:
    checks.check_shape("hidden", hidden, "[M, D]", (None, None))
    checks.check_floating("hidden", hidden)
    rows, width = hidden.shape
    checks.check_shape("weight", weight, "[V, D]", (None, width))
    checks.check_dtype("weight", weight, (hidden.dtype,))
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one row, got {list(weight.shape)}")
    checks.check_shape("targets", targets, "[M]", (rows,))
    checks.check_integer("targets", targets)
    if bias is not None:
        checks.check_shape("bias", bias, "[V]", (weight.shape[0],))
        checks.check_floating("bias", bias)
    checks.check_probability("label_smoothing", label_smoothing)
    if z_loss < 0:
        raise ValueError(f"z_loss must be at least 0, got {z_loss}")
    if not 0.0 <= distillation <= 1.0:
        raise ValueError(f"distillation must be in [0, 1], got {distillation}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got "{reduction}"')
    checks.check_same_device(hidden=hidden, weight=weight, targets=targets, bias=bias)


def _check_teacher(teacher: Teacher | None, distillation: float, hidden: Tensor, weight: Tensor) -> None:
    if teacher is None:
        if distillation > 0:
            raise ValueError(f"distillation = {distillation} needs a teacher: (hidden, weight, bias or None)")
        return
    if len(teacher) != 3:
        raise ValueError(f"teacher must be (hidden, weight, bias or None), got {len(teacher)} values")
    of_hidden, of_weight, of_bias = teacher
    checks.check_shape("the teacher's hidden", of_hidden, "[M, any]", (hidden.shape[0], None))
    checks.check_shape("the teacher's weight", of_weight, "[V, any]", (weight.shape[0], of_hidden.shape[1]))
    checks.check_floating("the teacher's hidden", of_hidden)
    checks.check_dtype("the teacher's weight", of_weight, (of_hidden.dtype,))
    if of_bias is not None:
        checks.check_shape("the teacher's bias", of_bias, "[V]", (weight.shape[0],))
        checks.check_floating("the teacher's bias", of_bias)
    checks.check_same_device(
        hidden=hidden, teacher_hidden=of_hidden, teacher_weight=of_weight, teacher_bias=of_bias
    )


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dtype = saved_dtype(hidden)
    of_bias = hidden.new_empty(
        0 if bias is None else bias.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32)
    )
    return hidden.new_empty(hidden.shape, dtype=dtype), weight.new_empty(weight.shape, dtype=dtype), of_bias


def _fake_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    reduction, gradient = rest[-3:-1]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_empty(hidden.shape[:1] if reduction == "none" else (), dtype=wide)
    if gradient:
        return loss, *_fake_gradients(hidden, weight, bias), loss.new_empty(())
    return loss, loss.new_empty(0), loss.new_empty(0), loss.new_empty(0), loss.new_empty(())


def _fake_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    return _fake_gradients(hidden, weight, bias)


_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, int ignore_index, float label_smoothing, float z_loss, "
    "float distillation, float temperature"
)

_forward = library.define(
    f"linear_cross_entropy({_ARGUMENTS}, str reduction, bool gradient, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    kernels={"cpp": cpu.forward, "torch": torch_kernels.forward, "triton": launches.forward},
)

_backward = library.define_backward(
    f"linear_cross_entropy_backward(Tensor grad, {_ARGUMENTS}, str impl) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    kernels={"cpp": cpu.backward, "torch": torch_kernels.backward, "triton": launches.backward},
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    *tensors_and_options, reduction, gradient, chosen = inputs
    ctx.kept = list(output[1:4]) if gradient else []
    ctx.factor = None if reduction == "none" else output[4]
    ctx.options = *tensors_and_options[7:], chosen
    ctx.save_for_backward(*tensors_and_options[:7])


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 15
    tensors = ctx.saved_tensors
    scale = grad if ctx.factor is None else grad * ctx.factor
    gradients = [saved.mul_(scale) if library.eager_call else saved * scale for saved in ctx.kept]
    ctx.kept.clear()
    if not gradients:
        # Cotangents of their own, or a second backward: the first took what the forward had kept, without a copy.
        gradients = _backward(scale.expand(tensors[0].shape[0]), *tensors, *ctx.options)
    wanted = zip(gradients, tensors, ctx.needs_input_grad[:3], strict=False)
    return *(found.to(given.dtype) if needed else None for found, given, needed in wanted), *(None,) * 12


_loss = library.differentiable(_forward, setup_context=_keep, backward=_differentiate, returned=1)
