"""A picture read without its text, by a stream that else reads both."""

from __future__ import annotations

import numpy as np

from engine.batch import Sample, Words

IMAGE_ALONE = "image_alone"
"""The view that is a text of no tokens."""


def leave_image_alone(sample: Sample) -> None:
    """Add the view."""
    nothing = np.empty(0, dtype=np.int64)
    sample.views[IMAGE_ALONE] = Words(nothing, nothing)
