"""Other people's ways to the contrastive loss of pairs; each is timed once it has shown that it computes the same."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.core import peers
from vlkernels.core.spec import Peer
from vlkernels.ops.contrastive_loss import functional


def dense(image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Plain PyTorch as open_clip writes it, with the whole matrix of logits."""
    logits = logit_scale * image_features @ text_features.T
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def _open_clip() -> Callable[..., Tensor]:
    return importlib.import_module("open_clip.loss").ClipLoss()


def _inf_cl() -> Callable[..., Tensor]:
    """Its loss is of one direction; called for both."""
    one_way = importlib.import_module("inf_cl").cal_flash_loss

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        image_loss = one_way(image_features, text_features, scale=logit_scale)
        return (image_loss + one_way(text_features, image_features, scale=logit_scale)) / 2

    return loss


def _rival(build: peers.Build) -> Peer:
    return peers.rival(build, functional.contrastive_loss)


DENSE = {"torch": dense}
ALL = {
    "torch": dense,
    "torch compiled": _rival(peers.compiled(peers.loaded(lambda: dense))),
    "open_clip": _rival(peers.loaded(_open_clip)),
    "inf_cl": _rival(peers.loaded(_inf_cl)),
}
TILED = {"inf_cl": ALL["inf_cl"]}  # no other one runs without the whole matrix
