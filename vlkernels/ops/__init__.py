"""The fused ops; one folder each. A new op is its folder, its line in each list here and one test file."""

from __future__ import annotations

import importlib

from vlkernels.core.spec import OpSpec

FOLDERS: tuple[str, ...] = ()

__all__: list[str] = []


def specs() -> tuple[OpSpec, ...]:
    """Every op's declaration, in the order of :data:`FOLDERS`."""
    return tuple(spec for folder in FOLDERS for spec in importlib.import_module(f"vlkernels.ops.{folder}.spec").SPECS)
