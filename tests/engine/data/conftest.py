"""Small shards made on the spot, and a run that reads them."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from engine import sections
from engine.config import Config
from engine.objectives import Objectives
from engine.objectives.masked_language import MaskedLanguage


class Workshop:
    """Makes shards in a folder and configurations that read them."""

    def __init__(self, folder):
        self.folder = folder

    @staticmethod
    def image(number=0, size=(32, 32), kind="PNG"):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, kind)
        return data.getvalue()

    def pair(self, number, caption=None):
        """The members of one good record."""
        caption = f"picture number {number} of many" if caption is None else caption
        content = {"caption": caption, "key": f"{number:09d}"}
        return [
            (f"{number:09d}.png", self.image(number)),
            (f"{number:09d}.txt", caption.encode()),
            (f"{number:09d}.json", json.dumps(content).encode()),
        ]

    def shard(self, name, members):
        path = self.folder / name
        with tarfile.open(path, "w") as tar:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    def good_shards(self, records=50, per_shard=20):
        for first in range(0, records, per_shard):
            numbers = range(first, min(first + per_shard, records))
            self.shard(
                f"{first // per_shard:05d}.tar",
                [member for number in numbers for member in self.pair(number)],
            )
        return str(self.folder / f"{{00000..{(records - 1) // per_shard:05d}}}.tar")

    def config(self, source, batch=8, accumulation=1, **data):
        return Config(
            data=sections.Data(source=source, held_out=source, cache=str(self.folder / "cache"), **data),
            model=sections.Model(image=sections.ImageStack(max_grid=(12, 12))),
            tokenizer=sections.Tokenizer(vocab_size=200),
            objectives=Objectives(masked_language=MaskedLanguage()),
            train=sections.Train(global_batch=batch, accumulation=accumulation, max_steps=1),
        )


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)
