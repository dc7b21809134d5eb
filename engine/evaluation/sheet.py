"""A picture of what retrieval finds: the five best texts of some images and the five best images of some
texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from engine.batch import IMAGE, TEXT, Batch, Pixels
from engine.config import Config
from engine.data import Tokenizer
from engine.objectives.parts.gallery import Gallery

TOP = 5
QUERIES = 8
TILE = 72
CAPTION_WIDTH = 420
MARGIN = 8
RIGHT, WRONG = (20, 140, 60), (190, 190, 190)


def draw_sheet(
    path: Path, gallery: Gallery, batches: Sequence[Batch], tokenizer: Tokenizer, config: Config
) -> None:
    """One row per query: on the left caption -> images, on the right image -> captions; right answers are
    green."""
    pictures = [_picture(pixels, config) for batch in batches for pixels in pixels_of(batch, config)]
    captions = [tokenizer.decode(ids.tolist()) for batch in batches for ids in _captions_of(batch)]
    similarity, related = gallery.similarity.cpu(), gallery.related.cpu()
    top = min(TOP, len(gallery))
    queries = torch.linspace(0, len(gallery) - 1, min(QUERIES, len(gallery))).long().tolist()
    half = CAPTION_WIDTH + TOP * (TILE + MARGIN) + 2 * MARGIN
    sheet = Image.new("RGB", (2 * half, len(queries) * (TILE + 2 * MARGIN) + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, query in enumerate(queries):
        y = MARGIN + row * (TILE + 2 * MARGIN)
        draw.multiline_text((MARGIN, y), _wrapped(captions[query]), fill="black", font=font)
        for column, image in enumerate(similarity[:, query].topk(top).indices.tolist()):
            x = CAPTION_WIDTH + MARGIN + column * (TILE + MARGIN)
            _paste(sheet, draw, pictures[image], x, y, RIGHT if related[image, query] else WRONG)
        _paste(sheet, draw, pictures[query], half + MARGIN, y, WRONG)
        for line, text in enumerate(similarity[query].topk(top).indices.tolist()):
            position = (half + TILE + 3 * MARGIN, y + line * TILE // TOP)
            draw.text(
                position, captions[text][:90], fill=RIGHT if related[query, text] else (90, 90, 90), font=font
            )
    sheet.save(path)


def _captions_of(batch: Batch) -> tuple[Tensor, ...]:
    return batch.text.ids.cpu().split(batch.layout.lengths[:, TEXT].tolist())


def pixels_of(batch: Batch, config: Config) -> Iterator[Tensor]:
    """`[H, W, 3]` of each picture."""
    values = batch.image.values.float().cpu()
    if isinstance(batch.image, Pixels):
        yield from values.permute(0, 2, 3, 1)
        return
    lengths = batch.layout.lengths[:, IMAGE].tolist()
    for patches, positions in zip(values.split(lengths), batch.image.positions.cpu().split(lengths), strict=True):
        yield _glued(patches, positions, config.model.reads_pictures.patch_size)


def _glued(patches: Tensor, positions: Tensor, side: int) -> Tensor:
    """The picture that was cut into these patches."""
    rows, columns = (positions.amax(0) + 1).tolist()
    grid = patches.view(rows, columns, 3, side, side).permute(0, 3, 1, 4, 2)
    return grid.reshape(rows * side, columns * side, 3)


def _picture(pixels: Tensor, config: Config) -> Image.Image:
    """Its normalisation undone."""
    pixels = pixels.numpy() * np.asarray(config.data.image_std) + np.asarray(config.data.image_mean)
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def _paste(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, picture: Image.Image, x: int, y: int, colour
) -> None:
    scale = TILE / max(picture.size)
    size = tuple(max(1, round(edge * scale)) for edge in picture.size)
    sheet.paste(picture.resize(size, Image.Resampling.NEAREST), (x, y))
    draw.rectangle((x - 2, y - 2, x + size[0] + 1, y + size[1] + 1), outline=colour, width=2)


def _wrapped(caption: str, width: int = 64) -> str:
    lines, line = [], ""
    for word in caption.split():
        if line and len(line) + len(word) >= width:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return "\n".join([*lines, line][:4])
