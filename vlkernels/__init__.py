"""Fused kernels for vision-language pretraining."""

from vlkernels import integrations, ops
from vlkernels.core import native
from vlkernels.core.dispatch import recorded
from vlkernels.core.layout import SegmentLayout
from vlkernels.core.mask import SegmentMask
from vlkernels.core.random import Rng
from vlkernels.integrations.swap import swap
from vlkernels.ops import *  # noqa: F403

native.load()

__all__ = ["Rng", "SegmentLayout", "SegmentMask", "integrations", "recorded", "swap", *ops.__all__]
