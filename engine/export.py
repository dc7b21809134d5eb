"""A trained model as plain files, and back: safetensors and json, without pickle and without DeepSpeed.

A run ends in a folder that `engine.load` reads. To make of it one that `from_pretrained` of `transformers` opens:

    python -m engine.export runs/NAME FOLDER [--family bert] [--role text]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import typing
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.build import build_model
from engine.config import Config
from engine.data import Tokenizer, load_tokenizer, transform_of_held_out
from engine.models import VisionLanguageModel
from engine.models.momentum import FeatureQueue, MomentumCopy
from engine.published import WRITABLE, Loaded, write
from engine.training.command_line import one_line_errors

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"

Section = TypeVar("Section")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run")
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--family", help=f"{', '.join(WRITABLE)} (default: the first that the model is)")
    parser.add_argument("--role", help="the role of the model to write alone, such as image (default: the whole)")
    options = parser.parse_args(argv)
    with one_line_errors("export"):
        run = load(options.run)
        for line in write(options.folder, run, options.family, options.role):
            print(line)
    return 0


def export(folder: str | Path, model: VisionLanguageModel, config: Config, tokenizer: Tokenizer) -> None:
    """Write what `load` reads. Files are replaced whole; weights that share storage are written once, what only training
    needs, momentum copies and queues, is left out."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drafts = {name: folder / f"{name}.draft" for name in (WEIGHTS, CONFIG, TOKENIZER)}
    save_file(distinct_tensors(model), str(drafts[WEIGHTS]))
    drafts[CONFIG].write_text(json.dumps(config.as_dict(), indent=1) + "\n")
    tokenizer.save(drafts[TOKENIZER])
    for name, draft in drafts.items():
        os.replace(draft, folder / name)


def load(folder: str | Path, device: torch.device | str = "cpu") -> Loaded:
    """The model of a run folder in evaluation mode, its tokenizer, its transform of pictures without random
    choices."""
    folder = Path(folder)
    missing = [name for name in (WEIGHTS, CONFIG, TOKENIZER) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is not the folder of a finished run: it has no {', '.join(missing)}")
    config = rebuild(Config, json.loads((folder / CONFIG).read_text()))
    tokenizer = load_tokenizer(folder / TOKENIZER)
    model = build_model(config, tokenizer.vocab_size)
    weights, wanted = load_file(folder / WEIGHTS), distinct_tensors(model)
    differing = sorted(weights.keys() ^ wanted.keys())
    if differing:
        raise ValueError(f"{folder / WEIGHTS} does not fit the model of {CONFIG}: {', '.join(differing)}")
    model.load_state_dict(weights, strict=False)
    if model.teacher is not None:
        model.teacher.begin()
    return Loaded(model.to(device).eval(), tokenizer, transform_of_held_out(config))


def distinct_tensors(model: VisionLanguageModel) -> dict[str, Tensor]:
    """The model's tensors by name, tied ones once. Copies: DeepSpeed keeps weights as views of one flat buffer."""
    distinct: dict[tuple[int, torch.Size, tuple[int, ...]], tuple[str, Tensor]] = {}
    of_training = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, (MomentumCopy, FeatureQueue)))
    for name, tensor in model.state_dict().items():
        if name.startswith(of_training):
            continue
        distinct.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), (name, tensor))
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in distinct.values()}


def rebuild(section: type[Section], values: dict[str, Any]) -> Section:
    """A section of the configuration from plain values."""
    hints = typing.get_type_hints(section)
    return section(**{name: _rebuild_value(hints[name], value) for name, value in values.items()})


def _rebuild_value(hint: Any, value: Any) -> Any:
    for kind in (hint, *typing.get_args(hint)):
        if isinstance(value, dict) and dataclasses.is_dataclass(kind):
            return rebuild(kind, value)
        if isinstance(value, dict) and typing.get_origin(kind) is dict:
            inner = typing.get_args(kind)[1]
            return {name: _rebuild_value(inner, item) for name, item in value.items()}
        if isinstance(value, list) and typing.get_origin(kind) is tuple:
            return tuple(value)
    return value


if __name__ == "__main__":
    raise SystemExit(main())
