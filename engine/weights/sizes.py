"""What a section of ours and a config.json of `transformers` both say of a stack."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from engine.models.embedding.resnet import BACKBONES
from engine.sections import ImageInput

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
"""Ours by the names that `transformers` knows an activation by; of several the last is written."""
VALUES: dict[str, Mapping[Any, Any]] = {"activation": ACTIVATIONS, "biases": {True: "no_key", False: "all"}}
"""Ours by what a folder says instead, of options that both name otherwise."""


def reads_pixels(stack: Any) -> bool:
    """Whether it reads pictures, and not what a detector has made of them."""
    picture = stack if isinstance(stack, ImageInput) else getattr(stack, "image", None)
    return picture is not None and picture.kind != "regions"


def image_size(picture: ImageInput) -> int | list[int]:
    """Height and width in pixels of the largest picture, or its side."""
    height, width = (side * picture.patch_size for side in picture.max_grid)
    return height if height == width else [height, width]


def type_of_picture(stack: Any) -> int | None:
    """The row of the text's types that its tokens have."""
    picture = getattr(stack, "image", None)
    return None if picture is None else picture.type_of_text


def feed_forward(stack: Any) -> str:
    """As T5 names it: its "gated-gelu" is the approximation by a tanh."""
    if stack.gated and stack.activation == "gelu_tanh":
        return "gated-gelu"
    return f"{'gated-' * stack.gated}{stack.activation}"


def residual(picture: ImageInput) -> tuple[str | None, list[int] | None]:
    """Blocks of a ResNet, and how many every stage has; none of a backbone that is more than one."""
    if not (parts := getattr(BACKBONES[picture.backbone], "args", ())):
        return None, None
    block, depths = parts
    return block.__name__.lower(), list(depths[: picture.stages])


class Pyramid(NamedTuple):
    """A feature pyramid's ResNet, in detectron2's terms."""

    depth: int
    groups: int
    group_width: int
    first_channels: int


PYRAMIDS = {"resnet18_fpn": Pyramid(18, 1, 64, 64), "resnext101_fpn": Pyramid(101, 32, 8, 256)}
"""By the names of our backbones."""

DERIVED: dict[str, Callable[[Any], Any]] = {
    "picture": lambda stack: stack if isinstance(stack, ImageInput) else stack.image,
    "reads_pixels": reads_pixels,
    "image_size": image_size,
    "head_width": lambda stack: stack.width // stack.heads,
    "table_width": lambda stack: stack.embedding_width or stack.width,
    "has_widening": lambda stack: stack.embedding_width is not None,
    "mlp_per_width": lambda stack: stack.mlp_width / stack.width,
    "position_rows": lambda stack: stack.max_positions + stack.position_offset,
    "feed_forward": feed_forward,
    "block": lambda picture: residual(picture)[0],
    "depths": lambda picture: residual(picture)[1],
    "has_types": lambda stack: stack.types > 0,
    "has_relative_position": lambda stack: stack.relative_position is not None,
    "has_relative_box": lambda stack: stack.relative_box is not None,
    "pyramid": lambda picture: PYRAMIDS.get(picture.backbone),
    "has_pyramid": lambda picture: picture.backbone in PYRAMIDS,
    "has_type": lambda picture: picture.type_of_text is not None,
    "type_is_last": lambda stack: type_of_picture(stack) in (None, stack.types - 1),
    "types_of_text": lambda stack: stack.types - (type_of_picture(stack) is not None),
    "edge_width": lambda stack: stack.width // 6,
    "side_width": lambda stack: stack.width // 2 - 2 * (stack.width // 6),
}
"""What is no field of a section, but follows from some."""

ABSENT = object()
MAY_DIFFER = ("eps",)
"""Options that a run keeps as it has them, whatever its weights were trained with: another eps is hardly another model."""


def kept_line(where: str, value: Any, wanted: Any) -> str:
    """What is told of such an option, and of others that are no part of a model."""
    return f"{where} is {value} (the folder: {wanted})"


def option(section: Any, path: str) -> Any:
    """A field, one of a section within, or what follows from some; `ABSENT` where the section has no such field."""

    def step(inner: Any, name: str) -> Any:
        if inner is ABSENT or inner is None:
            return inner
        return DERIVED[name](inner) if name in DERIVED else getattr(inner, name, ABSENT)

    return functools.reduce(step, path.split("."), section)


def spelled(section: Any, path: str) -> str:
    """As the option is written within the section."""
    return path.replace("picture.", "" if isinstance(section, ImageInput) else "image.").replace("pyramid.", "backbone's ")


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
    switches: Mapping[str, tuple[str, ...]] = {}
    """Their names that mean something only where another one is true."""

    def unlike(self, where: str, section: Any, *, whole: bool = False) -> list[str]:
        """What such a model cannot be; of a `whole` one, what a folder has nothing for."""
        return self._unlike(where, section, {**self.always, **(self.alone if whole else {})})

    def _unlike(self, where: str, section: Any, fixed: Mapping[str, Any]) -> list[str]:
        wanted = {path: [value] for path, value in fixed.items()}
        wanted |= {path: list(values.values()) for path, values in VALUES.items() if path in self.same}
        found = {path: option(section, path) for path in wanted}
        return [
            f"{where}.{spelled(section, path)} must be {' or '.join(map(str, wanted[path]))}, got {value}"
            for path, value in found.items()
            if value is not ABSENT and value not in wanted[path]
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
            if path in MAY_DIFFER:
                continue
            value, wanted = option(section, path), settings.get(name)
            if path in VALUES:
                wanted = VALUES[path].get(wanted if isinstance(wanted, bool) else str(wanted), wanted)
            if path == "layers" and wanted is not None:
                wanted = value if shallower and value < wanted else wanted - first
            if value is not ABSENT and value != wanted:
                lines.append(f"{where}.{spelled(section, path)} must be {wanted}, got {value}")
        return lines + self._unlike(where, section, {path: v for path, v in self.always.items() if path not in MAY_DIFFER})

    def kept(self, where: str, section: Any, theirs: Mapping[str, Any]) -> list[str]:
        """What a run may have otherwise than the folder that it begins with."""
        settings, lines = self.completed(theirs), []
        for path in MAY_DIFFER:
            value, wanted = option(section, path), settings.get(self.same.get(path), self.always.get(path))
            if wanted is not None and value not in (ABSENT, wanted):
                lines.append(kept_line(f"{where}.{path}", value, wanted))
        return lines

    def completed(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """With what older folders leave out."""
        settings = {name: value for name, value in theirs.items() if value is not None}
        for name, default in self.defaults.items():
            if name not in settings:
                settings[name] = default(settings) if callable(default) else default
        return settings | dict.fromkeys(self._switched_off(settings))

    def _switched_off(self, settings: Mapping[str, Any]) -> list[str]:
        return [name for switch, names in self.switches.items() if not settings.get(switch) for name in names]

    def config(self, section: Any) -> dict[str, Any]:
        """The entries of a config.json."""
        names = {name: option(section, path) for path, name in {**self.same, **self.written}.items()}
        for path in VALUES.keys() & self.same.keys():
            theirs = {ours: value for value, ours in VALUES[path].items()}
            names[self.same[path]] = theirs[names[self.same[path]]]
        left_out = self._switched_off(names)
        written = {name: value for name, value in names.items() if value is not ABSENT and name not in left_out}
        return written | dict(self.constants)
