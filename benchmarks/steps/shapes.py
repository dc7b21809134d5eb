"""The systems at three sizes: as published, for a card; shallow and in small batches; tiny, for tests."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.plain_uniter import Sizes, bert
from benchmarks.steps.albef import Albef, base
from benchmarks.steps.albef import Shape as AlbefShape
from benchmarks.steps.clip import Clip, pre_norm
from benchmarks.steps.clip import Shape as ClipShape
from benchmarks.steps.layoutlm import LayoutLM
from benchmarks.steps.layoutlm import Shape as LayoutShape
from benchmarks.steps.system import System
from benchmarks.steps.uniter import Uniter
from engine.sections import Distances


def full() -> list[System]:
    return [
        Uniter(Sizes(), pairs=176, token_budget=10_240),
        LayoutLM(LayoutShape(), pairs=32),
        Clip(ClipShape(), pairs=1024),
        Albef(AlbefShape(), pairs=64),
    ]


def small() -> list[System]:
    return [
        Uniter(Sizes(bert(768, 4, 12)), pairs=32, token_budget=4096),
        LayoutLM(LayoutShape(bert(768, 3, 12)), pairs=4),
        Clip(ClipShape(pre_norm(768, 3, 12), pre_norm(512, 3, 8)), pairs=16),
        Albef(AlbefShape(base(768, (3, 2, 1), 12)), pairs=4),
    ]


def tiny() -> list[System]:
    buckets = Distances(8, 16), Distances(16, 64)
    clip = ClipShape(pre_norm(64, 2, 4), pre_norm(32, 2, 4), vocab_size=99, patch=4, grid=3, features=16)
    return [
        Uniter(Sizes(bert(32, 2, 4), vocab_size=120, feature_values=20, classes=9), pairs=8, token_budget=960),
        LayoutLM(LayoutShape(bert(48, 2, 4), *buckets, vocab_size=120, positions=40, grid=3, channels=8), pairs=4, median=12),
        Clip(clip, pairs=8),
        Albef(AlbefShape(base(32, (2, 1, 1), 2, patch=4, grid=3), vocab_size=120), pairs=4),
    ]


SIZES: dict[str, Callable[[], list[System]]] = {"full": full, "small": small, "tiny": tiny}


def systems(size: str) -> list[System]:
    return SIZES[size]()
