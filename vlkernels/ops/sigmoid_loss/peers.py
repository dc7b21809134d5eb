"""Other people's sigmoid loss. Those that must be imported are functions that import them and return the call."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Tensor]


def eager(image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float) -> Tensor:
    """Plain PyTorch with the whole matrix of logits."""
    logits = logit_scale * image_features @ text_features.T + logit_bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - torch.ones_like(logits)
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def open_clip() -> Loss:
    """open_clip's SigLipLoss in one process, which keeps the whole matrix too."""
    return importlib.import_module("open_clip.loss").SigLipLoss()


def siglip_kernel() -> Loss:
    """siglip-kernel, which asks for the logarithm of the scale: products of chunks and a Triton kernel for their losses."""
    fused = importlib.import_module("siglip_kernel").fused_siglip_loss

    def call(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        return fused(image_features, text_features, logit_scale.log(), logit_bias)

    return call
