"""What the losses of open_clip compute, stated for all ranks in one process, in plain PyTorch."""

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F


def clip_losses(images, texts, scales, local_loss, gather_with_grad):
    """The loss of every rank. What a rank has gathered without a gradient is a constant to it, and its own rows are
    none only where it compares the rows of all ranks."""

    def seen_by(rank, features):
        return torch.cat([
            f if gather_with_grad or (other == rank and not local_loss) else f.detach() for other, f in enumerate(features)
        ])

    losses = []
    for rank, scale in enumerate(scales):
        every_image, every_text = seen_by(rank, images), seen_by(rank, texts)
        queries = (images[rank], texts[rank]) if local_loss else (every_image, every_text)
        first = rank * len(images[rank]) if local_loss else 0
        partners = torch.arange(first, first + len(queries[0]))
        of_images = F.cross_entropy(scale * queries[0] @ every_text.T, partners)
        of_texts = F.cross_entropy(scale * queries[1] @ every_image.T, partners)
        losses.append((of_images + of_texts) / 2)
    return losses


def siglip_losses(images, texts, scales, biases):
    """The loss of every rank: its images with the texts of all ranks, over the number of its own pairs."""
    losses = []
    for rank, (scale, bias) in enumerate(zip(scales, biases, strict=True)):
        logits = scale * images[rank] @ torch.cat(texts).T + bias
        signs = torch.full_like(logits, -1)
        own = torch.arange(len(images[rank]))
        signs[own, rank * len(own) + own] = 1
        losses.append(-F.logsigmoid(signs * logits).sum() / len(own))
    return losses


def installed() -> ModuleType | None:
    """open_clip's own losses where it is installed: their file alone, which needs nothing but PyTorch."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        return None
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).parent / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
