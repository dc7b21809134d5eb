"""Feature pyramids of detectron2, through which pictures of LayoutLMv2 go. The names are by its source: no file of theirs is
opened by a test, because the library is not installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from engine.models.embedding.resnet import BACKBONES
from engine.weights.family import Part, Place
from engine.weights.pieces import Piece, beneath
from engine.weights.reshaped import BlueFirst
from engine.weights.sizes import Sizes

SECTION = "detectron2_config_args"
FIRST = 2
"""Of detectron2's numbers of stages: the logarithm of how much smaller their maps are."""
LEVELS = ["res2", "res3", "res4", "res5"]
STEM = "bottom_up.stem.conv1.weight"


def pyramid(names: Iterable[str]) -> Iterator[Piece]:
    """A `FinestPyramidLevel` of these tensors of detectron2's `FPN`, which also has an output for every coarser level."""
    for name in names:
        theirs = _theirs(name)
        yield (BlueFirst if theirs == STEM else Piece)(name, (theirs,))


def _theirs(name: str) -> str:
    """`bottom_up.layer2.0.bn3.bias` is `bottom_up.res3.0.conv3.norm.bias`, `lateral.1.bias` is `fpn_lateral3.bias`."""
    part, *inner, kind = name.split(".")
    if part == "output":
        return f"fpn_output{FIRST}.{kind}"
    if part == "lateral":
        return f"fpn_lateral{FIRST + int(inner[0])}.{kind}"
    *where, module = inner
    if not where:
        return f"bottom_up.stem.{_convolution(module)}.{kind}"
    stage, block, *short_cut = where
    convolution = f"shortcut{'.norm' * int(module)}" if short_cut else _convolution(module)
    return f"bottom_up.res{FIRST - 1 + int(stage.removeprefix('layer'))}.{block}.{convolution}.{kind}"


def _convolution(module: str) -> str:
    """A norm is a part of the convolution before it."""
    return f"conv{module[-1]}{'.norm' * module.startswith('bn')}"


def _backbone(place: Place) -> Iterator[Piece]:
    with torch.device("meta"):
        names = list(BACKBONES[place.stack.image.backbone]().state_dict())
    return place.beneath("layoutlmv2.visual.backbone", beneath("embedder.backbone", "", pyramid(names)))


SHAPE = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.OUT_FEATURES": LEVELS,
    "MODEL.FPN.IN_FEATURES": LEVELS,
}
PART = Part(
    ("joint",),
    Sizes(
        same={
            "image.pyramid.depth": "MODEL.RESNETS.DEPTH",
            "image.pyramid.groups": "MODEL.RESNETS.NUM_GROUPS",
            "image.pyramid.group_width": "MODEL.RESNETS.WIDTH_PER_GROUP",
            "image.pyramid.first_channels": "MODEL.RESNETS.RES2_OUT_CHANNELS",
        },
        constants=SHAPE,
        defaults={
            **SHAPE,
            "MODEL.RESNETS.DEPTH": 101,
            "MODEL.RESNETS.NUM_GROUPS": 32,
            "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
            "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
        },
    ),
    _backbone,
    SECTION,
)
DETECTOR = {
    "MODEL.MASK_ON": True,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.NUM_CLASSES": 5,
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 14,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 7,
}
"""The detector that is built around the backbone, and thrown away, where the folder is opened."""
MEAN, STD = "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"
NORMALIZATION = {MEAN: [103.53, 116.28, 123.675], STD: [57.375, 57.12, 58.395]}
"""Of bytes, blue first, where a folder does not say."""


def normalization(mean: Iterable[float], std: Iterable[float]) -> dict[str, list[float]]:
    """Of shares of red, green and blue."""
    return {name: [255 * value for value in reversed(list(values))] for name, values in ((MEAN, mean), (STD, std))}


def read_normalization(config: Mapping[str, Any]) -> tuple[list[float], ...]:
    """The mean and the deviation that a config.json tells, as shares of red, green and blue."""
    told = {**NORMALIZATION, **(config.get(SECTION) or {})}
    return tuple([value / 255 for value in reversed(told[name])] for name in (MEAN, STD))
