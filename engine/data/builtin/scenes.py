"""Scenes: two to four glyphs in a row or a column, a caption that says so, and the exact box of each."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from engine.data.builtin.glyphs import CELL, Glyph
from engine.data.plan.order import Purpose, generator
from engine.data.records.record import Region

_RELATIONS = ("left of", "above")
_SIZES = (2, 4)
FAMILY = 8  # glyphs in a row of the list whose names begin alike: their common attribute


@dataclass(frozen=True)
class Scene:
    """Glyphs by their place in the list they were drawn from, and what lies between neighbours."""

    members: tuple[int, ...]
    relation: str


def draw_scenes(num_glyphs: int, count: int) -> list[Scene]:
    """`count` different scenes, always the same."""
    scenes: dict[Scene, None] = {}
    attempt = 0
    while len(scenes) < count:
        random = generator(0, 0, attempt, Purpose.SCENES)
        size = random.integers(*_SIZES, endpoint=True)
        relation = _RELATIONS[random.integers(len(_RELATIONS))]
        scenes[Scene(tuple(random.integers(num_glyphs, size=size).tolist()), relation)] = None
        attempt += 1
    return list(scenes)


def compose(scene: Scene, glyphs: Sequence[Glyph]) -> tuple[Image.Image, str, list[Region]]:
    """(picture, caption, regions); one cell per glyph, so four in a row are 128 x 32 pixels."""
    members = [glyphs[member] for member in scene.members]
    step = (CELL, 0) if scene.relation == "left of" else (0, CELL)
    last = len(members) - 1
    picture = Image.new("L", (CELL + last * step[0], CELL + last * step[1]), 255)
    regions = []
    for place, (kind, glyph) in enumerate(zip(scene.members, members, strict=True)):
        x, y = place * step[0], place * step[1]
        picture.paste(glyph.picture, (x, y))
        left, top, right, bottom = glyph.ink
        box = (left + x, top + y, right + x, bottom + y)
        regions.append(Region(box, glyph.captions[0], kind, attribute=kind // FAMILY))
    return picture, f" {scene.relation} ".join(region.caption for region in regions), regions
