"""The losses of open_clip under their own names, over the losses of vlkernels: no matrix of all similarities is stored.

Constructors, calls, the value and the gradients of each rank are open_clip's, which are not those of ``vk.contrastive_loss``
and ``vk.sigmoid_loss`` over a group: a mode says which rank's loss reaches which features. Values are float32 also for half
types. As in open_clip ranks meet on the default group and hold equally many pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlkernels.core.collectives import ProcessGroup, Rows, gather_rows, locate_rows
from vlkernels.core.pairs import of_all_ranks
from vlkernels.ops.contrastive_loss import contrastive_loss
from vlkernels.ops.linear_cross_entropy import linear_cross_entropy
from vlkernels.ops.sigmoid_loss import sigmoid_loss

EXCHANGES = ("bidir", "shift", "reduce", "gather")

Loss = Tensor | dict[str, Tensor]


class ClipLoss(nn.Module):
    """``open_clip.ClipLoss``: symmetric InfoNCE of the rows of all ranks.

    * by default a rank's value is the loss of the whole batch, and its features have that loss's gradient;
    * ``gather_with_grad``: features have it times the number of ranks, since the loss of every rank reaches them;
    * ``local_loss``: a rank's value is the mean over its own rows, which are compared with constants;
    * both: the same value, and the losses of all ranks reach the features.

    The gradient of ``logit_scale`` is always that of the rank's own value. With ``gather_with_grad`` alone a rank takes the
    cotangents of the others for equal to its own, as those of a loss are. ``logit_bias`` moves no softmax: its gradient is 0.

    Example::

        loss = vk.integrations.open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ):
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod must be False: ranks meet through torch.distributed")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Loss:
        group = _group(self.rank, self.world_size)
        features = image_features, text_features
        if group is None:
            loss = contrastive_loss(*features, logit_scale)
        elif self.local_loss:
            loss = _loss_of_own_rows(*features, logit_scale, group, self.gather_with_grad)
        else:
            loss = _loss_of_all_rows(*features, logit_scale, group, self.gather_with_grad)
        if isinstance(logit_bias, Tensor):
            loss = loss + 0 * logit_bias.reshape(())  # it takes part in the graph, as every parameter must under DDP
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits per image and per text, stored whole, for whoever wants to look at them: the loss needs none."""
        queries = every = image_features, text_features
        group = _group(self.rank, self.world_size)
        if group is not None:
            rows = locate_rows(image_features, group, None)
            every = tuple(self._gather(features, rows) for features in queries)
            queries = queries if self.local_loss else every
        bias = 0.0 if logit_bias is None else logit_bias
        per_image = logit_scale * queries[0] @ every[1].T + bias
        return per_image, logit_scale * queries[1] @ every[0].T + bias

    def get_ground_truth(self, device: torch.device | str, num_logits: int) -> Tensor:
        """The column of every row's partner among the logits."""
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(first, first + num_logits, device=device)

    def _gather(self, features: Tensor, rows: Rows) -> Tensor:
        """Of all ranks; without ``gather_with_grad`` constants, of which a rank's own rows are none where they are queries."""
        if self.gather_with_grad:
            return _Gathered.apply(features, rows)
        return gather_rows(features, rows) if self.local_loss else of_all_ranks(features, rows, "sum")


class SigLipLoss(nn.Module):
    """``open_clip.SigLipLoss``: a rank's value is its images' share of the sigmoid loss, over the number of its own pairs.

    The losses of all ranks reach a rank's texts. ``dist_impl`` only says how open_clip sends texts around, and ``chunk_size``
    what it stores at once: values and gradients are the same for all. Here texts are gathered and logits never stored.

    Example::

        loss = vk.integrations.open_clip.SigLipLoss(rank=rank, world_size=world_size)
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ):
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or EXCHANGES[0]
        self.chunk_size = chunk_size
        if self.dist_impl not in EXCHANGES:
            raise ValueError(f"dist_impl must be one of {', '.join(EXCHANGES)}, got {dist_impl!r}")

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Loss:
        group = _group(self.rank, self.world_size)
        loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        if group is not None:
            rows = locate_rows(text_features, group, None)
            for rank, texts in enumerate(_Gathered.apply(text_features, rows).chunk(self.world_size)):
                if rank != self.rank:
                    loss = loss + self._loss(image_features, texts, logit_scale, logit_bias, negative_only=True)
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """Logits of these images and texts, stored whole, for whoever wants to look at them: the loss needs none."""
        return logit_scale * image_features @ text_features.T + (0.0 if logit_bias is None else logit_bias)

    def get_ground_truth(
        self, device: torch.device | str, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """``[num_logits, num_logits]``: 1 for partners, unless ``negative_only``, and -1 for others."""
        labels = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """Of equally many images and texts: partners are in equal rows, or, with ``negative_only``, nowhere."""
        bias = 0.0 if logit_bias is None else logit_bias
        loss = sigmoid_loss(image_features, text_features, logit_scale, logit_bias=bias)
        if not negative_only:
            return loss
        products = (image_features.to(loss.dtype) * text_features.to(loss.dtype)).sum(1)
        as_partners = products.mean() * logit_scale + bias
        return loss + as_partners.reshape(())  # softplus(x) = softplus(-x) + x


def _group(rank: int, world_size: int) -> ProcessGroup | None:
    """open_clip's losses meet on the default group; ``None`` for one process."""
    if world_size == 1:
        return None
    if not dist.is_initialized():
        raise ValueError(f"world_size = {world_size} needs a process group: call torch.distributed.init_process_group first")
    group = dist.group.WORLD
    if (rank, world_size) != (group.rank(), group.size()):
        raise ValueError(
            f"rank and world_size must be those of the default process group, {group.rank()} of {group.size()}, "
            f"got {rank} of {world_size}"
        )
    return group


def _loss_of_all_rows(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, group: ProcessGroup, gather_with_grad: bool
) -> Tensor:
    reduction = "mean" if gather_with_grad else "sum"
    if not (isinstance(logit_scale, Tensor) and logit_scale.requires_grad and torch.is_grad_enabled()):
        return contrastive_loss(image_features, text_features, logit_scale, group=group, rank_reduction=reduction)
    scale = logit_scale.detach().requires_grad_()
    loss = contrastive_loss(image_features, text_features, scale, group=group, rank_reduction=reduction)
    (gradient,) = torch.autograd.grad(loss, scale, retain_graph=True)  # a share of it, which the forward has formed
    dist.all_reduce(gradient, group=group)
    return _WithGradient.apply(loss, logit_scale, gradient / group.size() if gather_with_grad else gradient)


def _loss_of_own_rows(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, group: ProcessGroup, gather_with_grad: bool
) -> Tensor:
    rows = locate_rows(image_features, group, None)
    gather = _Gathered.apply if gather_with_grad else gather_rows
    every_image, every_text = gather(image_features, rows), gather(text_features, rows)
    scale = logit_scale.reshape(()) if isinstance(logit_scale, Tensor) else logit_scale
    partners = torch.arange(rows.start, rows.stop, device=image_features.device)
    of_images = linear_cross_entropy(scale * image_features, every_text, partners)
    of_texts = linear_cross_entropy(scale * text_features, every_image, partners)
    return (of_images + of_texts) / 2


class _Gathered(torch.autograd.Function):
    """The rows of all ranks; the gradient of a rank's own is the sum of what all ranks have for them."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return gather_rows(own, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = torch.empty_like(grad[ctx.rows.own])
        dist.reduce_scatter(own, list(grad.contiguous().chunk(ctx.rows.world_size)), group=ctx.rows.group)
        return own, None


class _WithGradient(torch.autograd.Function):
    """``loss`` itself, of which ``number`` has the gradient that is given."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, number: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad, grad * gradient, None
