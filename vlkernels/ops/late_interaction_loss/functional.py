"""The late-interaction loss as users call it: checks, the choice of the implementation, the differentiable op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlkernels.core import checks, collectives, dispatch, library, pairs
from vlkernels.core.collectives import ProcessGroup
from vlkernels.core.dispatch import Implementation
from vlkernels.core.exchange import check_exchange
from vlkernels.core.layout import SegmentLayout
from vlkernels.core.triton_runtime import TritonImplementation
from vlkernels.ops.late_interaction_loss import reference, torch_kernels
from vlkernels.ops.late_interaction_loss.gpu import arithmetic, launches

IMPLEMENTATIONS = (
    TritonImplementation(supports=launches.refusal),
    Implementation("torch"),
    Implementation("reference"),
)

# Below so many similarities of tokens a CPU is faster with all of them at once: tiles cost more than they save.
# In a group tiles serve always: ranks of unequal size would else choose unequally and wait for each other.
FEW_PRODUCTS = {8: 2**17, 4: 2**17, 2: 2**19}  # by the bytes of a feature


def late_interaction_loss(
    image_tokens: Tensor,
    text_tokens: Tensor,
    logit_scale: Tensor | float,
    *,
    image_layout: SegmentLayout,
    text_layout: SegmentLayout,
    similarity: str = "mean_max",
    label_smoothing: float = 0.0,
    token_share: float = 1.0,
    group: ProcessGroup | None = None,
    rank_counts: Sequence[int] | None = None,
    rank_reduction: str = "mean",
    exchange: str = "gather",
    impl: str = "auto",
) -> Tensor:
    """FILIP's symmetric InfoNCE in nats over similarities that are made of tokens; BLIP-2's is a case of it.

    With ``A[i, j]`` the mean over the tokens of image i of the largest product with a token of text j, and
    ``B[j, i]`` the mean over the tokens of text j of the largest product with a token of image i, the loss is
    ``(mean_i CE(s A[i], i) + mean_j CE(s B[j], j)) / 2``.

    Example:
        >>> import torch, torch.nn.functional as F, vlkernels as vk
        >>> images, texts = torch.randn(4, 9, 16), torch.randn(4, 5, 16)
        >>> loss = vk.late_interaction_loss(images.flatten(0, 1), texts.flatten(0, 1), 3.0,
        ...     image_layout=vk.SegmentLayout([[9]] * 4), text_layout=vk.SegmentLayout([[5]] * 4))
        >>> products, pairs = torch.einsum("ipd,jtd->ijpt", images, texts), torch.arange(4)
        >>> of_images = F.cross_entropy(3 * products.amax(3).mean(2), pairs)
        >>> of_texts = F.cross_entropy(3 * products.amax(2).mean(2).T, pairs)
        >>> torch.allclose(loss, (of_images + of_texts) / 2, atol=1e-5)
        True

    Args:
        image_tokens: [num_tokens of image_layout, D] floating; sample i is the partner of sample i of the
            texts. Need not be normalised.
        text_tokens: [num_tokens of text_layout, D], same dtype and device.
        logit_scale: number, or tensor of shape () or (1,); it multiplies (CLIP's parameter after ``exp``).
        image_layout: which rows are an image's: all of its segments (``layout.select`` chooses some). Every
            sample has a token; rows of nobody are allowed, as is ``SegmentLayout.padded``.
        text_layout: as many samples as ``image_layout``.
        similarity: ``"mean_max"`` (FILIP), or ``"max"``: A and B are the largest product of any two tokens
            (BLIP-2's contrastive loss, whose texts have one token each: the largest over the queries).
        label_smoothing: e in [0, 1): targets become ``(1 - e) targets + e / N``.
        token_share: in (0, 1]: the share of each sample's tokens, rounded up, that takes part and is sent to other ranks
            (FILIP: 0.25): those with the largest product with any token of the other side on this rank. They are chosen
            before anything is exchanged and without a gradient, so below 1 the loss changes with the number of ranks.
        group: process group; every rank passes its own samples. Collectives run in the forward alone. A group
            of its own (``torch.distributed.new_group()``) keeps them out of the way of the parameters'.
        rank_counts: N, the samples, of every rank, known to all; without it all must be equal, which the
            first exchange checks. Tokens may differ either way.
        rank_reduction: "mean" (DDP, ZeRO) or "sum": how parameter gradients are reduced over ranks
            afterwards.
        exchange: "gather": every rank holds the tokens of all; or "ring": the texts' tokens travel from rank to rank while
            others are in use, so a rank holds a few blocks, and sends more bytes. The value is the same. The
            reference gathers.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        The loss, a scalar in float32 (float64 for float64 inputs). With a group it is that of
        one process on the samples of all ranks, the same on every rank.

    Gradients: to both tokens, through the first of equal maxima, and to the scale; zero in rows of nobody.
        With a group and "mean" a token's gradient is W times the single process's, so that averaged parameter
        gradients equal it; the scale's averages (or adds up) to it.
    Numerics: products, maxima and normalisers are float32 (float64 for float64), also for half types, whose
        maxima "triton" takes of products cut to 16 bits of mantissa: what is equal there is a tie. The
        reference, which "auto" takes for few products on a CPU, rounds the products of half types to their
        dtype, as PyTorch. Two runs give the same bits.
    Memory: O(tokens D), tiles of 1024 x 1024 products ("triton" stores none), and at most 256 MB of maxima and
        their places, a byte each up to 256 tokens; what does not fit is computed twice. Gradients are computed in
        the forward, when anything requires them. With a group that gathers, the tokens of all ranks.
    Errors: ``ValueError`` for shapes, dtypes, ranges, samples without a token, counts that differ, a batch
        without a pair.
    Source: Yao et al. 2021 (FILIP); Li et al. 2023 (BLIP-2).
    """
    _check(image_tokens, text_tokens, logit_scale, image_layout, text_layout)
    _check_options(similarity, label_smoothing, token_share)
    collectives.check_group(image_layout.num_samples, group, rank_counts)
    collectives.check_rank_reduction(rank_reduction)
    check_exchange(exchange)
    few = image_layout.num_tokens * text_layout.num_tokens < FEW_PRODUCTS[image_tokens.element_size()]
    order = IMPLEMENTATIONS[::-1] if few and group is None and image_tokens.device.type == "cpu" else IMPLEMENTATIONS
    facts = {"dtype": image_tokens.dtype}
    chosen = dispatch.resolve("late_interaction_loss", impl, order, image_tokens.device, facts)
    if chosen == "reference":
        return reference.late_interaction_loss(
            image_tokens,
            text_tokens,
            logit_scale,
            image_layout=image_layout,
            text_layout=text_layout,
            similarity=similarity,
            label_smoothing=label_smoothing,
            token_share=token_share,
            group=group,
            rank_counts=rank_counts,
            rank_reduction=rank_reduction,
        )
    images, texts = reference.Side.of(image_tokens, image_layout), reference.Side.of(text_tokens, text_layout)
    if token_share < 1:
        images, texts = reference.keep_salient(images, texts, token_share, torch_kernels.salience)
    differentiated = (images.tokens, texts.tokens, pairs.as_tensor(logit_scale, image_tokens))
    bounds = (images.starts, images.lengths, texts.starts, texts.lengths)
    longest = (images.longest, texts.longest)
    counts = None if rank_counts is None else list(rank_counts)
    over_ranks = (collectives.group_name(group), counts, rank_reduction, exchange)
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in differentiated)
    options = (similarity, float(label_smoothing), *over_ranks, gradient, chosen)
    return _loss(*differentiated, *bounds, *longest, *options)[0]


def _check(
    image_tokens: Tensor,
    text_tokens: Tensor,
    logit_scale: Tensor | float,
    image_layout: SegmentLayout,
    text_layout: SegmentLayout,
) -> None:
    for name, layout in (("image_layout", image_layout), ("text_layout", text_layout)):
        if not isinstance(layout, SegmentLayout):
            raise ValueError(f"{name} must be a SegmentLayout, got a {type(layout).__name__}")
    checks.check_floating("image_tokens", image_tokens)
    checks.check_dtype("text_tokens", text_tokens, (image_tokens.dtype,))
    checks.check_shape("image_tokens", image_tokens, "[num_tokens, D]", (image_layout.num_tokens, None))
    width = image_tokens.shape[1]
    checks.check_shape("text_tokens", text_tokens, "[num_tokens, D]", (text_layout.num_tokens, width))
    scale = logit_scale if isinstance(logit_scale, Tensor) else None
    if scale is not None and tuple(scale.shape) not in ((), (1,)):
        raise ValueError(f"logit_scale must be a number or have shape () or (1,), got {list(scale.shape)}")
    checks.check_same_device(
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        logit_scale=scale,
        image_layout=image_layout.starts,
        text_layout=text_layout.starts,
    )
    if text_layout.num_samples != image_layout.num_samples:
        raise ValueError(
            f"text_layout must have the samples of image_layout = {image_layout.num_samples}, "
            f"got {text_layout.num_samples}"
        )
    _check_no_sample_is_empty("image_layout", image_layout)
    _check_no_sample_is_empty("text_layout", text_layout)


def _check_no_sample_is_empty(name: str, layout: SegmentLayout) -> None:
    """Nothing has a largest product with no token, nor no token a mean."""
    if torch.compiler.is_compiling() or layout.num_samples == 0:
        return
    filled = layout.lengths.sum(1) > 0
    if layout.device.type != "cpu":
        torch._assert_async(filled.all())
    elif not filled.all():
        raise ValueError(f"{name} must give every sample a token, sample {int((~filled).nonzero()[0])} has none")


def _check_options(similarity: str, label_smoothing: float, token_share: float) -> None:
    if similarity not in torch_kernels.SIMILARITIES:
        raise ValueError(f'similarity must be "mean_max" or "max", got {similarity!r}')
    checks.check_probability("label_smoothing", label_smoothing)
    if not 0 < token_share <= 1:
        raise ValueError(f"token_share must be in (0, 1], got {token_share}")


def _fake(image_tokens: Tensor, text_tokens: Tensor, logit_scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return pairs.fake_loss((image_tokens, text_tokens), (logit_scale,), gradient=rest[-2])


_forward = library.define(
    "late_interaction_loss(Tensor image_tokens, Tensor text_tokens, Tensor logit_scale, Tensor image_starts, "
    "Tensor image_lengths, Tensor text_starts, Tensor text_lengths, SymInt longest_image, SymInt longest_text, "
    "str similarity, float label_smoothing, str group, SymInt[]? rank_counts, str rank_reduction, str exchange, bool gradient, "
    "str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    kernels={"torch": torch_kernels.late_interaction_loss, "triton": arithmetic.late_interaction_loss},
)


_loss = library.differentiable(_forward, setup_context=pairs.keep_gradients, backward=pairs.scale_gradients)
