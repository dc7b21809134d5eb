"""The built-in sets as img2dataset tar shards, written once into the cache, always the same bytes."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from engine.data.builtin import glyphs, scenes
from engine.data.builtin.glyphs import Glyph
from engine.data.builtin.held_out import HELD_OUT_CODE_POINTS
from engine.data.builtin.scenes import FAMILY
from engine.data.records.cache_folder import write_folder
from engine.data.records.record import DataError, Region

GLYPHS, SCENES, EMOJI = NAMES = ("builtin", "builtin-scenes", "builtin-emoji")
NUM_SCENES = {"train": 8192, "held_out": 512}
NUM_KINDS = 64  # of glyphs in scenes
_RECORDS_PER_SHARD = 1000
_FORMAT = {GLYPHS: "3", SCENES: "4", EMOJI: "3"}
_KIND_WORDS = (2, 3)  # names of that many words
_KIND_SIDE = 16  # pixels that two kinds are compared at
_KIND_SIMILARITY = 0.7  # cosine between two kinds, at most

Item = tuple[Image.Image, tuple[str, ...], list[Region]]  # picture, captions, regions


def shards(name: str, split: str, cache: Path) -> list[Path]:
    """The shards of a built-in set, written first where the cache lacks them."""
    if name == EMOJI and split == "held_out":
        raise DataError(f'"{EMOJI}" has no held-out part; use "{GLYPHS}" or "{SCENES}"')
    folder = cache / f"{name}-{split}-{_fingerprint(name)}"
    if not folder.is_dir():
        write_folder(folder, partial(_write_shards, _items(name, split)))
    return sorted(folder.glob("*.tar"))


def _fingerprint(name: str) -> str:
    """Of all that the pictures depend on: another font or renderer gets a folder of its own."""
    font = glyphs.emoji_font() if name == EMOJI else glyphs.FONT
    renderer = [_FORMAT[name], Image.__version__, *(str(features.version(part)) for part in ("freetype2", "zlib"))]
    return hashlib.blake2b(font.read_bytes() + " ".join(renderer).encode(), digest_size=6).hexdigest()


def _items(name: str, split: str) -> Iterator[Item]:
    if name == EMOJI:
        yield from map(_alone, _shuffled(glyphs.emoji()))
    elif name == GLYPHS:
        yield from map(_alone, _shuffled(split_glyphs(split)))
    else:
        # held-out scenes too are made of these glyphs: what is new is the combination
        members = scene_glyphs()
        drawn = scenes.draw_scenes(len(members), sum(NUM_SCENES.values()))
        for scene in drawn[: NUM_SCENES["train"]] if split == "train" else drawn[NUM_SCENES["train"] :]:
            picture, caption, regions = scenes.compose(scene, members)
            yield picture, (caption,), regions


def split_glyphs(split: str) -> list[Glyph]:
    """The glyphs of one split, in code point order."""
    return [
        glyph
        for glyph in glyphs.glyphs()
        if (split == "held_out") == (not HELD_OUT_CODE_POINTS.isdisjoint(glyph.code_points))
    ]


@lru_cache(maxsize=1)
def scene_glyphs() -> tuple[Glyph, ...]:
    """The kinds of glyph in scenes: families of training glyphs whose names differ in the last word alone.

    So the name without its picture does not tell that word. No two of them look alike.
    """
    families: dict[str, list[Glyph]] = {}
    seen = np.zeros((0, _KIND_SIDE**2), dtype=np.int64)  # integers: the choice depends on no rounding
    for glyph in _shuffled(split_glyphs("train")):
        words = glyph.captions[0].split()
        family = families.setdefault(" ".join(words[:-1]), [])
        if len(glyph.captions) > 1 or len(words) not in _KIND_WORDS or len(family) == FAMILY:
            continue
        size = (_KIND_SIDE, _KIND_SIDE)
        pixels = np.asarray(glyph.picture.resize(size, Image.Resampling.BOX, box=glyph.ink), dtype=np.int64)
        ink = 127 - pixels.reshape(1, -1)
        norms = np.sqrt((seen**2).sum(1) * (ink**2).sum())
        if (seen @ ink[0] <= _KIND_SIMILARITY * norms).all():
            seen = np.concatenate([seen, ink])
            family.append(glyph)
    kinds = [glyph for family in families.values() if len(family) == FAMILY for glyph in family]
    assert len(kinds) >= NUM_KINDS, len(kinds)
    return tuple(kinds[:NUM_KINDS])


def _shuffled(found: Iterable[Glyph]) -> list[Glyph]:
    """In hash order, so that the first records of a set are a fair sample of it."""
    return sorted(found, key=lambda glyph: hashlib.blake2b(glyph.captions[0].encode()).digest())


def _alone(glyph: Glyph) -> Item:
    return glyph.picture, glyph.captions, [Region(glyph.ink, glyph.captions[0])]


def _write_shards(items: Iterator[Item], folder: Path) -> None:
    number = 0
    while shard := list(islice(items, _RECORDS_PER_SHARD)):
        _write_shard(folder / f"{number:05d}.tar", number, shard)
        number += 1


def _write_shard(path: Path, shard: int, items: list[Item]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, (picture, captions, regions) in enumerate(items):
            key = f"{shard:05d}{place:04d}"
            data = io.BytesIO()
            picture.save(data, "PNG", compress_level=9)
            _add(tar, f"{key}.png", data.getvalue())
            _add(tar, f"{key}.txt", captions[0].encode())
            _add(tar, f"{key}.json", _description(key, picture, captions, regions))


def _description(key: str, picture: Image.Image, captions: tuple[str, ...], regions: list[Region]) -> bytes:
    content = {
        "key": key,
        "status": "success",
        "caption": captions[0],
        "captions": captions,
        "width": picture.width,
        "height": picture.height,
        "regions": [_told(region) for region in regions],
    }
    return json.dumps(content).encode()


def _told(region: Region) -> dict[str, Any]:
    """As the json of a record has it."""
    values = {"class" if name == "kind" else name: value for name, value in asdict(region).items()}
    return {name: value for name, value in values.items() if value is not None}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner 0, time 0
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
