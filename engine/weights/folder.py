"""A folder that weights come from: of `transformers`, or of a finished run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.sections import require
from engine.weights.family import Family
from engine.weights.vocabulary import read_words


class Folder(NamedTuple):
    """Its config.json and its tensors; `asked` is the option that named it, for what is told."""

    asked: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    words: dict[str, int] | None
    """Ids by token, where it has a tokenizer."""
    processor: dict[str, Any]
    """How pictures are prepared, where it says so."""

    @classmethod
    def read(cls, asked: str, path: Path) -> Folder:
        config = path / "config.json"
        what = "it must be a folder of `transformers` or of a finished run"
        require(config.is_file(), f"{asked}: {path} has no config.json: {what}")
        prepared = path / "preprocessor_config.json"
        processor = _read_object(asked, prepared) if prepared.is_file() else {}
        return cls(asked, path, _read_object(asked, config), _read_tensors(asked, path), _read_words(asked, path), processor)

    @property
    def is_run(self) -> bool:
        """Whether it is what a run has ended in."""
        return "model_type" not in self.config and "objectives" in self.config

    def require(self, condition: bool, told: str) -> None:
        require(condition, f"{self.asked}: {self.path} {told}")

    def named_for(self, family: Family) -> Folder:
        """The same with the names of a family's pieces."""
        return self._replace(tensors=renamed(self.tensors, family))


def renamed(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """As the classes of `transformers` name them today, in the whole model."""
    is_bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in tensors)
    found = {}
    for name, tensor in tensors.items():
        name = family.prefix + name if is_bare else name
        for published, ours in (*family.older, *family.spellings):
            name = name.replace(published, ours)
        found[name] = tensor
    return found


def spelled(name: str, family: Family) -> str:
    """As files spell what we name as the classes of today."""
    for published, ours in family.spellings:
        name = name.replace(ours, published)
    return name


def _read_object(asked: str, file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{asked}: {file} cannot be read ({error})") from None
    require(isinstance(settings, dict), f"{asked}: {file} must be an object")
    return settings


def _read_words(asked: str, path: Path) -> dict[str, int] | None:
    try:
        return read_words(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{asked}: the tokenizer of {path} cannot be read ({error})") from None


def _read_tensors(asked: str, path: Path) -> dict[str, Tensor]:
    files = sorted(path.glob("model*.safetensors"))
    pickled = sorted(file.name for file in path.glob("pytorch_model*.bin"))
    why = f" but {', '.join(pickled)}, a pickle, which is not read: save it as safetensors" if pickled else ""
    require(bool(files), f"{asked}: {path} has no model.safetensors{why}")
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{asked}: {file} cannot be read ({error})") from None
    return found
