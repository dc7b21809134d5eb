"""Weights that a new run begins with: BERT's, from a folder as `transformers` saves it."""

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
from engine.sections import JointStack, require
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
        require(part == "joint", f"init_from: the part must be joint, got {part}")
        require(config.model.joint is not None, "init_from.joint needs model.joint")
        lines += _load_bert(Path(folder), config.model.joint, model)
    return lines


@torch.no_grad()
def _load_bert(folder: Path, stack: JointStack, model: VisionLanguageModel) -> list[str]:
    _check_sizes(folder, stack)
    saved = _read(folder)
    parameters = dict(model.named_parameters())
    taken: dict[str, tuple[str, ...]] = {}
    fewer = []
    for piece in _bert_pieces(stack.layers):
        name, sources = piece.ours, piece.theirs
        if name not in parameters:  # a table or a head that the run has not
            continue
        if missing := [source for source in sources if source not in saved]:
            optional = missing[0].startswith(OPTIONAL)
            require(optional, f"init_from.joint: {folder} has no {', '.join(missing)}")
            continue
        if rows := _copy(folder, name, piece.read(saved), parameters[name]):
            fewer.append(rows)
        taken[name] = sources
    return _report(folder, model, saved, taken, fewer)


def _check_sizes(folder: Path, stack: JointStack) -> None:
    """Refuse a model that computes something else, in one line with all that differs."""
    path = folder / "config.json"
    require(
        path.is_file(),
        f"init_from.joint: {folder} has no config.json: it must be a folder of `transformers`",
    )
    theirs = _read_settings(path)
    kind, positions = theirs.get("model_type"), theirs["position_embedding_type"]
    require(
        (kind, positions) == ("bert", "absolute"),
        f"init_from.joint: {folder} must be a bert with absolute positions, got a {kind} with {positions} "
        "ones",
    )
    theirs["hidden_act"] = ACTIVATIONS.get(str(theirs["hidden_act"]), theirs["hidden_act"])
    differing = [
        f"model.joint.{ours} must be {theirs.get(name)}, got {getattr(stack, ours)}"
        for ours, name in SIZES.items()
        if getattr(stack, ours) != theirs.get(name)
    ]
    if stack.norm != "post":
        differing.append(f"model.joint.norm must be post, got {stack.norm}")
    require(not differing, f"init_from.joint: {folder} does not fit: {'; '.join(differing)}")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"init_from.joint: {path} cannot be read ({error})") from None
    require(isinstance(settings, dict), f"init_from.joint: {path} must be an object")
    return DEFAULTS | settings


def _read(folder: Path) -> dict[str, Tensor]:
    """The tensors under the names of today's `BertModel`; heads keep theirs, which begin with "cls."."""
    files = sorted(folder.glob("model*.safetensors"))
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    why = f" but {', '.join(pickled)}, a pickle, which is not read: save it as safetensors" if pickled else ""
    require(bool(files), f"init_from.joint: {folder} has no model.safetensors{why}")
    renamed = {}
    for file in files:
        for name, tensor in _read_tensors(file).items():
            name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
            renamed[name.replace("LayerNorm.beta", "LayerNorm.bias")] = tensor
    return renamed


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"init_from.joint: {file} cannot be read ({error})") from None


def _bert_pieces(layers: int) -> Iterator[Piece]:
    """The parameters that BERT has."""
    yield from bert.embedder("joint.text")
    yield from bert.stack("joint.transformer", layers)
    yield from linear("joint.pooling.dense", "pooler.dense")
    yield from linear("heads.masked_language.transform", "cls.predictions.transform.dense")
    yield from linear("heads.masked_language.norm", "cls.predictions.transform.LayerNorm")
    yield Piece("heads.masked_language.bias", ("cls.predictions.bias",))


def _copy(folder: Path, name: str, found: Tensor, target: Tensor) -> str | None:
    """Fill the target, of a table the rows in common; a note where these are not all."""
    wanted, got = list(target.shape), list(found.shape)
    fits = got[1:] == wanted[1:] if name.startswith(BY_ROW) else got == wanted
    require(fits, f"init_from.joint: {folder}: model.{name} must be {wanted}, got {got}")
    rows = min(len(found), len(target))
    target[:rows] = found[:rows]
    if got == wanted:
        return None
    return f"{name} the first {rows} rows (it has {len(target)}, the file {len(found)})"


def _report(
    folder: Path,
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
        f"loaded {len(used)} tensors of {folder} into model.joint, "
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
