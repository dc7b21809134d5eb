"""What objectives spoil in the picture of a page."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from engine.batch import Sample
from engine.corruption.pages import blank
from engine.sections import require


def require_pixels(config: Any, objective: str) -> None:
    """Refuse a model that does not read the pixels beside the words."""
    joint = config.model.joint
    kind = joint.image.kind if joint is not None and joint.image is not None else None
    require(kind == "grid", f"{objective} blanks parts of pictures: model.joint.image.kind must be grid, got {kind}")


def blank_boxes(sample: Sample, boxes: np.ndarray) -> None:
    """Fill boxes `[n, 4]` of the sample's picture with the mean colour."""
    pixels = sample.image.values[0].permute(1, 2, 0).numpy()
    blanked = np.ascontiguousarray(blank(pixels, boxes).transpose(2, 0, 1))
    sample.image = dataclasses.replace(sample.image, values=torch.from_numpy(blanked)[None])
