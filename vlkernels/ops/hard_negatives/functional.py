"""Hard negatives as users call it: checks, the choice of the implementation, the op."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlkernels.core import checks, collectives, dispatch, library
from vlkernels.core.collectives import ProcessGroup
from vlkernels.core.dispatch import Implementation
from vlkernels.core.random import Rng, check_stream, resolve_rng
from vlkernels.core.triton_runtime import TritonImplementation
from vlkernels.ops.hard_negatives import reference, torch_kernels
from vlkernels.ops.hard_negatives.gpu import launches

IMPLEMENTATIONS = (TritonImplementation(supports=launches.refusal), Implementation("torch"), Implementation("reference"))

# Below so many logits a CPU is faster with the whole matrix: two levels cost more than they save.
FEW_LOGITS = 2**25


def hard_negatives(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    labels: Tensor | None = None,
    rng: Rng | None = None,
    stream: int = 0,
    sample_ids: Tensor | None = None,
    group: ProcessGroup | None = None,
    rank_counts: Sequence[int] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """For every image i draw a text ``j != i`` with probability ``softmax_j(s I_i . T_j)``, and the reverse.

    Example:
        >>> import torch, vlkernels as vk
        >>> images, texts = torch.randn(6, 8), torch.randn(6, 8)
        >>> text_index, image_index = vk.hard_negatives(images, texts, 1000.0, rng=vk.Rng(0))
        >>> similarities = (images @ texts.T).fill_diagonal_(-torch.inf)
        >>> torch.equal(text_index, similarities.argmax(1)), torch.equal(image_index, similarities.argmax(0))
        (True, True)

    Args:
        image_features: [N, D] floating; row i is the partner of row i of ``text_features``.
        text_features: [N, D], same dtype and device.
        logit_scale: number, or tensor of shape () or (1,); it multiplies.
        labels: integers [N]; keys with the label of the query are not negatives.
        rng: the draws depend on it, ``stream`` and ``sample_ids`` alone: not on the order or the number of
            ranks. Without it every rank draws afresh from torch's generator.
        stream: the constant of this call site.
        sample_ids: integers [N], what identifies the pairs; default their rows in the concatenated batch.
        group: process group; negatives then come from all ranks. Collectives run on it, in this call alone. They
            gather, there is no ring: what is drawn may lie on any rank, so whoever uses it gathers more than features.
        rank_counts: N of every rank; without it all must be equal, which the first exchange checks.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        ``(text_index, image_index)``, int64 [N]: rows of the concatenated batch; -1 where there is no
        negative (a single pair, or labels all equal).

    Gradients: none. Numerics: similarities and weights in float32 (float64 for float64), by inverse CDF of
    one uniform draw.
    Memory: O(N D), and two tiles of a million logits or, with "triton", 2^22 weights of blocks a few times; never waits for
    the device.
    Errors: ``ValueError`` for shapes, dtypes, counts that differ, and for a batch without a pair.
    Source: Li et al. 2021 (ALBEF).
    """
    _check(image_features, text_features, logit_scale, labels, sample_ids)
    check_stream(stream)
    pairs = image_features.shape[0]
    collectives.check_group(pairs, group, rank_counts)
    few = pairs * pairs < FEW_LOGITS and image_features.device.type == "cpu"
    order = IMPLEMENTATIONS[::-1] if few else IMPLEMENTATIONS
    chosen = dispatch.resolve("hard_negatives", impl, order, image_features.device, {"dtype": image_features.dtype})
    if chosen == "reference":
        with torch.no_grad():
            return reference.hard_negatives(
                image_features,
                text_features,
                logit_scale,
                labels=labels,
                rng=rng,
                stream=stream,
                sample_ids=sample_ids,
                group=group,
                rank_counts=rank_counts,
            )
    features = image_features.detach(), text_features.detach()
    wide = torch.promote_types(image_features.dtype, torch.float32)
    if isinstance(logit_scale, Tensor):
        scale = logit_scale.detach().reshape(())
    else:
        scale = torch.full((), logit_scale, dtype=wide, device=image_features.device)
    state = resolve_rng(rng, image_features.device)
    counts = None if rank_counts is None else list(rank_counts)
    return _forward(
        *features, scale, labels, state, stream, sample_ids, collectives.group_name(group), counts, chosen
    )


def _check(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    labels: Tensor | None,
    sample_ids: Tensor | None,
) -> None:
    checks.check_shape("image_features", image_features, "[N, D]", (None, None))
    pairs, width = image_features.shape
    checks.check_floating("image_features", image_features)
    checks.check_shape("text_features", text_features, "[N, D]", (pairs, width))
    checks.check_dtype("text_features", text_features, (image_features.dtype,))
    if isinstance(logit_scale, Tensor) and tuple(logit_scale.shape) not in ((), (1,)):
        raise ValueError(
            f"logit_scale must be a number or have shape () or (1,), got {list(logit_scale.shape)}"
        )
    for name, integers in (("labels", labels), ("sample_ids", sample_ids)):
        if integers is not None:
            checks.check_shape(name, integers, "[N]", (pairs,))
            checks.check_integer(name, integers)
    checks.check_same_device(
        image_features=image_features,
        text_features=text_features,
        logit_scale=logit_scale if isinstance(logit_scale, Tensor) else None,
        labels=labels,
        sample_ids=sample_ids,
    )


def _fake(image_features: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    index = image_features.new_empty(image_features.shape[0], dtype=torch.int64)
    return index, torch.empty_like(index)


_forward = library.define(
    "hard_negatives(Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor? labels, "
    "Tensor state, SymInt stream, Tensor? sample_ids, str group, SymInt[]? rank_counts, str impl) "
    "-> (Tensor, Tensor)",
    fake=_fake,
    kernels={
        "torch": torch_kernels.hard_negatives,
        "triton": functools.partial(torch_kernels.hard_negatives, draw=launches.draw),
    },
)
