"""Weights that a new run begins with: of published models and of finished runs, role by role."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.config import Config
from engine.data import ImageTransform, transform_of_held_out
from engine.models import VisionLanguageModel
from engine.sections import require
from engine.weights import runs
from engine.weights.families import FAMILIES, family_of
from engine.weights.family import Family, Part, Place
from engine.weights.folder import Folder
from engine.weights.pieces import Piece
from engine.weights.resizing import PLACES, Grid, copy_places, copy_rows, fits, holds_words
from engine.weights.sizes import kept_line, option
from engine.weights.vocabulary import copy_words

TEACHER = "heads.distillation.teacher"
NO_WEIGHTS = ("num_batches_tracked", "position_ids", "pixel_mean", "pixel_std")
"""What batch norms count, what places are called, and a normalisation that config.json tells too."""
WORDS_OF_TEACHER = "heads.masked_language."
"""What fills its head of words."""


def load_initial_weights(
    config: Config, model: VisionLanguageModel, words: Mapping[str, int] | None = None
) -> list[str]:
    """Fill the parts of `model` that `init_from` names; lines that say what was loaded and what was not. `words` are the
    ids of the run's tokens: rows of words are then taken by word, from folders with a tokenizer of their own."""
    known = ["model", *config.model.roles, *(["teacher"] if "distillation" in model.heads else [])]
    lines, filling = [], Filling(model, words, transform_of_held_out(config))
    for asked, path in config.init_from.items():
        require(asked in known, f"init_from: the part must be one of {', '.join(known)}, got {asked}")
        lines += filling.take(asked, Folder.read(f"init_from.{asked}", Path(path)))
        if asked == "teacher":
            lines.append(filling.begin_student())
    return [*lines, *filling.left()] if lines else []


class Source(NamedTuple):
    """Pieces of a folder, and the section of its config.json that describes what they are of."""

    pieces: Iterable[Piece]
    settings: Mapping[str, Any]
    kept: Sequence[str] = ()
    """What the run has otherwise, and keeps."""


class Filling:
    """A model, and what of it has been filled."""

    def __init__(self, model: VisionLanguageModel, words: Mapping[str, int] | None, transform: ImageTransform | None):
        self.model, self.words, self.transform = model, words, transform
        self.tensors = {
            name: tensor
            for name, tensor in model.state_dict(keep_vars=True).items()
            if not name.startswith("teacher.")  # of momentum copies, which follow
        }
        self.taken: set[int] = set()
        """Parameters by their addresses, because some have several names."""

    def take(self, asked: str, folder: Folder) -> list[str]:
        """Fill one part of the model, or all of it that a folder has something for."""
        folder, sources = (sources_of_run if folder.is_run else sources_of_family)(asked, folder, self)
        used: set[str] = set()
        notes: list[str] = []
        filled: list[str] = []
        for source in sources:
            for piece in source.pieces:
                if piece.ours in self.tensors:  # else a table or a head that the run has not
                    self._fill(piece, source.settings, folder, used, notes)
                    filled.append(piece.ours)
        folder.require(bool(used), f"has nothing for model.{asked}")
        lines = [f"loaded {len(used)} tensors of {folder.path} into {'the model' if asked == 'model' else f'model.{asked}'}"]
        if notes:
            lines.append(f"of tables of other rows: {', '.join(notes)}")
        if kept := [line for source in sources for line in source.kept]:
            lines.append(f"the run keeps its own: {', '.join(kept)}")
        if self.words is not None and folder.words is None and any(holds_words(name) for name in filled):
            lines.append(f"rows of words were taken by their numbers: {folder.path} has no tokenizer.json")
        if idle := sorted(name for name in folder.tensors.keys() - used if not name.endswith(NO_WEIGHTS)):
            lines.append(f"not used of {folder.path}: {', '.join(idle)}")
        return lines

    def other_normalization(self, *theirs: Any) -> list[str]:
        """Where pictures are not those that the folder's weights have seen; it may not say."""
        return [
            kept_line(f"data.image_{name}", list(own), list(found))
            for name, own, found in zip(("mean", "std"), (self.transform.mean, self.transform.std), theirs, strict=True)
            if found is not None and not all(map(functools.partial(math.isclose, rel_tol=1e-3), own, found))
        ]

    def begin_student(self) -> str:
        """Of a distillation."""
        head = self.model.heads["distillation"]
        head.begin(self.model.text)
        self.taken |= {id(one) for one in (*self.model.text.parameters(), *head.words.parameters())}
        return "model.text begins with every second layer of its teacher"

    def left(self) -> list[str]:
        """What nothing was loaded into, in a line."""
        begun = {module_of(name) for name, parameter in self.tensors.items() if id(parameter) in self.taken}
        names = [name for name, parameter in self.tensors.items() if id(parameter) not in self.taken]
        left = dict.fromkeys(name if module_of(name) in begun else module_of(name) for name in names)
        return [f"left at their initialisation: {', '.join(left)}"] if left else []

    @torch.no_grad()
    def _fill(self, piece: Piece, settings: Mapping[str, Any], folder: Folder, used: set[str], notes: list[str]) -> None:
        name, target = piece.ours, self.tensors[piece.ours]
        if missing := [source for source in piece.theirs if source not in folder.tensors]:
            optional = name.startswith("heads.") or ".pooling.dense." in name or id(target) in self.taken
            folder.require(optional, f"has no {', '.join(missing)}")
            return
        note = self._copy(name, piece.read(folder.tensors), target, settings, folder)
        if note is not None and id(target) not in self.taken:
            notes.append(note)
        self.taken.add(id(target))
        used.update(piece.theirs)

    def _copy(
        self, name: str, found: Tensor, target: Tensor, settings: Mapping[str, Any], folder: Folder
    ) -> str | None:
        """Fill a parameter; a note where the folder has other rows."""
        told = f"does not fit: model.{name} must be {list(found.shape)}, got {list(target.shape)}"
        folder.require(fits(name, target.shape, found.shape), told)
        if name.endswith(PLACES):
            places = self.model.get_submodule(name.rpartition(".")[0])
            theirs, ours = Grid.of_theirs(settings, found), Grid.of_ours(places, target)
            has_patches = self.model.options.reads_pictures.kind == "patches"
            taken = self.transform.grid if has_patches else None
            return copy_places(name, found, target, theirs, ours, taken or ours[:2])
        if holds_words(name) and self.words is not None and folder.words is not None:
            return copy_words(name, found, target, folder.words, self.words)
        return copy_rows(name, found, target)


def sources_of_family(asked: str, folder: Folder, filling: Filling) -> tuple[Folder, list[Source]]:
    """Of a folder of `transformers`, with names of today; refused in one line with all that differs."""
    family, model = family_of(folder.config), filling.model
    kinds = ", ".join(sorted({one.kind for one in FAMILIES}))
    folder.require(family is not None, f"must be a folder of a {kinds}; got {folder.config.get('model_type')}")
    found = places_of(asked, folder, family, model)
    places = [(part, place, part.sizes.completed(part.settings(folder.config))) for part, place in found]
    has_heads = asked in ("model", "teacher", "generator", head_role(model))
    differing = family.sizes.differing("model", model.options, folder.config) if asked == "model" else []
    kept = []
    for part, place, settings in places:
        where, shallower = f"model.{place.role if asked == 'model' else asked}", may_be_shallower(place, model)
        differing += part.sizes.differing(where, place.stack, settings, place.first, shallower)
        kept += part.sizes.kept(where, place.stack, settings)
    if has_heads:
        found = {name: value for name, value in family.settings(model).items() if name in family.agreeing}
        settings = family.sizes.completed(folder.config)
        wanted = {name: settings.get(name) for name in found}
        differing += [f"{name} must be {wanted[name]}, got {value}" for name, value in found.items() if value != wanted[name]]
    folder.require(not differing, f"does not fit: {'; '.join(differing)}")
    if any(option(place.stack, "reads_pixels") for _, place, _ in places):
        kept += filling.other_normalization(*family.normalization(folder))
    sources = [Source((), {}, kept)]
    for part, place, settings in places:
        whole = place.first + place.layers == settings.get(part.sizes.same.get("layers"))
        pieces = [piece for piece in part.pieces(place) if whole or ".final_norm." not in piece.ours]
        sources.append(Source(pieces, settings))
    if has_heads:
        sources.append(Source(list(family.heads(model)), folder.config))
    if asked == "teacher":
        sources = [source._replace(pieces=in_teacher(source.pieces)) for source in sources]
    return folder.named_for(family), sources


def places_of(asked: str, folder: Folder, family: Family, model: VisionLanguageModel) -> Iterator[tuple[Part, Place]]:
    """What of a folder goes where."""
    options = model.options
    if asked == "teacher":
        asked, given = "text", {"text": model.heads["distillation"].teacher.stack}
    else:
        given = {role: getattr(options, role) for role in options.roles}
    if asked == "model":
        homes = ((part, next((role for role in part.roles if role in given), None)) for part in family.parts)
        yield from ((part, Place(role, given[role])) for part, role in homes if role is not None)
        return
    parts = [part for part in family.parts if asked in part.roles]
    can_fill = dict.fromkeys(role for part in family.parts for role in part.roles)
    folder.require(bool(parts), f"is a {family.name}, with weights for {', '.join(can_fill)}; it has none for {asked}")
    goes_on = asked == "fusion" and options.fusion.begins_with == "states"
    for part in parts:
        yield part, Place(asked, given[asked], options.text.layers if goes_on else 0)


def may_be_shallower(place: Place, model: VisionLanguageModel) -> bool:
    """Whether a role may take the first layers of more: a picture tower, and a text before its fusion."""
    fusion = model.options.fusion
    return place.role == "image" or (place.role == "text" and fusion is not None and fusion.begins_with == "states")


def head_role(model: VisionLanguageModel) -> str:
    """The role whose states the heads of objectives read."""
    return model.last_role if model.options.reads_text else "image"


def in_teacher(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The same of the teacher of a distillation."""
    for piece in pieces:
        if piece.ours.startswith("text."):
            yield piece._replace(ours=f"{TEACHER}.{piece.ours}")
        if piece.ours.startswith(WORDS_OF_TEACHER):
            yield piece._replace(ours=piece.ours.replace(WORDS_OF_TEACHER, f"{TEACHER}.words."))


def sources_of_run(asked: str, folder: Folder, filling: Filling) -> tuple[Folder, list[Source]]:
    """Of a folder that a run has ended in, role by role."""
    options, settings = filling.model.options, folder.config["model"]
    asked_for = options.roles if asked == "model" else [asked]
    there = {role: found for role in asked_for if (found := runs.role_there(role, settings)) is not None}
    folder.require(bool(there), f"has nothing for model.{asked}")
    differing, kept, sources = [], [], []
    for role, found in there.items():
        differing += runs.differing(f"model.{role}", getattr(options, role), settings[found])
        kept += runs.kept(f"model.{role}", getattr(options, role), settings[found])
        sources.append(Source(list(runs.pieces(role, found, filling.tensors, folder.tensors)), settings[found]))
    folder.require(not differing, f"does not fit: {'; '.join(differing)}")
    if any(option(getattr(options, role), "reads_pixels") for role in there):
        kept += filling.other_normalization(*(folder.config["data"].get(f"image_{name}") for name in ("mean", "std")))
    sources.append(Source((), {}, kept))
    if asked in ("model", head_role(filling.model)):
        taken = tuple(f"{role}." for role in options.roles)
        others = [name for name in filling.tensors if not name.startswith(taken) and name in folder.tensors]
        heads = [name for name in others if asked == "model" or name.startswith("heads.")]
        sources.append(Source([Piece(name, (name,)) for name in heads], {}))
    return folder, sources


def module_of(name: str) -> str:
    """The part of a role, or the head, that a parameter is of."""
    return ".".join(name.split(".")[:2])
