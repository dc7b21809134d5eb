"""Zero-shot classification: which class name does a picture agree with most?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import vlkernels as vk
from PIL import Image
from torch import Tensor

from engine.batch import Patches, Text
from engine.config import Config
from engine.data import DataError, RecordFault, Tokenizer, image_transform
from engine.data.records.record import decode_image
from engine.models import VisionLanguageModel

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def zero_shot(
    model: VisionLanguageModel, folder: str | Path, tokenizer: Tokenizer, config: Config
) -> dict[str, float]:
    """Accuracy on `folder/CLASS/*.png`, where the name of each sub-folder is the caption of its class."""
    classes, files = find_classes(folder)
    texts = caption_features(model, [c.name.replace("_", " ") for c in classes], tokenizer, config)
    right = 0
    for some in _chunks(files, config.evaluation.batch):
        features = picture_features(model, [path for path, _ in some], config)
        labels = torch.tensor([label for _, label in some], device=features.device)
        right += int(((features @ texts.T).argmax(1) == labels).sum())
    return {"accuracy": right / len(files), "chance": 1 / len(classes), "images": len(files)}


def find_classes(folder: str | Path) -> tuple[list[Path], list[tuple[Path, int]]]:
    """The sub-folders of a folder of classes, and its images, each with the number of its class."""
    places = Path(folder).iterdir() if Path(folder).is_dir() else ()
    classes = sorted(path for path in places if path.is_dir())
    found = [(path, label) for label, place in enumerate(classes) for path in sorted(place.iterdir())]
    files = [(path, label) for path, label in found if path.suffix.lower() in SUFFIXES]
    if len(classes) < 2 or not files:
        raise DataError(
            f"evaluation.zero_shot must be a folder with at least two sub-folders of images, "
            f"got {folder} with {len(classes)} sub-folders and {len(files)} images"
        )
    return classes, files


def read_picture(path: Path, config: Config) -> Image.Image:
    """An image file, decoded under the same limits as those of the shards."""
    try:
        return decode_image(str(path), path.read_bytes(), config.data.max_image_pixels)
    except RecordFault as fault:
        raise DataError(f"evaluation.zero_shot: {fault}") from None


def caption_features(
    model: VisionLanguageModel, captions: Sequence[str], tokenizer: Tokenizer, config: Config
) -> Tensor:
    """`[N, E]` of captions."""
    limit = config.data.max_caption_tokens
    found = [tokenizer.encode(caption, limit) for caption in captions]
    rows = [tokenizer.fill(*one, limit)[0] if config.data.fill_captions else one[0] for one in found]
    layout = vk.SegmentLayout([[len(row)] for row in rows]).to(next(model.parameters()).device)
    ids = torch.from_numpy(np.concatenate(rows)).to(layout.device)
    return model.features_of_text(model.text(Text(ids, layout), layout, model.rng))


def picture_features(model: VisionLanguageModel, paths: Sequence[Path], config: Config) -> Tensor:
    """`[N, E]` of image files."""
    transform = image_transform(config)
    pictures = [transform(read_picture(path, config)) for path in paths]
    layout = vk.SegmentLayout([[len(patches)] for patches, _ in pictures]).to(next(model.parameters()).device)
    columns = zip(*pictures, strict=True)
    patches, positions = (torch.from_numpy(np.concatenate(column)).to(layout.device) for column in columns)
    return model.features_of_image(model.image(Patches(patches, positions), layout, model.rng))


def _chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[first : first + size] for first in range(0, len(items), size))
