"""The contrastive loss as users call it: checks, the choice of the implementation, the differentiable op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlkernels.core import checks, collectives, dispatch, library, pairs, similarity
from vlkernels.core.collectives import ProcessGroup
from vlkernels.core.dispatch import Implementation
from vlkernels.core.exchange import check_exchange
from vlkernels.core.triton_runtime import TritonImplementation
from vlkernels.ops.contrastive_loss import reference, torch_kernels
from vlkernels.ops.contrastive_loss.gpu import tiles

IMPLEMENTATIONS = (
    TritonImplementation(supports=similarity.refusal),
    Implementation("torch"),
    Implementation("reference"),
)

# Below so many logits a CPU is faster with the whole matrix: tiles cost more than they save.
# In a group tiles serve always: ranks of unequal size would else choose unequally and wait for each other.
FEW_LOGITS = {8: 2**21, 4: 2**21, 2: 2**24}  # by the bytes of a feature


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    image_keys: Tensor | None = None,
    text_keys: Tensor | None = None,
    distillation: float = 0.0,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
    rank_counts: Sequence[int] | None = None,
    rank_reduction: str = "mean",
    exchange: str = "gather",
    impl: str = "auto",
) -> Tensor:
    """CLIP's symmetric InfoNCE in nats: ``(mean_i CE(s I_i T^t, i) + mean_j CE(s T_j I^t, j)) / 2``.

    Example:
        >>> import torch, torch.nn.functional as F, vlkernels as vk
        >>> images, texts = (F.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
        >>> loss = vk.contrastive_loss(images, texts, 10.0)
        >>> logits, pairs = 10.0 * images @ texts.T, torch.arange(8)
        >>> plain = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        >>> torch.allclose(loss, plain, atol=1e-5)
        True

    Args:
        image_features: [N, D] floating; row i is the partner of row i of ``text_features``. Need not be
            normalised.
        text_features: [N, D], same dtype and device.
        logit_scale: number, or tensor of shape () or (1,); it multiplies (CLIP's parameter after ``exp``).
        image_keys: [N + Q, D], what texts are compared with instead of ``image_features``: the momentum
            encoder's features of this batch, then a queue (ALBEF, BLIP). No gradient. Given together with
            ``text_keys``.
        text_keys: [N + Q, D], what images are compared with.
        distillation: a in [0, 1]: targets are ``a softmax(s K_i K'^t) + (1 - a) positives`` with the keys as
            the teacher, which takes no gradient, the scale's included. Needs keys.
        labels: integers [N], with keys [N + Q]; all keys of equal label are positives, in equal shares.
        label_smoothing: e in [0, 1): targets become ``(1 - e) targets + e / number of keys``.
        group: process group; every rank passes its own rows. Collectives run in the forward alone. A group of
            its own (``torch.distributed.new_group()``) keeps them out of the way of the parameters'.
        rank_counts: N of every rank, known to all; without it all must be equal, which the first exchange
            checks.
        rank_reduction: "mean" (DDP, ZeRO) or "sum": how parameter gradients are reduced over ranks
            afterwards.
        exchange: "gather": every rank holds the features of all; or "ring": the texts travel from rank to rank while
            others are in use, so a rank holds a few blocks, and sends more bytes. The value is the same. The
            reference gathers.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        The loss, a scalar in float32 (float64 for float64 inputs). With a group it is that of
        one process on the rows of all ranks, the same on every rank; the queue rows of the keys must be the
        same on all ranks.

    Gradients: to both features and the scale. With a group and "mean" a feature's gradient is W times the
    single process's, so that averaged parameter gradients equal it; the scale's averages (or adds up) to it.
    Numerics: similarities and normalisers are float32 (float64 for float64), also for half types; products
    of bfloat16 gradients multiply in bfloat16 and accumulate over tiles in float32. The reference, which
    "auto" takes for few logits on a CPU, rounds the similarities of half types to their dtype, as PyTorch.
    Memory: O(N D), in a ring with the N of a rank, and at most 19 tiles of 2048 x 2048 (319 MB), with "triton"
    96 MiB. Gradients are computed in the forward, when anything requires them.
    Errors: ``ValueError`` for shapes, dtypes, ranges, counts that differ, and for a batch without a pair.
    Source: Radford et al. 2021 (CLIP); Li et al. 2021 (ALBEF) for keys and distillation.
    """
    _check(
        image_features,
        text_features,
        logit_scale,
        image_keys,
        text_keys,
        distillation,
        labels,
        label_smoothing,
    )
    collectives.check_group(image_features.shape[0], group, rank_counts)
    collectives.check_rank_reduction(rank_reduction)
    check_exchange(exchange)
    keys = text_features if text_keys is None else text_keys
    few = image_features.shape[0] * keys.shape[0] < FEW_LOGITS[image_features.element_size()]
    order = IMPLEMENTATIONS[::-1] if few and group is None and image_features.device.type == "cpu" else IMPLEMENTATIONS
    chosen = dispatch.resolve("contrastive_loss", impl, order, image_features.device, {"dtype": image_features.dtype})
    if chosen == "reference":
        return reference.contrastive_loss(
            image_features,
            text_features,
            logit_scale,
            image_keys=image_keys,
            text_keys=text_keys,
            distillation=distillation,
            labels=labels,
            label_smoothing=label_smoothing,
            group=group,
            rank_counts=rank_counts,
            rank_reduction=rank_reduction,
        )
    scale = pairs.as_tensor(logit_scale, image_features)
    differentiated = (image_features, text_features, scale)
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in differentiated)
    counts = None if rank_counts is None else list(rank_counts)
    name = collectives.group_name(group)
    options = (labels, float(distillation), float(label_smoothing), name, counts, rank_reduction, exchange)
    return _loss(*differentiated, image_keys, text_keys, *options, gradient, chosen)[0]


def _check(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    image_keys: Tensor | None,
    text_keys: Tensor | None,
    distillation: float,
    labels: Tensor | None,
    label_smoothing: float,
) -> None:
    checks.check_shape("image_features", image_features, "[N, D]", (None, None))
    rows, width = image_features.shape
    checks.check_floating("image_features", image_features)
    checks.check_shape("text_features", text_features, "[N, D]", (rows, width))
    checks.check_dtype("text_features", text_features, (image_features.dtype,))
    if isinstance(logit_scale, Tensor) and tuple(logit_scale.shape) not in ((), (1,)):
        raise ValueError(
            f"logit_scale must be a number or have shape () or (1,), got {list(logit_scale.shape)}"
        )
    if (image_keys is None) != (text_keys is None):
        raise ValueError("image_keys and text_keys must be given together")
    if not 0.0 <= distillation <= 1.0:
        raise ValueError(f"distillation must be in [0, 1], got {distillation}")
    if distillation > 0 and image_keys is None:
        raise ValueError(f"distillation = {distillation} needs image_keys and text_keys, the teacher")
    checks.check_probability("label_smoothing", label_smoothing)
    keys = rows
    if image_keys is not None and text_keys is not None:
        checks.check_shape("image_keys", image_keys, "[N + Q, D]", (None, width))
        keys = image_keys.shape[0]
        checks.check_shape("text_keys", text_keys, "[N + Q, D]", (keys, width))
        if keys < rows:
            raise ValueError(
                f"image_keys must begin with the keys of the batch: at least N = {rows} rows, got {keys}"
            )
        checks.check_dtype("image_keys", image_keys, (image_features.dtype,))
        checks.check_dtype("text_keys", text_keys, (image_features.dtype,))
    if labels is not None:
        checks.check_shape("labels", labels, "[N]" if image_keys is None else "[N + Q]", (keys,))
        checks.check_integer("labels", labels)
    scale_tensor = logit_scale if isinstance(logit_scale, Tensor) else None
    checks.check_same_device(
        image_features=image_features,
        text_features=text_features,
        logit_scale=scale_tensor,
        image_keys=image_keys,
        text_keys=text_keys,
        labels=labels,
    )


def _fake(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return pairs.fake_loss((image_features, text_features), (logit_scale,), gradient=rest[-2])


_forward = library.define(
    "contrastive_loss(Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor? image_keys, "
    "Tensor? text_keys, Tensor? labels, float distillation, float label_smoothing, str group, "
    "SymInt[]? rank_counts, str rank_reduction, str exchange, bool gradient, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    kernels={"torch": torch_kernels.contrastive_loss, "triton": tiles.contrastive_loss},
)


_loss = library.differentiable(_forward, setup_context=pairs.keep_gradients, backward=pairs.scale_gradients)
