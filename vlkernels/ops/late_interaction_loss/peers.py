"""Other ways to the late-interaction loss: all products at once, and two calls of a kernel for one direction each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.peers import Build, Prepared

Score = Callable[[Tensor, Tensor, SegmentLayout, SegmentLayout], Tensor]


def dense(
    image_tokens: Tensor, text_tokens: Tensor, logit_scale: Tensor | float, **options: Any
) -> tuple[Callable[[], Any], list[Tensor]]:
    """Plain PyTorch with all products at once, on samples that are padded, and masks that are made, before the clock."""
    sides = []
    for tokens, layout in ((image_tokens, options["image_layout"]), (text_tokens, options["text_layout"])):
        place = torch.arange(layout.max_seqlen, device=tokens.device)
        rows = layout.starts[:, :1] + torch.minimum(place, layout.lengths.sum(1, keepdim=True) - 1)
        sides.append((tokens.detach()[rows.long()].requires_grad_(), place < layout.lengths.sum(1, keepdim=True)))
    (images, image_here), (texts, text_here) = sides
    lengths = [here.sum(1) for here in (image_here, text_here)]
    pairs = torch.arange(len(images), device=images.device)
    any_two = options.get("similarity") == "max"

    def loss() -> Tensor:
        products = torch.einsum("ipd,jtd->ijpt", images, texts)
        by_image = products.masked_fill(~text_here[None, :, None, :], -torch.inf).max(3).values
        if any_two:
            of_images = by_image.masked_fill(~image_here[:, None, :], -torch.inf).max(2).values
            of_texts = of_images.T
        else:
            by_text = products.masked_fill(~image_here[:, None, :, None], -torch.inf).max(2).values
            of_images = by_image.masked_fill(~image_here[:, None, :], 0).sum(2) / lengths[0][:, None]
            of_texts = (by_text.masked_fill(~text_here[None, :, :], 0).sum(2) / lengths[1]).T
        smoothing = options.get("label_smoothing", 0.0)
        of_sides = (F.cross_entropy(logit_scale * s, pairs, label_smoothing=smoothing) for s in (of_images, of_texts))
        return sum(of_sides) / 2

    inputs = [images, texts] + ([logit_scale] if isinstance(logit_scale, Tensor) else [])
    return loss, inputs


def two_calls(load: Callable[[], Score]) -> Build:
    """FILIP's loss by a kernel for the sums of maxima over one side's tokens, called once for each side."""

    def build(
        image_tokens: Tensor, text_tokens: Tensor, logit_scale: Tensor, image_layout: SegmentLayout, text_layout: SegmentLayout
    ) -> Prepared:
        score, ours = load(), [image_tokens, text_tokens, logit_scale]
        images, texts, scale = inputs = [tensor.detach().clone().requires_grad_() for tensor in ours]
        image_lengths, text_lengths = (layout.lengths.sum(1, keepdim=True) for layout in (image_layout, text_layout))
        pairs = torch.arange(len(image_lengths), device=images.device)

        def loss() -> Tensor:
            of_images = score(images, texts, image_layout, text_layout) / image_lengths
            of_texts = score(texts, images, text_layout, image_layout) / text_lengths
            return (F.cross_entropy(scale * of_images, pairs) + F.cross_entropy(scale * of_texts, pairs)) / 2

        return Prepared(loss, inputs, ours)

    return build


def flash_maxsim() -> Score:
    """flash-maxsim: samples as a padded tensor, which these are where all have as many tokens."""
    score = importlib.import_module("flash_maxsim").flash_maxsim_batched_train

    def call(queries: Tensor, documents: Tensor, query_layout: SegmentLayout, document_layout: SegmentLayout) -> Tensor:
        sides = (queries, query_layout), (documents, document_layout)
        return score(*(tokens.view(layout.num_samples, layout.max_seqlen, -1) for tokens, layout in sides))

    return call


def late_interaction_kernels() -> Score:
    score = importlib.import_module("late_interaction_kernels").maxsim_varlen

    def call(queries: Tensor, documents: Tensor, query_layout: SegmentLayout, document_layout: SegmentLayout) -> Tensor:
        bounds = query_layout.cu_seqlens, document_layout.cu_seqlens
        return score(queries, documents, *bounds, query_layout.max_seqlen, document_layout.max_seqlen)

    return call
