"""CLIP from a tar as img2dataset writes it: a run, its export, a picture and a caption as features."""

import hashlib
import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from engine.evaluation.zero_shot import caption_features, picture_features
from engine.export import load
from engine.pretrain import main
from engine.recipes import table
from engine.training.telemetry import read_metrics

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
SHARDS, PER_SHARD = 2, 24


def picture(number: int) -> tuple[str, bytes]:
    """A caption, and a photograph of one colour."""
    name = list(COLOURS)[number % len(COLOURS)]
    shade = tuple(max(0, value - number) for value in COLOURS[name])
    data = io.BytesIO()
    Image.new("RGB", (48, 40), shade).save(data, "JPEG")
    return f"a photo of something {name}, number {number}", data.getvalue()


def members(number: int, key: str):
    """The files of a record, and the fields of its json."""
    caption, jpeg = picture(number)
    fields = {
        "caption": caption, "url": f"https://example.org/{number}.jpg", "key": key, "status": "success",
        "error_message": None, "width": 48, "height": 40, "original_width": 640, "original_height": 533, "exif": "{}",
        "sha256": hashlib.sha256(jpeg).hexdigest(),
    }  # fmt: skip
    return {"jpg": jpeg, "json": json.dumps(fields, indent=4).encode(), "txt": caption.encode()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """NNNNN.tar of NNNNNNNNN.jpg, .json and .txt; beside each a table and statistics, which are not read."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for place in range(PER_SHARD):
                key = f"{shard:05d}{place:04d}"
                for suffix, data in members(shard * PER_SHARD + place, key).items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder


def test_clip_learns_from_it_and_its_export_tells_colours(shards, tmp_path):
    recipe, source = str(table.FOLDER / "clip_vit_b32.yaml"), f"{shards}/{{00000..0000{SHARDS - 1}}}.tar"
    data = [f"--data.source={source}", f"--data.held_out={source}", "--data.tiny_source=null", f"--data.cache={tmp_path}"]
    run = [f"--output={tmp_path}", "--device=cpu", "--precision=fp32", "--optimizer.lr=3e-3"]
    main(["--config", recipe, "--tiny=true", *data, *run])
    rows = [row for row in read_metrics(tmp_path / "clip_vit_b32" / "metrics.jsonl") if "loss" in row]
    assert rows[-1]["step"] == 12 and rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    model, tokenizer, _ = load(tmp_path / "clip_vit_b32")
    config = table.recipe("clip_vit_b32", "--tiny=true")
    files = []
    for number in range(4):
        files.append(tmp_path / f"{number}.jpg")
        files[-1].write_bytes(picture(number)[1])
    with torch.no_grad():
        of_pictures = picture_features(model, files, config)
        of_captions = caption_features(model, [picture(number)[0] for number in range(4)], tokenizer, config)
    torch.testing.assert_close(torch.cat((of_pictures, of_captions)).norm(dim=1), torch.ones(8))
    similar = of_pictures @ of_captions.T
    assert (similar.diagonal() > similar.mean(1)).all() and (similar.diagonal() > similar.mean(0)).all(), similar
