"""Initial weights, as the published systems draw them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from engine.models.embedding import TextEmbedder
from engine.models.features import FeatureHead
from engine.models.transformer import CrossAttention, FeedForward, PackedTransformer, SelfAttention

Rule = Callable[[nn.Module], None]


@torch.no_grad()
def initialize(model: nn.Module, std: float, kind: str = "normal") -> None:
    """Matrices and tables normal with standard deviation `std`, convolutions by what each value goes to (He et al., 2015),
    biases of both zero; then what `kind` draws otherwise (`model.initialization` explains them)."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=std)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            module.bias.zero_()
    if kind != "normal":
        RULES[kind](model)


def _depth_scaled(model: nn.Module) -> None:
    for stack in _stacks(model):
        for sublayer in _sublayers(stack):
            sublayer.output.weight.mul_((2 * stack.layers) ** -0.5)


def _clip(model: nn.Module) -> None:
    for stack in _stacks(model):
        for sublayer in _sublayers(stack):
            width = sublayer.output.out_features
            sublayer.output.weight.normal_(std=(2 * stack.layers * width) ** -0.5)
            for weight in _entries(sublayer):
                weight.normal_(std=((2 if isinstance(sublayer, FeedForward) else 1) * width) ** -0.5)
    for module in model.modules():
        if isinstance(module, FeatureHead) and module.projection is not None:
            module.projection.weight.normal_(std=module.projection.in_features**-0.5)
        if isinstance(module, TextEmbedder) and isinstance(module.positions, nn.Parameter):
            module.positions.normal_(std=0.01)


def _xavier(model: nn.Module) -> None:
    fused: dict[nn.Module, int] = {}  # maps that stand for several
    for module in model.modules():
        if isinstance(module, SelfAttention):
            fused[module.query_key_value] = 3
        elif isinstance(module, CrossAttention):
            fused[module.key_value] = 2
        elif isinstance(module, FeedForward) and module.gated:
            fused[module.inner] = 2
    for module in model.modules():
        if isinstance(module, nn.Linear):
            for weight in module.weight.chunk(fused.get(module, 1)):
                nn.init.xavier_uniform_(weight)


def _t5(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, TextEmbedder):
            module.words.normal_(std=1.0)
    for stack in _stacks(model):
        for sublayer in _sublayers(stack):
            width = sublayer.output.out_features
            sublayer.output.weight.normal_(std=sublayer.output.in_features**-0.5)
            for weight in _entries(sublayer):
                weight.normal_(std=width**-0.5)
            if not isinstance(sublayer, FeedForward):  # no softmax scale: it is in the queries
                _queries(sublayer).mul_((sublayer.output.in_features // sublayer.heads) ** -0.5)
        if stack.distances is not None:
            for table in stack.distances.parameters():
                table.normal_(std=stack.blocks[0].self_attention.output.out_features ** -0.5)


RULES: dict[str, Rule] = {"depth_scaled": _depth_scaled, "clip": _clip, "xavier": _xavier, "t5": _t5}


def _stacks(model: nn.Module) -> Iterator[PackedTransformer]:
    return (module for module in model.modules() if isinstance(module, PackedTransformer))


def _sublayers(stack: PackedTransformer) -> Iterator[SelfAttention | CrossAttention | FeedForward]:
    kinds = SelfAttention, CrossAttention, FeedForward
    return (module for module in stack.modules() if isinstance(module, kinds))


def _entries(sublayer: SelfAttention | CrossAttention | FeedForward) -> list[Tensor]:
    """The weights that read the stream or the source."""
    if isinstance(sublayer, FeedForward):
        return [sublayer.inner.weight]
    if isinstance(sublayer, SelfAttention):
        return [sublayer.query_key_value.weight]
    return [sublayer.query.weight, sublayer.key_value.weight]


def _queries(attention: SelfAttention | CrossAttention) -> Tensor:
    if isinstance(attention, CrossAttention):
        return attention.query.weight
    return attention.query_key_value.weight[: attention.output.in_features]
