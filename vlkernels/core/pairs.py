"""What losses over all pairs of two sets of features share: checks, partners in tiles, gradients kept by the forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlkernels.core import checks
from vlkernels.core.collectives import ProcessGroup, Rows, gather_rows, locate_rows, scale_gradient
from vlkernels.core.exchange import Block
from vlkernels.core.products import multiply


def check_features(image_features: Tensor, text_features: Tensor, labels: Tensor | None, **numbers: Tensor | float) -> None:
    """Raise unless the features are pairs of rows, ``labels`` one integer per pair and ``numbers`` single numbers."""
    checks.check_shape("image_features", image_features, "[N, D]", (None, None))
    checks.check_floating("image_features", image_features)
    checks.check_shape("text_features", text_features, "[N, D]", tuple(image_features.shape))
    checks.check_dtype("text_features", text_features, (image_features.dtype,))
    if labels is not None:
        checks.check_shape("labels", labels, "[N]", (image_features.shape[0],))
        checks.check_integer("labels", labels)
    tensors = {name: number for name, number in numbers.items() if isinstance(number, Tensor)}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) not in ((), (1,)):
            raise ValueError(f"{name} must be a number or have shape () or (1,), got {list(tensor.shape)}")
    checks.check_same_device(image_features=image_features, text_features=text_features, labels=labels, **tensors)


def locate_pairs(
    own: Tensor, group: ProcessGroup | None, rank_counts: Sequence[int] | None, **options: object
) -> Rows:
    """Where this rank's pairs lie in the concatenated batch, which holds one at least; a rank may have none.

    Of a tensor among the options, which has rows of its own, all ranks must have one of the same dtype or none.
    """
    alike = {name: value.dtype if isinstance(value, Tensor) else value for name, value in options.items()}
    rows = locate_rows(own, group, rank_counts, **alike)
    if rows.total == 0:
        raise ValueError(f"a batch must hold at least one pair, got N = 0 on {'every rank' if group else 'one process'}")
    return rows


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype of similarities, statistics and sums over many pairs."""
    return torch.promote_types(tensor.dtype, torch.float32)


def as_tensor(number: Tensor | float, like: Tensor) -> Tensor:
    return number if isinstance(number, Tensor) else torch.full((), number, dtype=wide(like), device=like.device)


def of_all_ranks(own: Tensor, rows: Rows, rank_reduction: str) -> Tensor:
    """The rows of all ranks; gradients reach this rank's own, scaled for the reduction of parameter gradients."""
    if rows.group is None:
        return own
    others = gather_rows(own, rows)
    return torch.cat((others[: rows.start], scale_gradient(own, gradient_factor(rows, rank_reduction)), others[rows.stop :]))


def gradient_factor(rows: Rows, rank_reduction: str) -> int:
    """What a feature's gradient, and a rank's share of a parameter's, is multiplied by."""
    return rows.world_size if rank_reduction == "mean" else 1


def held_by_all_ranks(number: Tensor | float, like: Tensor, rows: Rows, rank_reduction: str) -> Tensor:
    """A number whose whole gradient every rank forms, which a mean leaves alone and a sum multiplies."""
    scalar = as_tensor(number, like).reshape(())
    return scale_gradient(scalar, gradient_factor(rows, rank_reduction) / rows.world_size)


def partners(tile: Tensor, images: Block, texts: Block) -> Tensor:
    """The entries of a tile that belong to partners; none where the blocks hold no pair."""
    return tile.diagonal(images.start - texts.start)


def shared(images: Block, texts: Block) -> slice:
    """The numbers of the pairs that two blocks both hold."""
    start = max(images.start, texts.start)
    return slice(start, max(start, min(images.span.stop, texts.span.stop)))


def at_least(memory: Tensor, images: Block, texts: Block, size: int) -> Tensor:
    """Memory ``[parts, numbers]`` for any tile of two blocks, as it is when it already suffices."""
    needed = min(size, len(images.features)) * min(size, len(texts.features))
    return memory if memory.shape[1] >= needed else memory.new_empty(memory.shape[0], needed)


def add_product(total: Tensor, weights: Tensor, features: Tensor) -> None:
    """``total += weights features``; bfloat16 multiplies as such (float16 would lose small weights)."""
    if features.dtype == torch.bfloat16:
        total.add_(weights.to(features.dtype) @ features)
    else:
        multiply(weights, features.to(total.dtype), total, add=True)


def fake_loss(features: Sequence[Tensor], numbers: Sequence[Tensor], gradient: bool) -> tuple[Tensor, ...]:
    """What an op returns that keeps its gradients, without values; they are empty when not wanted."""
    loss = features[0].new_empty((), dtype=wide(features[0]))
    if not gradient:
        return loss, *(loss.new_empty(0) for _ in (*features, *numbers))
    return loss, *(loss.new_empty(t.shape) for t in features), *(torch.empty_like(t) for t in numbers)


def keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """``setup_context`` of an op that returns its loss and the gradients of its first arguments."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = tuple(tensor.dtype for tensor in inputs[: len(output) - 1])
    ctx.num_arguments = len(inputs)


def scale_gradients(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """``backward`` of such an op: what the forward kept, times the cotangent."""
    if grad_loss is None:
        return (None,) * ctx.num_arguments
    wanted = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad)
    gradients = tuple((grad_loss * saved).to(dtype) if needed else None for saved, dtype, needed in wanted)
    return gradients + (None,) * (ctx.num_arguments - len(gradients))
