"""Mask tables of streams, by the names of their segments."""

from __future__ import annotations

from collections.abc import Sequence

import vlkernels as vk

TEXT = "text"


def mask_table(kind: str, segments: Sequence[str]) -> vk.SegmentMask | None:
    """Which segment sees which; `None`: all see all.

    causal: no token sees a later one, text comes last wherever it lies. prefix: text sees all else and its own past, all
    else sees all but the text. separate: segments of one name see each other alone.
    """
    if kind == "full":
        return None
    cell = {"causal": _causal, "prefix": _prefix, "separate": _separate}[kind]
    return vk.SegmentMask([[cell(segments, q, k) for k in range(len(segments))] for q in range(len(segments))])


def _causal(segments: Sequence[str], q: int, k: int) -> str:
    if q == k:
        return "causal"
    if TEXT in (segments[q], segments[k]):
        return "full" if segments[q] == TEXT else "none"
    return "full" if q > k else "none"


def _prefix(segments: Sequence[str], q: int, k: int) -> str:
    if q == k == segments.index(TEXT):
        return "causal"
    return "none" if segments[k] == TEXT else "full"


def _separate(segments: Sequence[str], q: int, k: int) -> str:
    return "full" if segments[q] == segments[k] else "none"
