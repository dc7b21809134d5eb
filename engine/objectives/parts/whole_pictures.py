"""What a loss that knows where things are asks of the pictures."""

from __future__ import annotations

from typing import Any

from engine.sections import require


def require_whole_pictures(name: str, data: Any) -> None:
    """Refuse what moves, mirrors or cuts what an objective has places of; `data` is the section."""
    moved = {
        "random_crop": data.random_crop != "none",
        "flip": data.flip,
        "augment": data.augment != "none",
        "resize": data.resize == "shorter",
        "max_patches": data.max_patches is not None,
        "regions": data.regions is not None,
    }
    given = [f"data.{option}" for option, given in moved.items() if given]
    require(not given, f"objectives.{name} knows where things are in the whole picture: leave out {', '.join(given)}")
