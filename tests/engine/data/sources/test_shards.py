"""Reading img2dataset shards: patterns, indices, captions, and the workers' view."""

import io
import json
import multiprocessing
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from engine.data.records.record import DataError, FaultLedger, RecordFault, Region
from engine.data.sources.load import load_source
from engine.data.sources.shards import ShardSource, expand_pattern
from engine.data.sources.tar_index import build_index, load_index


def test_brace_ranges_wildcards_and_their_product(tmp_path):
    for name in ("a-07.tar", "a-08.tar", "b-07.tar"):
        (tmp_path / name).touch()
    assert [path.name for path in expand_pattern(f"{tmp_path}/[ab]-{{07..08}}.tar")] == [
        "a-07.tar",
        "b-07.tar",
        "a-08.tar",
    ]
    assert [str(path) for path in expand_pattern("x/{1..2}-{08..10}.tar")] == [
        f"x/{first}-{second}.tar" for first in (1, 2) for second in ("08", "09", "10")
    ]
    with pytest.raises(DataError, match="shards, must be 1 to"):
        expand_pattern("{0..999999999}.tar")


def test_records_come_back_in_order_with_captions_and_pictures(workshop):
    source = load_source(workshop.config(workshop.good_shards()).data, "train")
    assert len(source) == 50
    for index in (0, 19, 20, 49):
        record = source[index]
        assert record.captions == source.captions(index) == [f"picture number {index} of many"]
        expected = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        assert np.array_equal(np.asarray(record.image), expected)
    with pytest.raises(IndexError):
        source[50]


def test_several_sources_and_a_limit(workshop):
    first = workshop.shard("first.tar", workshop.pair(1))
    second = workshop.shard("second.tar", workshop.pair(2) + workshop.pair(3))
    data = workshop.config([str(first), str(second)]).data
    assert [load_source(data, "train").captions(i)[0][15] for i in range(3)] == ["1", "2", "3"]
    data.max_records = 2
    assert len(load_source(data, "train")) == 2


def test_the_first_caption_key_that_a_record_has_is_used(workshop):
    content = {
        "captions": ["one", " ", " two\n words "],
        "caption": "three",
        "regions": [{"box": [1, 2, 3, 4], "caption": "dot"}],
    }
    members = [("k.PNG", workshop.image()), ("k.json", json.dumps(content).encode()), ("k.txt", b"four")]
    data = workshop.config(str(workshop.shard("s.tar", members))).data
    record = load_source(data, "train")[0]
    assert record.captions == ["one", "two words"]
    assert record.regions == [Region((1, 2, 3, 4), "dot")]
    assert record.notes == ("1 of 3 captions are empty",)
    data.caption_keys = ["txt", "captions"]
    assert load_source(data, "train")[0].captions == ["four"]
    data.caption_keys = ["title"]
    with pytest.raises(RecordFault, match="no caption under title"):
        load_source(data, "train")[0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_image_kinds(workshop, kind):
    extension = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}[kind]
    shard = workshop.shard("s.tar", [(f"k.{extension}", workshop.image(kind=kind)), ("k.txt", b"noise")])
    assert load_source(workshop.config(str(shard)).data, "train")[0].image.size == (32, 32)


def test_of_16_bits_of_grey_the_upper_8_are_read(workshop):
    data = io.BytesIO()
    Image.fromarray(np.asarray([[0, 256, 32768, 65535]], dtype=np.uint16)).save(data, "PNG")
    shard = workshop.shard("s.tar", [("k.png", data.getvalue()), ("k.txt", b"deep")])
    image = load_source(workshop.config(str(shard)).data, "train")[0].image
    assert np.asarray(image)[0].tolist() == [[level] * 3 for level in (0, 1, 128, 255)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["", "part/", f"{'deep' * 30}/", "ümlaut/"])
def test_every_tar_format_gives_the_offsets_of_tarfile(tmp_path, form, folder):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("directory/"))
        for name, data in (
            (f"{folder}a.b.c.png", b"ignored"),
            (f"{folder}a.png", b"pixels"),
            (f"{folder}a.txt", b"text"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo(f"{folder}l.png")
        link.type, link.linkname = (
            tarfile.SYMTYPE,
            "/etc/" + "passwd" * 30 if form != tarfile.USTAR_FORMAT else "/etc/passwd",
        )
        tar.addfile(link)
    index = build_index(path)
    assert index.faults == [] and index.table["key"].tolist() == [f"{folder}a".encode()]
    with tarfile.open(path) as tar:
        offset = tar.getmember(f"{folder}a.png").offset_data
    assert index.table["image"].tolist() == [[offset, 6]]


def test_the_index_is_stored_and_follows_the_shard(workshop, monkeypatch):
    shard, cache = workshop.shard("s.tar", workshop.pair(1)), workshop.folder / "cache"
    assert len(load_index(shard, cache).table) == 1
    monkeypatch.setattr(
        "engine.data.sources.tar_index.build_index", lambda shard: pytest.fail("the stored index is good")
    )
    assert len(load_index(shard, cache).table) == 1
    monkeypatch.undo()
    workshop.shard("s.tar", workshop.pair(1) + workshop.pair(2))
    assert len(load_index(shard, cache).table) == 2
    same_size = workshop.shard("s.tar", workshop.pair(1) + workshop.pair(3))
    os.utime(same_size, ns=(1, 1))
    assert load_index(shard, cache).table["key"].tolist() == [b"000000001", b"000000003"]


@pytest.mark.parametrize(
    "damage", [b"", b"\n", b"[]\n", b'{"faults": 3}\n', b"\x80\x04pickle", b"{" * 100_000]
)
def test_a_damaged_index_is_made_again(workshop, damage):
    shard, cache = workshop.shard("s.tar", workshop.pair(1)), workshop.folder / "cache"
    load_index(shard, cache)
    (stored,) = (cache / "indices").iterdir()
    good = stored.read_bytes()
    stored.write_bytes(damage)
    assert len(load_index(shard, cache).table) == 1
    header, table = good.split(b"\n", 1)
    stored.write_bytes(header + b"\n" + table[:-30])
    assert len(load_index(shard, cache).table) == 1
    assert stored.read_bytes() == good


def test_an_index_that_holds_pickled_objects_is_refused(workshop):
    shard, cache = workshop.shard("s.tar", workshop.pair(1)), workshop.folder / "cache"
    load_index(shard, cache)
    (stored,) = (cache / "indices").iterdir()
    header = stored.read_bytes().split(b"\n", 1)[0]
    table = io.BytesIO()
    np.lib.format.write_array(table, np.asarray([Trap()], dtype=object), allow_pickle=True)
    stored.write_bytes(header + b"\n" + table.getvalue())
    assert len(load_index(shard, cache).table) == 1
    assert not Trap.sprung


class Trap:
    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


def test_missing_and_empty_sources_are_one_clear_line(workshop):
    with pytest.raises(DataError, match=r"2 of 2 shards do not exist, the first is .*/0\.tar"):
        load_source(workshop.config(str(workshop.folder / "{0..1}.tar")).data, "train")
    with pytest.raises(DataError, match="names no shard"):
        load_source(workshop.config(str(workshop.folder / "*.tar")).data, "train")
    empty = workshop.shard("empty.tar", [("readme.md", b"nothing")])
    with pytest.raises(DataError, match=r"no usable record in 1 shards \(.*\): 0 broken records$"):
        load_source(workshop.config(str(empty)).data, "train")
    mute = workshop.shard("mute.tar", [("a.png", workshop.image()), ("b.png", workshop.image())])
    with pytest.raises(DataError, match="no usable record .*: 2 broken records, the first is .*mute.tar/a: no caption$"):
        load_source(workshop.config(str(mute)).data, "train")
    with pytest.raises(DataError, match=r"^(\S+) is a folder: name its shards, \1/\*\.tar, or write classes:\1 or pages:\1$"):
        load_source(workshop.config(str(workshop.folder)).data, "train")


@pytest.mark.parametrize("pattern", ["gone.tar", "gone.txt", "pages:gone"])
def test_a_recipe_whose_published_data_are_not_there_has_others_for_trials(workshop, pattern):
    with pytest.raises(DataError, match="gone.*; --tiny true trains on builtin$"):
        load_source(workshop.config(pattern, tiny_source="builtin").data, "train")


def test_a_byte_order_mark_is_no_word(workshop):
    shard = workshop.shard("s.tar", [("k.png", workshop.image()), ("k.txt", b"\xef\xbb\xbfa cat\r\n")])
    assert load_source(workshop.config(str(shard)).data, "train").captions(0) == ["a cat"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_source_serves_other_processes(workshop, method):
    source = load_source(workshop.config(workshop.good_shards()).data, "train")
    source[0]  # opens a shard before the process starts
    with multiprocessing.get_context(method).Pool(1) as pool:
        found = pool.map(source.captions, range(50))
    assert found == [[f"picture number {index} of many"] for index in range(50)]


def test_few_descriptors_stay_open(workshop, monkeypatch):
    monkeypatch.setattr("engine.data.sources.shards._MAX_OPEN_SHARDS", 2)
    shards = [workshop.shard(f"{number}.tar", workshop.pair(number)) for number in range(5)]
    source = ShardSource(shards, ["txt"], 10**6, workshop.folder / "cache", FaultLedger(0))
    before = len(os.listdir("/proc/self/fd"))
    for index in [*range(5), *range(5)]:
        assert source.captions(index) == [f"picture number {index} of many"]
    assert len(os.listdir("/proc/self/fd")) == before + 2
