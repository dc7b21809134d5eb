"""A model as a folder that `from_pretrained` of `transformers` opens."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from engine.data import ImageTransform, Tokenizer
from engine.models import VisionLanguageModel
from engine.published_inputs import PROCESSOR, Texts, drafts_of, write_processor, write_tokenizer
from engine.sections import TextInput, require
from engine.weights.families import FAMILIES
from engine.weights.family import Family, Part, Place
from engine.weights.folder import spelled
from engine.weights.pieces import Piece
from engine.weights.resizing import PLACES, holds_words, of_grid, rows_of_grid
from engine.weights.sizes import option

WRITABLE = {family.name: family for family in FAMILIES if family.is_written}


class Plan(NamedTuple):
    """What becomes of a model."""

    family: Family
    places: list[tuple[Part, Place]]
    has_heads: bool
    """Whether what predicts is written too: not beside a role that it does not read."""
    grid: tuple[int, int] | None = None
    """Rows and columns of places that are written: those that pictures take up, where all take up as many."""

    def for_pictures(self, transform: ImageTransform | None) -> Plan:
        """The same for a folder whose pictures are all of one size."""
        if transform is None or transform.grid is None:
            return self
        places = [(part, place._replace(stack=of_grid(place.stack, transform.grid))) for part, place in self.places]
        return self._replace(places=places, grid=transform.grid)


class Loaded(NamedTuple):
    """`model, tokenizer, transform = engine.load("runs/NAME")`"""

    model: VisionLanguageModel
    tokenizer: Tokenizer
    transform: ImageTransform | None
    """None where the model reads regions, or no pictures; where it has a backbone, `transform.pixels` is what that reads."""


def write(folder: Path, run: Loaded, family: str | None, role: str | None) -> list[str]:
    """Write a whole model, or one role of it, as the family that is named, or the first that it is. Lines that say what was
    written and what was not."""
    plan = plan_of(run.model, family, role).for_pictures(run.transform)
    swap = plan.family.swapped(run.tokenizer) if plan.family.swapped is not None else None
    tensors, written = tensors_of(plan, run.model, swap)
    folder.mkdir(parents=True, exist_ok=True)
    drafts = drafts_of(folder, "model.safetensors", "config.json")
    save_file(tensors, drafts["model.safetensors"], metadata={"format": "pt"})
    settings = config_of(plan, run)
    drafts["config.json"].write_text(json.dumps(settings, indent=2) + "\n")
    lines = [f"wrote {len(tensors)} tensors to {folder}, a {settings['architectures'][0]}"]
    if (texts := texts_of(plan)) is not None:
        drafts |= write_tokenizer(folder, run.tokenizer, texts, plan.family, swap)
    if run.transform is not None and any(option(place.stack, "reads_pixels") for _, place in plan.places):
        drafts |= (prepared := write_processor(folder, run.transform, plan.family))
        lines += remarks(plan.family, run.transform, bool(prepared))
    for name, draft in drafts.items():
        os.replace(draft, folder / name)
    left = left_of(run.model, written)
    return lines + ([f"not written: {', '.join(left)}"] if left else [])


def remarks(family: Family, transform: ImageTransform, prepared: bool) -> list[str]:
    """What pictures meet there otherwise than here."""
    if not prepared:
        return [f"no {PROCESSOR}: a {family.name} of `transformers` does not resize by data.resize {transform.resize}"]
    if transform.resize == "fit":
        return [
            "there the table of places is interpolated for every picture, and sides are rounded down to whole patches; here a "
            "place has one row, and sides are rounded to the nearest"
        ]
    return []


def texts_of(plan: Plan) -> Texts | None:
    """What the roles that have words can read together."""
    stacks = [place.stack for part, place in plan.places if has_words(part, place) and isinstance(place.stack, TextInput)]
    if not stacks:
        return None
    return Texts(min(stack.max_positions for stack in stacks), max(option(stack, "types_of_text") for stack in stacks))


def has_words(part: Part, place: Place) -> bool:
    return any(piece.ours.endswith(".words") for piece in part.pieces(place))


def left_of(model: VisionLanguageModel, written: set[str]) -> list[str]:
    """Parts of roles and heads of which something was not written, under whatever name; copies that follow are no loss."""
    named = dict(model.named_parameters(remove_duplicate=False))
    known = {id(named[name]) for name in written if name in named}
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in left if not name.startswith("teacher.")))


def plan_of(model: VisionLanguageModel, name: str | None, role: str | None) -> Plan:
    """The family, or one line that says why there is none."""
    options = model.options
    roles = [role] if role is not None else options.roles
    require(role is None or role in options.roles, f"the role must be one of {', '.join(options.roles)}, got {role}")
    require(name is None or name in WRITABLE, f"the family must be one of {', '.join(WRITABLE)}, got {name}")
    reasons, of_a_part = {}, []
    for family in WRITABLE.values() if name is None else [WRITABLE[name]]:
        places = list(home_of(family, roles, options))
        plan = Plan(family, places, predicts(places, model))
        left = set(roles) - {place.role for _, place in places}
        reasons[family.name] = unlike(plan, model)
        if len(places) != len(family.parts):
            reasons[family.name] = [f"it has other roles than {', '.join(roles)}"]
        if not reasons[family.name] and (not left or name is not None):
            return plan
        of_a_part += [family.name] if len(places) > 1 and not reasons[family.name] else []
    if name is not None:
        raise ValueError(f"the model is no {name}: {'; '.join(reasons[name])}")
    partly = f"parts of it can be written as --family {' or '.join(of_a_part)}; " if of_a_part else ""
    raise ValueError(
        f"`transformers` has no class that we know for a model with the roles {', '.join(roles)} as they are; {partly}it has "
        f"{', '.join(WRITABLE)}: name one of them to hear what differs, or one role to write it alone"
    )


def unlike(plan: Plan, model: VisionLanguageModel) -> list[str]:
    """What a folder of a family has nothing for."""
    found = [line for part, place in plan.places for line in part.sizes.unlike(f"model.{place.role}", place.stack, whole=True)]
    if model.options.co_attention is not None:
        found.append("model.co_attention must be None")
    needed = list(plan.family.classes.values())[-1]
    if plan.has_heads and not set(needed) <= set(model.heads):
        found.append(f"objectives must have {', '.join(needed)}")
    return found


def home_of(family: Family, roles: list[str], options: Any) -> Iterator[tuple[Part, Place]]:
    """Which of the roles each part of a family would be made of."""
    for part in family.parts:
        role = next((role for role in part.roles if role in roles and (role != "fusion" or len(part.roles) == 1)), None)
        if role is not None:
            yield part, Place(role, getattr(options, role))


def predicts(places: list[tuple[Part, Place]], model: VisionLanguageModel) -> bool:
    """Whether heads read any of these roles: those that words are predicted from, a writer, or pictures alone."""
    readers = {model.last_role if model.options.reads_text else "image", "generator", "decoder"}
    return bool(readers & {place.role for _, place in places})


def pieces_of(plan: Plan, model: VisionLanguageModel) -> Iterator[Piece]:
    for part, place in plan.places:
        yield from part.pieces(place)
    if plan.has_heads:
        yield from plan.family.heads(model)


def tensors_of(plan: Plan, model: VisionLanguageModel, swap: tuple[int, int] | None) -> tuple[dict[str, Tensor], set[str]]:
    """Theirs by their names, and the names of ours that they were made of."""
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    tensors: dict[str, Tensor] = {}
    written = set()
    for piece in pieces_of(plan, model):
        if piece.ours not in own:
            continue
        parameter = own[piece.ours].detach().cpu()
        if piece.ours.endswith(PLACES) and plan.grid is not None:
            parameter = rows_of_grid(parameter, model.get_submodule(piece.ours.rpartition(".")[0]), plan.grid)
        if swap is not None and holds_words(piece.ours):
            first, second = swap
            parameter = parameter.clone()
            parameter[[first, second]] = parameter[[second, first]]
        for name, tensor in piece.write(parameter).items():
            tensors[spelled(name, plan.family)] = tensor.contiguous().clone()
        written.add(piece.ours)
    return tensors, written


def config_of(plan: Plan, run: Loaded) -> dict[str, Any]:
    """What config.json says."""
    family, model = plan.family, run.model
    heads = set(model.heads) if plan.has_heads else set()
    name = next((name for name, needed in family.classes.items() if set(needed) <= heads), list(family.classes)[-1])
    settings: dict[str, Any] = {"model_type": family.kind, "architectures": [name], **family.sizes.config(model.options)}
    for part, place in plan.places:
        inner = settings.setdefault(part.section, {}) if part.section is not None else settings
        if has_words(part, place):
            inner |= {"vocab_size": model.vocab_size, **special_ids(run.tokenizer, family)}
        inner |= part.sizes.config(place.stack)
    more = [family.settings(model), family.prepared(run.transform) if run.transform is not None else {}]
    for name, value in itertools.chain(*(entries.items() for entries in more)):
        settings[name] = {**settings[name], **value} if isinstance(settings.get(name), dict) else value
    return settings


def special_ids(tokenizer: Tokenizer, family: Family) -> dict[str, int]:
    swap = family.swapped(tokenizer) if family.swapped is not None else (0, 0)
    ids = {"pad_token_id": 0, "bos_token_id": tokenizer.cls_id, "eos_token_id": tokenizer.sep_id}
    return {name: {swap[0]: swap[1], swap[1]: swap[0]}.get(number, number) for name, number in ids.items()}
