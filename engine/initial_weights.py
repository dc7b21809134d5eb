"""Weights that a new run begins with: BERT's, for a joint stream or a teacher, from a folder as `transformers` saves it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.config import Config
from engine.models import VisionLanguageModel
from engine.sections import Stack, require
from engine.weights import bert
from engine.weights.pieces import Piece, linear

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
"""Ours by the name that `transformers` knows an activation by."""

SIZES = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "eps": "layer_norm_eps",
    "activation": "hidden_act",
}
"""Their name of what must agree, by ours."""

DEFAULTS = {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "position_embedding_type": "absolute"}
"""What older folders leave out."""

BY_ROW = ("joint.text.words", "joint.text.positions", "joint.text.types", "heads.masked_language.bias")
"""What may have another number of rows: words, positions, types."""

OPTIONAL = ("pooler.", "cls.")
"""What only some of BERT's models have."""


def load_initial_weights(config: Config, model: VisionLanguageModel) -> list[str]:
    """Fill the parts of `model` that `init_from` names; lines that say what was loaded and what was not."""
    lines = []
    for part, folder in config.init_from.items():
        require(part in ("joint", "teacher"), f"init_from: the part must be joint or teacher, got {part}")
        if part == "joint":
            require(config.model.joint is not None, "init_from.joint needs model.joint")
            lines += _load_bert(Path(folder), part, config.model.joint, _bert_pieces(config.model.joint.layers), model)
        else:
            lines += _load_teacher(Path(folder), model)
    return lines


def _load_teacher(folder: Path, model: VisionLanguageModel) -> list[str]:
    """Fill the teacher of a distillation, and with every second layer of it the student."""
    require("distillation" in model.heads, "init_from.teacher needs objectives.distillation")
    head = model.heads["distillation"]
    lines = _load_bert(folder, "teacher", head.teacher.stack, _teacher_pieces(head.teacher.stack.layers), model)
    head.begin(model.text)
    return [*lines, "model.text begins with every second layer of its teacher"]


@torch.no_grad()
def _load_bert(
    folder: Path, part: str, stack: Stack, pieces: Iterator[Piece], model: VisionLanguageModel
) -> list[str]:
    _check_sizes(folder, part, stack)
    saved = _read(folder, part)
    parameters = dict(model.named_parameters())
    taken: dict[str, tuple[str, ...]] = {}
    fewer = []
    for piece in pieces:
        name, sources = piece.ours, piece.theirs
        if name not in parameters:  # a table or a head that the run has not
            continue
        if missing := [source for source in sources if source not in saved]:
            optional = missing[0].startswith(OPTIONAL)
            require(optional, f"init_from.{part}: {folder} has no {', '.join(missing)}")
            continue
        if rows := _copy(folder, part, name, piece.read(saved), parameters[name]):
            fewer.append(rows)
        taken[name] = sources
    return _report(folder, part, model, saved, taken, fewer)


def _check_sizes(folder: Path, part: str, stack: Stack) -> None:
    """Refuse a model that computes something else, in one line with all that differs."""
    path = folder / "config.json"
    require(
        path.is_file(),
        f"init_from.{part}: {folder} has no config.json: it must be a folder of `transformers`",
    )
    theirs = _read_settings(path, part)
    kind, positions = theirs.get("model_type"), theirs["position_embedding_type"]
    require(
        (kind, positions) == ("bert", "absolute"),
        f"init_from.{part}: {folder} must be a bert with absolute positions, got a {kind} with {positions} "
        "ones",
    )
    theirs["hidden_act"] = ACTIVATIONS.get(str(theirs["hidden_act"]), theirs["hidden_act"])
    differing = [
        f"model.{part}.{ours} must be {theirs.get(name)}, got {getattr(stack, ours)}"
        for ours, name in SIZES.items()
        if getattr(stack, ours) != theirs.get(name)
    ]
    if stack.norm != "post":
        differing.append(f"model.{part}.norm must be post, got {stack.norm}")
    require(not differing, f"init_from.{part}: {folder} does not fit: {'; '.join(differing)}")


def _read_settings(path: Path, part: str) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"init_from.{part}: {path} cannot be read ({error})") from None
    require(isinstance(settings, dict), f"init_from.{part}: {path} must be an object")
    return DEFAULTS | settings


def _read(folder: Path, part: str) -> dict[str, Tensor]:
    """The tensors under the names of today's `BertModel`; heads keep theirs, which begin with "cls."."""
    files = sorted(folder.glob("model*.safetensors"))
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    why = f" but {', '.join(pickled)}, a pickle, which is not read: save it as safetensors" if pickled else ""
    require(bool(files), f"init_from.{part}: {folder} has no model.safetensors{why}")
    renamed = {}
    for file in files:
        for name, tensor in _read_tensors(file, part).items():
            name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
            renamed[name.replace("LayerNorm.beta", "LayerNorm.bias")] = tensor
    return renamed


def _read_tensors(file: Path, part: str) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"init_from.{part}: {file} cannot be read ({error})") from None


def _bert_pieces(layers: int) -> Iterator[Piece]:
    """The parameters that BERT has."""
    yield from bert.embedder("joint.text")
    yield from bert.stack("joint.transformer", layers)
    yield from linear("joint.pooling.dense", "pooler.dense")
    yield from linear("heads.masked_language.transform", "cls.predictions.transform.dense")
    yield from linear("heads.masked_language.norm", "cls.predictions.transform.LayerNorm")
    yield Piece("heads.masked_language.bias", ("cls.predictions.bias",))


def _teacher_pieces(layers: int) -> Iterator[Piece]:
    """The parameters that a teacher has."""
    teacher = "heads.distillation.teacher"
    for piece in bert.text_tower(layers, pooler=False):
        yield piece._replace(ours=f"{teacher}.text.{piece.ours}")
    names = (f"cls.predictions.{name}" for name in ("transform.dense", "transform.LayerNorm", "bias"))
    yield from bert.masked_language(*names, ours=f"{teacher}.words")


def _copy(folder: Path, part: str, name: str, found: Tensor, target: Tensor) -> str | None:
    """Fill the target, of a table the rows in common; a note where these are not all."""
    wanted, got = list(target.shape), list(found.shape)
    fits = got[1:] == wanted[1:] if name.startswith(BY_ROW) else got == wanted
    require(fits, f"init_from.{part}: {folder}: model.{name} must be {wanted}, got {got}")
    rows = min(len(found), len(target))
    target[:rows] = found[:rows]
    if got == wanted:
        return None
    return f"{name} the first {rows} rows (it has {len(target)}, the file {len(found)})"


def _report(
    folder: Path,
    part: str,
    model: VisionLanguageModel,
    saved: dict[str, Tensor],
    taken: dict[str, tuple[str, ...]],
    fewer: list[str],
) -> list[str]:
    used = {source for sources in taken.values() for source in sources}
    begun = {_module_of(name) for name in taken}
    untouched = [name for name, _ in model.named_parameters() if name not in taken]
    left = dict.fromkeys(name if _module_of(name) in begun else _module_of(name) for name in untouched)
    lines = [
        f"loaded {len(used)} tensors of {folder} into model.{part}, "
        f"left at their initialisation: {', '.join(left)}"
    ]
    if fewer:
        lines.append(f"of tables of another size: {', '.join(fewer)}")
    if idle := sorted(saved.keys() - used):
        lines.append(f"not used of {folder}: {', '.join(idle)}")
    return lines


def _module_of(name: str) -> str:
    """The part of a role, or the head, that a parameter is of."""
    return ".".join(name.split(".")[:2])
