"""Convolutional backbones: ResNet's."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.models.embedding.resnet import BACKBONES
from engine.weights.family import Family, Part, Place
from engine.weights.pieces import Piece, beneath
from engine.weights.sizes import Sizes, option

KINDS = {"conv": "convolution", "bn": "normalization"}


def resnet(backbone: str) -> Iterator[Piece]:
    """A backbone of `ResNetModel`'s tensors, with the statistics of its norms."""
    with torch.device("meta"):
        names = BACKBONES[backbone]().state_dict()
    for name in names:
        yield Piece(name, (_theirs(name),))


def _theirs(name: str) -> str:
    """`layer2.0.conv3.weight` is `encoder.stages.1.layers.0.layer.2.convolution.weight`."""
    *where, module, kind = name.split(".")
    if not where:
        return f"embedder.embedder.{KINDS[module[:-1]]}.{kind}"
    stage, block, *short_cut = where
    if short_cut:
        layer = f"shortcut.{tuple(KINDS.values())[int(module)]}"
    else:
        layer = f"layer.{int(module[-1]) - 1}.{KINDS[module[:-1]]}"
    return f"encoder.stages.{int(stage.removeprefix('layer')) - 1}.layers.{block}.{layer}.{kind}"


def _backbone(place: Place) -> Iterator[Piece]:
    pieces = beneath("embedder.backbone", "", resnet(option(place.stack, "picture.backbone")))
    return place.beneath("resnet", pieces)


PLAIN = {"downsample_in_first_stage": False, "downsample_in_bottleneck": False}
RESNET = Family(
    name="resnet",
    kind="resnet",
    classes={"ResNetForImageClassification": (), "ResNetModel": ()},
    parts=(
        Part(
            ("image", "joint"),
            Sizes(
                same={"picture.block": "layer_type", "picture.depths": "depths"},
                always={"picture.kind": "grid"},
                constants=PLAIN,
                defaults={**PLAIN, "layer_type": "bottleneck", "depths": [3, 4, 6, 3]},
            ),
            _backbone,
        ),
    ),
    prefix="resnet.",
    is_written=False,
)
