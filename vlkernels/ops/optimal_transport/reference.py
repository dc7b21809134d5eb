"""The definition of the transport distance: padded samples, cosine costs, proximal steps, plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core.layout import SegmentLayout
from vlkernels.core.products import outside_autocast

SMALLEST_NORM = 1e-5
SMALLEST_SHARE = 1e-35  # of a pair in the plan: one that underflowed could never be taken up again (MATH.md)


def optimal_transport(
    image_tokens: Tensor,
    text_tokens: Tensor,
    *,
    image_layout: SegmentLayout,
    text_layout: SegmentLayout,
    image_segment: int = 0,
    text_segment: int = 0,
    beta: float = 0.5,
    iterations: int = 50,
) -> Tensor:
    where = image_layout, text_layout, image_segment, text_segment
    costs = cosine_costs(image_tokens, text_tokens, *where)
    plans = transport_plans(costs.detach(), *where, beta, iterations)
    return (plans * costs).sum((1, 2))


def cosine_costs(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_layout: SegmentLayout,
    text_layout: SegmentLayout,
    image_segment: int = 0,
    text_segment: int = 0,
) -> Tensor:
    """``[B, M, N]``: one minus the cosine of every text token (row) and image token (column) of a sample."""
    images = _unit(padded_rows(image_tokens, image_layout, image_segment))
    texts = _unit(padded_rows(text_tokens, text_layout, text_segment))
    with outside_autocast(texts):
        return 1 - texts @ images.transpose(1, 2)


@torch.no_grad()
def transport_plans(
    costs: Tensor,
    image_layout: SegmentLayout,
    text_layout: SegmentLayout,
    image_segment: int = 0,
    text_segment: int = 0,
    beta: float = 0.5,
    iterations: int = 50,
) -> Tensor:
    """``[B, M, N]``: the plans after so many steps of one Sinkhorn update each, zero in the padding."""
    _, longest_text, longest_image = costs.shape
    is_text, text_lengths = _presence(text_layout, text_segment, longest_text, costs)
    is_image, image_lengths = _presence(image_layout, image_segment, longest_image, costs)
    is_pair = is_text[:, :, None] & is_image[:, None, :]
    kernel = torch.where(is_pair, torch.exp(-costs / beta), 0)
    plans = torch.where(is_pair, torch.ones_like(costs), 0)
    text_scale = torch.where(is_text, 1 / text_lengths, 0)
    for _ in range(iterations):
        weighted = kernel * plans.clamp_min(SMALLEST_SHARE)
        image_sums = (weighted * text_scale[:, :, None]).sum(1)
        image_scale = torch.where(is_image, 1 / (image_lengths * image_sums), 0)
        text_sums = (weighted * image_scale[:, None, :]).sum(2)
        text_scale = torch.where(is_text, 1 / (text_lengths * text_sums), 0)
        plans = image_scale[:, None, :] * weighted * text_scale[:, :, None]
    return torch.where(is_pair, plans, 0)  # opposite an empty side the scales are infinite


def padded_rows(tokens: Tensor, layout: SegmentLayout, segment: int) -> Tensor:
    """``[B, longest, D]``: the rows of one segment of every sample, zeros past its end."""
    offset = torch.arange(layout.max_segment_lengths[segment], dtype=torch.int32, device=layout.device)
    starts, lengths = layout.starts[:, segment, None], layout.lengths[:, segment, None]
    rows = torch.where(offset < lengths, starts + offset, len(tokens))  # len(tokens): the zeros appended
    return torch.cat((tokens, tokens.new_zeros(1, tokens.shape[1])))[rows.long()]


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=2, eps=SMALLEST_NORM)


def _presence(layout: SegmentLayout, segment: int, longest: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the padded places hold a token, bool ``[B, longest]``, and how many do, ``[B, 1]``."""
    lengths = layout.lengths[:, segment, None]
    return torch.arange(longest, device=layout.device) < lengths, lengths.to(like.dtype)
