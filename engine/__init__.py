"""The pretraining engine on `vlkernels`: recipes, data, models, objectives and the DeepSpeed ZeRO step."""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import `load` on first use, so that `import engine.config` needs no model code."""
    if name == "load":
        from engine.export import load

        return load
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
