"""What a section of ours and a config.json of `transformers` both say of a stack."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from engine.sections import ImageInput

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
"""Ours by the names that `transformers` knows an activation by; of several the last is written."""


def image_size(picture: ImageInput) -> int | list[int]:
    """Height and width in pixels of the largest picture, or its side."""
    height, width = (side * picture.patch_size for side in picture.max_grid)
    return height if height == width else [height, width]


def feed_forward(stack: Any) -> str:
    """As T5 names it: its "gated-gelu" is the approximation by a tanh."""
    if stack.gated and stack.activation == "gelu_tanh":
        return "gated-gelu"
    return f"{'gated-' * stack.gated}{stack.activation}"


DERIVED: dict[str, Callable[[Any], Any]] = {
    "picture": lambda stack: stack if isinstance(stack, ImageInput) else stack.image,
    "image_size": image_size,
    "head_width": lambda stack: stack.width // stack.heads,
    "table_width": lambda stack: stack.embedding_width or stack.width,
    "has_widening": lambda stack: stack.embedding_width is not None,
    "mlp_per_width": lambda stack: stack.mlp_width / stack.width,
    "position_rows": lambda stack: stack.max_positions + stack.position_offset,
    "feed_forward": feed_forward,
    "has_types": lambda stack: stack.types > 0,
}
"""What is no field of a section, but follows from some."""

ABSENT = object()


def option(section: Any, path: str) -> Any:
    """A field, one of a section within, or what follows from some; `ABSENT` where the section has no such field."""

    def step(inner: Any, name: str) -> Any:
        if inner is ABSENT or inner is None:
            return inner
        return DERIVED[name](inner) if name in DERIVED else getattr(inner, name, ABSENT)

    return functools.reduce(step, path.split("."), section)


def spelled(section: Any, path: str) -> str:
    """As the option is written within the section."""
    return path.replace("picture.", "" if isinstance(section, ImageInput) else "image.")


class Sizes(NamedTuple):
    """What must agree, what such a model always has, and what is written without being compared."""

    same: Mapping[str, str]
    """Their name by ours."""
    always: Mapping[str, Any] = {}
    """The only value of ours that such a model can have."""
    alone: Mapping[str, Any] = {}
    """Those that are asked for only where a whole model becomes a folder: parts that a folder has nothing for."""
    written: Mapping[str, str] = {}
    """Their name by ours, of what may differ: rows of tables, dropout."""
    constants: Mapping[str, Any] = {}
    """What theirs must say."""
    defaults: Mapping[str, Any] = {}
    """What older folders leave out, or what follows from the others."""

    def unlike(self, where: str, section: Any, *, whole: bool = False) -> list[str]:
        """What such a model cannot be; of a `whole` one, what a folder has nothing for."""
        wanted = {**self.always, **(self.alone if whole else {})}
        found = {path: option(section, path) for path in wanted}
        return [
            f"{where}.{spelled(section, path)} must be {wanted[path]}, got {value}"
            for path, value in found.items()
            if value is not ABSENT and value != wanted[path]
        ]

    def differing(
        self, where: str, section: Any, theirs: Mapping[str, Any], first: int = 0, shallower: bool = False
    ) -> list[str]:
        """What is otherwise in a folder, of whose layers ours begins with the `first`; a `shallower` one may stop early."""
        settings = self.completed(theirs)
        lines = [
            f"{name} of the folder must be {wanted}, got {settings.get(name)}"
            for name, wanted in self.constants.items()
            if settings.get(name) != wanted
        ]
        for path, name in self.same.items():
            value, wanted = option(section, path), settings.get(name)
            if path == "activation":
                wanted = ACTIVATIONS.get(str(wanted), wanted)
            if path == "layers" and wanted is not None:
                wanted = value if shallower and value < wanted else wanted - first
            if value is not ABSENT and value != wanted:
                lines.append(f"{where}.{spelled(section, path)} must be {wanted}, got {value}")
        return lines + self.unlike(where, section)

    def completed(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """With what older folders leave out."""
        settings = {name: value for name, value in theirs.items() if value is not None}
        for name, default in self.defaults.items():
            if name not in settings:
                settings[name] = default(settings) if callable(default) else default
        return settings

    def config(self, section: Any) -> dict[str, Any]:
        """The entries of a config.json."""
        names = {name: option(section, path) for path, name in {**self.same, **self.written}.items()}
        if (activation := self.same.get("activation")) in names:
            spelled = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
            names[activation] = spelled[names[activation]]
        return {name: value for name, value in names.items() if value is not ABSENT} | dict(self.constants)
