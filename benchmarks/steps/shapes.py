"""The systems at three sizes: published, for a card; a third as deep, for a CPU; tiny, for tests."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.plain_uniter import Sizes, bert
from benchmarks.steps.albef import Albef, base
from benchmarks.steps.albef import Shape as AlbefShape
from benchmarks.steps.clip import Clip, pre_norm
from benchmarks.steps.clip import Shape as ClipShape
from benchmarks.steps.system import System
from benchmarks.steps.uniter import Uniter


def full() -> list[System]:
    return [
        Uniter(Sizes(), pairs=176, token_budget=10_240),
        Clip(ClipShape(), pairs=1024),
        Albef(AlbefShape(), pairs=64),
    ]


def small() -> list[System]:
    return [
        Uniter(Sizes(bert(768, 4, 12)), pairs=16, token_budget=2048),
        Clip(ClipShape(pre_norm(768, 4, 12), pre_norm(512, 4, 8)), pairs=16),
        Albef(AlbefShape(base(768, (4, 2, 2), 12)), pairs=4),
    ]


def tiny() -> list[System]:
    clip = ClipShape(pre_norm(64, 2, 4), pre_norm(32, 2, 4), vocab_size=99, patch=4, grid=3, features=16)
    return [
        Uniter(Sizes(bert(32, 2, 4), vocab_size=120, feature_values=20, classes=9), pairs=8, token_budget=960),
        Clip(clip, pairs=8),
        Albef(AlbefShape(base(32, (2, 1, 1), 2, patch=4, grid=3), vocab_size=120), pairs=4),
    ]


SIZES: dict[str, Callable[[], list[System]]] = {"full": full, "small": small, "tiny": tiny}


def systems(size: str) -> list[System]:
    return SIZES[size]()
