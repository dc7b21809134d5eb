"""The triplet loss as users call it: checks, the choice of the implementation, the differentiable op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlkernels.core import collectives, dispatch, library, pairs, similarity
from vlkernels.core.collectives import ProcessGroup
from vlkernels.core.dispatch import Implementation
from vlkernels.core.exchange import check_exchange
from vlkernels.core.triton_runtime import TritonImplementation
from vlkernels.ops.triplet_loss import driver, reference, torch_kernels
from vlkernels.ops.triplet_loss.gpu import tiles

IMPLEMENTATIONS = (
    TritonImplementation(supports=similarity.refusal),
    Implementation("torch"),
    Implementation("reference"),
)

# Below so many pairs a CPU is faster with the whole matrix: tiles cost more than they save.
# In a group tiles serve always: ranks of unequal size would else choose unequally and wait for each other.
FEW_PAIRS = {torch.float64: 2**18, torch.float32: 2**18, torch.bfloat16: 2**20, torch.float16: 2**10}
FEW_PAIRS_SUMMED = FEW_PAIRS | {torch.bfloat16: 2**22}


def triplet_loss(
    image_features: Tensor,
    text_features: Tensor,
    margin: float = 0.2,
    *,
    hardest: bool = True,
    labels: Tensor | None = None,
    group: ProcessGroup | None = None,
    rank_counts: Sequence[int] | None = None,
    rank_reduction: str = "mean",
    exchange: str = "gather",
    impl: str = "auto",
) -> Tensor:
    """VSE++'s hinge on similarities ``S = I T^t``: ``sum_i [m + max_j S_ij - S_ii]+ + sum_j [m + max_i S_ij - S_jj]+``.

    Example:
        >>> import torch, torch.nn.functional as F, vlkernels as vk
        >>> images, texts = (F.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
        >>> loss = vk.triplet_loss(images, texts, margin=0.2)
        >>> similarities = images @ texts.T
        >>> partners, negatives = similarities.diagonal(), similarities - 2 * torch.eye(8)
        >>> of_images, of_texts = negatives.amax(1), negatives.amax(0)
        >>> plain = (0.2 + of_images - partners).relu().sum() + (0.2 + of_texts - partners).relu().sum()
        >>> torch.allclose(loss, plain, atol=1e-5)
        True

    Args:
        image_features: [N, D] floating; row i is the partner of row i of ``text_features``. Normalised features give
            cosines, which VSE++ compares.
        text_features: [N, D], same dtype and device.
        margin: m >= 0.
        hardest: the most similar negative of every row and column alone (VSE++), or the sum over all (VSE0).
        labels: integers [N]; pairs of equal label are no negatives (several captions of an image). Without labels all
            but the partners are.
        group: process group; every rank passes its own rows. Collectives run in the forward alone. A group of its own
            (``torch.distributed.new_group()``) keeps them out of the way of the parameters'.
        rank_counts: N of every rank, known to all; without it all must be equal, which the first exchange checks.
        rank_reduction: "mean" (DDP, ZeRO) or "sum": how parameter gradients are reduced over ranks afterwards.
        exchange: "gather": every rank holds the features of all; or "ring": the texts travel from rank to rank while others
            are in use, so a rank holds a few blocks, and sends more bytes. The value is the same. The reference gathers.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        The loss, a scalar in float32 (float64 for float64 inputs), summed over pairs as VSE++ does; a row
        without a negative adds 0. With a group it is that of one process on the rows of all ranks, the same on
        every rank.

    Gradients: to both features. Of equally hard negatives the first takes the gradient; a hinge at 0 has none. With a
    group and "mean" they are W times the single process's, so that averaged parameter gradients equal it.
    Numerics: similarities and hinges are float32 (float64 for float64), also for half types; with ``hardest=False``
    products of bfloat16 gradients multiply in bfloat16 and accumulate over tiles in float32. The reference, which
    "auto" takes for few pairs on a CPU, rounds the similarities of half types to their dtype, as PyTorch.
    Memory: O(N D), in a ring with the N of a rank, and 3 tiles of 1024 x 1024 (13 MB) or, "triton", at most 32 MB.
    Gradients are computed in the forward, when anything requires them.
    Errors: ``ValueError`` for shapes, dtypes, ranges, counts that differ, and for a batch without a pair.
    Source: Faghri et al. 2018 (VSE++).
    """
    pairs.check_features(image_features, text_features, labels)
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin must be at least 0 and finite, got {margin}")
    collectives.check_group(image_features.shape[0], group, rank_counts)
    collectives.check_rank_reduction(rank_reduction)
    check_exchange(exchange)
    few = image_features.shape[0] ** 2 < (FEW_PAIRS if hardest else FEW_PAIRS_SUMMED)[image_features.dtype]
    order = IMPLEMENTATIONS[::-1] if few and group is None and image_features.device.type == "cpu" else IMPLEMENTATIONS
    chosen = dispatch.resolve("triplet_loss", impl, order, image_features.device, {"dtype": image_features.dtype})
    if chosen == "reference":
        return reference.triplet_loss(
            image_features,
            text_features,
            margin,
            hardest=hardest,
            labels=labels,
            group=group,
            rank_counts=rank_counts,
            rank_reduction=rank_reduction,
        )
    features = (image_features, text_features)
    gradient = torch.is_grad_enabled() and any(f.requires_grad for f in features)
    counts = None if rank_counts is None else list(rank_counts)
    over_ranks = (collectives.group_name(group), counts, rank_reduction, exchange)
    return _loss(*features, labels, float(margin), hardest, *over_ranks, gradient, chosen)[0]


def _fake(image_features: Tensor, text_features: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return pairs.fake_loss((image_features, text_features), (), gradient=rest[-2])


_forward = library.define(
    "triplet_loss(Tensor image_features, Tensor text_features, Tensor? labels, float margin, bool hardest, "
    "str group, SymInt[]? rank_counts, str rank_reduction, str exchange, bool gradient, str impl) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    kernels={"triton": partial(driver.triplet_loss, tiles.Tiles), "torch": torch_kernels.triplet_loss},
)

_loss = library.differentiable(_forward, setup_context=pairs.keep_gradients, backward=pairs.scale_gradients)
