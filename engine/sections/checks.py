"""One-line refusals: they name the option as it is written on the command line."""

from __future__ import annotations

from typing import Any


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition`."""
    if not condition:
        raise ValueError(message)


def require_positive(section: Any, prefix: str, *names: str) -> None:
    """Refuse a field of `section` that is given and not above 0."""
    for name in names:
        value = getattr(section, name)
        require(value is None or value > 0, f"{prefix}.{name} must be positive, got {value}")


def require_not_negative(section: Any, prefix: str, *names: str) -> None:
    """Refuse a field of `section` below 0."""
    for name in names:
        value = getattr(section, name)
        require(value >= 0, f"{prefix}.{name} must not be negative, got {value}")


def require_share(name: str, value: float) -> None:
    """A probability that may be 0 but not 1 (dropout of everything divides by zero)."""
    require(0.0 <= value < 1.0, f"{name} must be in [0, 1), got {value}")
