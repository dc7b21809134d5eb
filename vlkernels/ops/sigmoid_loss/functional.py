"""The sigmoid loss as users call it: checks, the choice of the implementation, the differentiable op."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlkernels.core import collectives, dispatch, library, native, pairs, similarity
from vlkernels.core.collectives import ProcessGroup
from vlkernels.core.dispatch import Facts, Implementation
from vlkernels.core.exchange import check_exchange
from vlkernels.core.triton_runtime import TritonImplementation
from vlkernels.ops.sigmoid_loss import driver, reference, torch_kernels
from vlkernels.ops.sigmoid_loss.gpu import tiles


def _computes_in_float32(facts: Facts) -> str | None:
    return "it computes in float32, the features are float64" if facts["dtype"] == torch.float64 else None


IMPLEMENTATIONS = (
    TritonImplementation(supports=similarity.refusal),
    Implementation(
        "cpp", devices=("cpu",), available=partial(native.missing, "weigh_pairs"), supports=_computes_in_float32
    ),
    Implementation("torch"),
    Implementation("reference"),
)

# Below so many pairs a CPU is faster with the whole matrix: tiles cost more than they save.
# In a group tiles serve always: ranks of unequal size would else choose unequally and wait for each other.
FEW_PAIRS = {torch.float64: 2**20, torch.float32: 2**18, torch.bfloat16: 2**24, torch.float16: 2**10}


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float = 0.0,
    labels: Tensor | None = None,
    group: ProcessGroup | None = None,
    rank_counts: Sequence[int] | None = None,
    rank_reduction: str = "mean",
    exchange: str = "gather",
    impl: str = "auto",
) -> Tensor:
    """SigLIP's loss in nats: ``-1/N sum_ij log sigmoid(z_ij (s I_i T_j^t + b))``, z = 1 for partners, -1 for others.

    Example:
        >>> import torch, torch.nn.functional as F, vlkernels as vk
        >>> images, texts = (F.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
        >>> loss = vk.sigmoid_loss(images, texts, 10.0, logit_bias=-10.0)
        >>> logits, signs = 10.0 * images @ texts.T - 10.0, 2 * torch.eye(8) - 1
        >>> torch.allclose(loss, -F.logsigmoid(signs * logits).sum() / 8, atol=1e-5)
        True

    Args:
        image_features: [N, D] floating; row i is the partner of row i of ``text_features``. Need not be normalised.
        text_features: [N, D], same dtype and device.
        logit_scale: number, or tensor of shape () or (1,); it multiplies (SigLIP's parameter after ``exp``).
        logit_bias: likewise; it is added (SigLIP begins with -10).
        labels: integers [N]; all pairs of equal label are positive, with weight 1 each (captions or images that occur
            twice). Without labels the partners alone are.
        group: process group; every rank passes its own rows. Collectives run in the forward alone. A group of its own
            (``torch.distributed.new_group()``) keeps them out of the way of the parameters'.
        rank_counts: N of every rank, known to all; without it all must be equal, which the first exchange checks.
        rank_reduction: "mean" (DDP, ZeRO) or "sum": how parameter gradients are reduced over ranks afterwards.
        exchange: "gather": every rank holds the features of all; or "ring": the texts travel from rank to rank while others
            are in use, so a rank holds a few blocks, and sends more bytes. The value is the same. The reference gathers.
        impl: "auto", "triton", "cpp", "torch" or "reference".

    Returns:
        The loss, a scalar in float32 (float64 for float64 inputs). With a group it is that of one process
        on the rows of all ranks, the same on every rank.

    Gradients: to both features, the scale and the bias. With a group and "mean" a feature's gradient is W times the
    single process's, so that averaged parameter gradients equal it; the scale's and the bias's average (or add up) to it.
    Numerics: similarities, losses and the gradients of scale and bias are float32 (float64 for float64), also for half
    types; products of bfloat16 gradients multiply in bfloat16 and accumulate over tiles in float32. The reference, which
    "auto" takes for few pairs on a CPU, rounds the similarities of half types to their dtype, as PyTorch.
    Memory: O(N D), in a ring with the N of a rank, and a tile of 2048 x 2048 (17 MB), three with "torch", or, "triton", at
    most 32 MB.
    Gradients are computed in the forward, when anything requires them.
    Errors: ``ValueError`` for shapes, dtypes, counts that differ, and for a batch without a pair.
    Source: Zhai et al. 2023 (SigLIP).
    """
    pairs.check_features(image_features, text_features, labels, logit_scale=logit_scale, logit_bias=logit_bias)
    collectives.check_group(image_features.shape[0], group, rank_counts)
    collectives.check_rank_reduction(rank_reduction)
    check_exchange(exchange)
    few = image_features.shape[0] ** 2 < FEW_PAIRS[image_features.dtype]
    order = IMPLEMENTATIONS[::-1] if few and group is None and image_features.device.type == "cpu" else IMPLEMENTATIONS
    chosen = dispatch.resolve("sigmoid_loss", impl, order, image_features.device, {"dtype": image_features.dtype})
    if chosen == "reference":
        return reference.sigmoid_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias=logit_bias,
            labels=labels,
            group=group,
            rank_counts=rank_counts,
            rank_reduction=rank_reduction,
        )
    scale, bias = (pairs.as_tensor(number, image_features) for number in (logit_scale, logit_bias))
    differentiated = (image_features, text_features, scale, bias)
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in differentiated)
    counts = None if rank_counts is None else list(rank_counts)
    over_ranks = (collectives.group_name(group), counts, rank_reduction, exchange)
    return _loss(*differentiated, labels, *over_ranks, gradient, chosen)[0]


def _fake(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return pairs.fake_loss((image_features, text_features, logit_scale, logit_bias), (), gradient=rest[-2])


_forward = library.define(
    "sigmoid_loss(Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor logit_bias, Tensor? labels, "
    "str group, SymInt[]? rank_counts, str rank_reduction, str exchange, bool gradient, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    kernels={
        "triton": partial(driver.sigmoid_loss, tiles.Tiles),
        "cpp": torch_kernels.compiled_sigmoid_loss,
        "torch": torch_kernels.sigmoid_loss,
    },
)

_loss = library.differentiable(_forward, setup_context=pairs.keep_gradients, backward=pairs.scale_gradients)
