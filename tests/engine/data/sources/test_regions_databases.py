"""UNITER's databases as published: every layout gives the same regions; what is amiss is one clear line."""

import json
import multiprocessing
import os
import pickle
import shutil

import lz4.frame
import msgpack
import numpy as np
import pytest

from engine.data import DataError, RecordFault, held_out_batches, load_source
from engine.data.sources.lmdb_file import open_lmdb
from engine.data.sources.load import JoinedSources, PermutedCaptions
from engine.data.sources.uniter_images import read_msgpack
from engine.sections import Regions
from tests.engine.data.region_files import (
    npz,
    packed,
    region_arrays,
    text_value,
    tokenizer_of,
    write_images,
    write_lmdb,
    write_texts,
)
from tests.engine.data.region_set import region_run

SMALL = Regions(feature_values=8, classes=5)
TOKENIZER = tokenizer_of()
PICTURES = {f"coco_{number:012}.npz": 12 + number for number in range(4)}  # regions of each


def small(number, count=12, **options):
    return region_arrays(number, count, SMALL.feature_values, SMALL.classes, **options)


def ids_of(number, length):
    return [7 + (number * 13 + place) % (TOKENIZER.vocab_size - 7) for place in range(length)]


def texts_of(pictures, per_picture=2):
    """{id: (ids, picture)}; the texts of a picture are not neighbours."""
    names = list(pictures)
    return {
        str(1000 + number): (ids_of(number, 3 + number), names[number % len(names)])
        for number in range(per_picture * len(names))
    }


class Databases:
    """A text and an image database in a folder, and the source that reads them."""

    def __init__(self, folder):
        self.folder, self.texts, self.images = folder, folder / "txt.db", folder / "img"
        self.cache = folder / "cache"

    def write(self, workshop_texts=None, store="feat_th0.2_max100_min10_compressed", counts=True, **meta):
        save = npz if store in ("", "all_compressed") or store.endswith("_compressed") else packed
        values = {name: save(small(count, count + 5, sure=count)) for name, count in PICTURES.items()}
        write_images(self.images, values, store, dict(PICTURES) if counts else None)
        write_texts(self.texts, workshop_texts or texts_of(PICTURES), TOKENIZER, **meta)
        return self

    def open(self, workshop, regions=SMALL, **data):
        options = workshop.config(f"{self.texts} + {self.images}", **data).data
        options.regions = regions
        return load_source(options, "train")


@pytest.fixture
def databases(tmp_path):
    return Databases(tmp_path)


STORES = ("feat_th0.2_max100_min10_compressed", "feat_th0.2_max100_min10", "all_compressed", "all", "")


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("counts", [True, False])
def test_every_layout_gives_texts_and_regions(databases, workshop, store, counts):
    source = databases.write(store=store, counts=counts and store.startswith("feat")).open(workshop)
    assert len(source) == 8 and source.num_images == 4
    for place, (ids, picture) in enumerate(texts_of(PICTURES).values()):
        record = source[place]
        assert record.token_ids == source.texts(place).token_ids == [ids] and record.captions == []
        assert record.image is None and source.image_of(place) == place % 4
        count = PICTURES[picture]
        assert np.array_equal(
            record.detections.features, small(count, count + 5)["features"][:count].astype("f4")
        )
        assert record.detections.boxes.shape == (count, 7) and record.detections.soft_labels.shape == (
            count,
            5,
        )
        assert record.identity == source[(place + 4) % 8].identity != source[(place + 1) % 8].identity
        assert record.identity == source.identity(place % 4)
    assert source.detections(2, soft_labels=False)[1].soft_labels is None


@pytest.mark.parametrize("store", STORES)
def test_the_index_knows_all_lengths(databases, workshop, store, monkeypatch):
    source = databases.write(store=store, counts=store.startswith("feat")).open(workshop)
    index = source.index(TOKENIZER, 64)
    assert index.records.tolist() == list(range(8)) and index.captions.tolist() == [0] * 8
    assert index.tokens.tolist() == [len(ids) + 2 for ids, _ in texts_of(PICTURES).values()]
    assert index.images.tolist() == [0, 1, 2, 3] * 2 and index.regions.tolist() == list(PICTURES.values())
    monkeypatch.setattr(source.images, "count", lambda _: pytest.fail("the stored index is good"))
    assert source.index(TOKENIZER, 64).regions.tolist() == list(PICTURES.values())


def test_the_index_follows_the_pictures(databases, workshop):
    """Another image database under the same name; the texts are as they were."""
    assert databases.write(counts=False).open(workshop).index(TOKENIZER, 64).regions.tolist() == [12, 13, 14, 15]
    open_lmdb.cache_clear()
    shutil.rmtree(databases.images)
    write_images(databases.images, {name: npz(small(1, 11)) for name in PICTURES})
    assert databases.open(workshop).index(TOKENIZER, 64).regions.tolist() == [11] * 4


def test_stored_counts_are_used_as_the_original_uses_them(databases, workshop):
    databases.write()
    (databases.images / "nbb_th0.2_max100_min10.json").write_text(json.dumps(dict.fromkeys(PICTURES, 11)))
    source = databases.open(workshop)
    assert source.index(TOKENIZER, 64).regions.tolist() == [11] * 4
    assert [len(source.detections(image)[1].boxes) for image in range(4)] == [11] * 4
    (databases.images / "nbb_th0.2_max100_min10.json").write_text(json.dumps(dict.fromkeys(PICTURES, 101)))
    assert databases.open(workshop, max_records=3).index(TOKENIZER, 64).regions.tolist() == [100] * 3


def test_texts_longer_than_the_limit_are_left_out_not_cut(databases, workshop):
    source = databases.write().open(workshop, max_caption_tokens=8)
    assert len(source) == 4 and source.index(TOKENIZER, 8).tokens.tolist() == [5, 6, 7, 8]
    with pytest.raises(DataError, match="txt.db has no text of at most 4 tokens, of 8"):
        databases.open(workshop, max_caption_tokens=4)


def test_a_number_of_records_is_that_of_texts(databases, workshop):
    assert len(databases.write().open(workshop, max_records=3)) == 3


def test_several_databases_may_share_pictures(databases, workshop):
    databases.write()
    pattern = f"{databases.texts} + {databases.images}"
    options = workshop.config([pattern, pattern]).data
    options.regions = SMALL
    source = load_source(options, "train")
    assert isinstance(source, JoinedSources) and len(source) == 16 and source.num_images == 8
    assert source.image_of(9) == 5 and source.texts(9).token_ids == source.texts(1).token_ids
    assert source.index(TOKENIZER, 64).images.tolist() == [0, 1, 2, 3] * 2 + [4, 5, 6, 7] * 2
    options.max_records = 10
    assert len(load_source(options, "train")) == 10


def read_all(source):
    return [
        (record.token_ids, record.detections.features.sum()) for record in map(source.__getitem__, range(8))
    ]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_databases_serve_other_processes(databases, workshop, method):
    source = databases.write().open(workshop)
    expected = read_all(source)  # opens both before the processes start
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(read_all, [source] * 2) == [expected] * 2


def test_the_published_uncompressed_value_is_that_of_msgpack_numpy():
    value = bytes.fromhex(
        "81a4636f6e6685c4026e64c3c40474797065a33c6632c4046b696e64c400"
        "c40573686170659102c40464617461c404003c0038"
    )
    assert read_msgpack("k", value, ["conf", "features"])["conf"].tolist() == [1.0, 0.5]
    assert packed({"conf": np.asarray([1, 0.5], dtype="<f2")}) == value


@pytest.mark.parametrize(
    "meta, difference",
    [
        ({"CLS": 101}, "meta.json says CLS 101, SEP"),
        ({"MASK": 0}, "MASK 0"),
        ({"v_range": [106, 28996]}, r"v_range \[106, 28996\]"),
    ],
)
def test_another_tokenizer_is_refused_in_one_line(databases, workshop, meta, difference):
    source = databases.write(**meta).open(workshop)
    with pytest.raises(
        DataError, match=rf"made with another tokenizer \(bert-base-cased\): .*{difference}"
    ) as caught:
        source.index(TOKENIZER, 64)
    assert f"v_range [{TOKENIZER.model.token_to_id('!')}, {TOKENIZER.vocab_size}]" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_refused_for_held_out_texts(databases, workshop, tmp_path):
    """Ids that both have would be read as other words."""
    alone, fits = databases.write(CLS=101).open(workshop), Databases(tmp_path / "fits").write().open(workshop)
    config = region_run()
    for source in (alone, JoinedSources([fits, alone]), PermutedCaptions(alone, seed=0)):
        with pytest.raises(DataError, match=r"txt.db was made with another tokenizer"):
            next(held_out_batches(config, source, TOKENIZER, 4, "masked_language"))


def test_a_tokenizer_cannot_be_trained_on_ids(databases, workshop):
    source = databases.write().open(workshop)
    with pytest.raises(DataError, match=r"tokenizer.path must name the tokenizer .*\(bert-base-cased\)"):
        source.captions(0)


class Bomb:
    sprung = False

    def __reduce__(self):
        return setattr, (Bomb, "sprung", True)


GOOD = packed(small(0))
BAD_VALUES = {
    "msgpack cannot be read": GOOD[: len(GOOD) // 2],
    "no conf among": packed({"features": np.zeros((2, 8))}),
    "conf must hold numbers, got .*, which is never opened": packed(
        {"conf": np.asarray([Bomb()], dtype=object)}
    ),
    "conf must hold numbers, got": packed({"conf": np.zeros(3, dtype=[("x", "f4")])}),
    "conf of shape .* must have 12 bytes, got 3": msgpack.packb(
        {"conf": {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [3], b"data": b"abc"}}
    ),
    "AttributeError": msgpack.packb({"conf": [1, 2]}),
    "KeyError": msgpack.packb({"conf": {b"kind": b""}}),
    "TypeError": msgpack.packb(3),
    "10000 regions, must be 1 to 1000": packed({"conf": np.ones(10_000)}),
    "StackError": b"\x91" * 100_000,
}


@pytest.mark.parametrize("reason", BAD_VALUES)
def test_a_hostile_value_is_named_and_left_out_with_its_texts(databases, workshop, reason):
    databases.write(store="all", counts=False)
    values = {name: packed(small(0)) for name in PICTURES} | {"coco_000000000002.npz": BAD_VALUES[reason]}
    other = databases.folder / "other"
    write_images(other, values, "all")
    databases.images = other
    source = databases.open(workshop)
    for _ in range(2):  # made, then read from the cache
        assert source.index(TOKENIZER, 64).images.tolist() == [0, 1, 3] * 2
    (fault,) = source.ledger.faults
    assert "other/coco_000000000002.npz: " in fault and fault.endswith("left out with its 2 texts")
    with pytest.raises(RecordFault, match=f"coco_000000000002.npz: .*{reason}"):
        source.detections(2)
    assert len(source.detections(3)[1].boxes) == 12 and not Bomb.sprung


@pytest.mark.parametrize("store", STORES)
def test_a_picture_that_is_missing_is_named(databases, workshop, store):
    texts = {**texts_of(PICTURES), "9": (ids_of(1, 3), "gone.npz"), "10": (ids_of(2, 3), "../img/escape.npz")}
    texts |= {"11": (ids_of(3, 3), ["two.npz", "pictures.npz"]), "12": (ids_of(4, 4), "x" * 600)}
    source = databases.write(texts, store=store, counts=store.startswith("feat")).open(workshop)
    index = source.index(TOKENIZER, 64)
    assert index.records.tolist() == list(range(8)) and (index.regions > 0).sum() == 4
    assert len(source.ledger.faults) == 4
    for name in ("gone.npz", "../img/escape.npz", "x" * 600, ""):
        assert (
            f"{databases.images}/{name}: no such picture, left out with its 1 texts" in source.ledger.faults
        )


def test_names_do_not_lead_out_of_the_folder(databases, workshop):
    texts = {**texts_of(PICTURES), "9": (ids_of(1, 3), "../secret.npz")}
    source = databases.write(texts, store="", counts=False).open(workshop)
    (databases.folder / "secret.npz").write_bytes(npz(small(0)))
    with pytest.raises(RecordFault, match="no such picture"):
        source[8]


def test_texts_that_are_broken_are_named(databases, workshop):
    picture = next(iter(PICTURES))
    texts = texts_of(PICTURES)
    databases.write()
    good = {"input_ids": [8, 9, 10], "img_fname": picture}
    broken = {
        "text cannot be read": b"no frame",
        "lz4 frame is cut": text_value(good)[:-6],
        "of more than 1048576 bytes": lz4.frame.compress(bytes(1 << 21)),
        "text cannot be read .*": lz4.frame.compress(b"\xc1"),
        "text must be a map, got list": text_value([1]),
        "input_ids must be a list of integers": text_value({**good, "input_ids": "abc"}),
        "at least one": text_value({**good, "input_ids": []}),
        rf"input_ids must be in \[0, {TOKENIZER.vocab_size}\), got 28000": text_value(
            {**good, "input_ids": [8, 28_000, 9]}
        ),
        "got -1": text_value({**good, "input_ids": [8, -1, 9]}),
        "4 ids, id2len.json says 3": text_value({**good, "input_ids": [8, 9, 10, 11]}),
        "its picture is 'other.npz', txt2img.json says": text_value({**good, "img_fname": "other.npz"}),
        "id2len.json names it, the LMDB lacks it": None,
    }
    for name in range(len(broken)):
        texts[f"bad{name}"] = ([8, 9, 10], picture)
    values = {key: text_value({"input_ids": ids, "img_fname": shown}) for key, (ids, shown) in texts.items()}
    for name, value in enumerate(broken.values()):
        del values[f"bad{name}"]
        if value is not None:
            values[f"bad{name}"] = value
    databases.texts = databases.folder / "hostile.db"
    write_texts(databases.folder / "described", texts, TOKENIZER)
    write_lmdb(databases.texts, values)
    for name in ("id2len", "txt2img", "meta"):
        (databases.folder / "described" / f"{name}.json").rename(databases.texts / f"{name}.json")
    source = databases.open(workshop)
    for place, reason in enumerate(broken):
        with pytest.raises(RecordFault, match=f"hostile.db/bad{place}: .*{reason}"):
            source.texts(8 + place)
    assert source.texts(7).token_ids == [texts["1007"][0]]


@pytest.mark.parametrize("keep", [0, 100, 4096, 8192, -1])
@pytest.mark.parametrize("which", ["text", "image"])
def test_a_truncated_lmdb_is_refused_and_kills_nobody(databases, workshop, keep, which):
    databases.write()
    folder = databases.texts if which == "text" else databases.images / STORES[0]
    os.truncate(folder / "data.mdb", keep % (folder / "data.mdb").stat().st_size)
    with pytest.raises(
        DataError, match=r"is no LMDB that can be read|data.mdb is truncated: \d+ of \d+ bytes"
    ):
        databases.open(workshop)


@pytest.mark.parametrize(
    "file, content, reason",
    [
        ("id2len.json", None, "id2len.json cannot be read"),
        ("id2len.json", b"[1]", "id2len.json must be an object of int"),
        ("id2len.json", b'{"a": "b"}', "id2len.json must be an object of int"),
        ("txt2img.json", b"{", "txt2img.json cannot be read"),
        ("meta.json", b"[" * 200_000, "meta.json cannot be read"),
        ("meta.json", b'{"CLS": 1, "SEP": 2}', "meta.json lacks MASK, v_range"),
        (
            "meta.json",
            b'{"CLS": 1, "SEP": 2, "MASK": 3, "v_range": 4}',
            "v_range must be two integers, got 4",
        ),
        ("data.mdb", pickle.dumps(Bomb()) * 1000, "is no LMDB that can be read"),
    ],
)
def test_a_text_database_that_lacks_something_is_one_clear_line(databases, workshop, file, content, reason):
    databases.write()
    (databases.texts / file).unlink()
    if content is not None:
        (databases.texts / file).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        databases.open(workshop)
    assert not Bomb.sprung


def test_an_image_database_for_other_limits_is_named(databases, workshop):
    databases.write()
    sharper = Regions(feature_values=8, classes=5, confidence=0.3)
    line = r"no feat_th0.3_max100_min10, all .*; its feat_th0.2_max100_min10_compressed are for other limits"
    with pytest.raises(DataError, match=line):
        databases.open(workshop, sharper)
    (databases.folder / "empty").mkdir()
    databases.images = databases.folder / "empty"
    with pytest.raises(DataError, match="has no feat_th0.2_max100_min10, all .* and no npz files$"):
        databases.open(workshop)


def test_patterns_that_are_no_databases(databases, workshop):
    databases.write()
    with pytest.raises(DataError, match="data.regions must say which"):
        databases.open(workshop, regions=None)
    databases.images = "a + b"
    with pytest.raises(DataError, match=r"b' must be two folders, TEXT_DB \+ IMAGE_DB"):
        databases.open(workshop)
    databases.images = "nowhere"
    with pytest.raises(DataError, match=r"txt.db \+ nowhere: no folder nowhere$"):
        databases.open(workshop)
    databases.texts = "gone"
    hint = "no folder gone and no nowhere; --tiny true trains on builtin-scenes$"
    with pytest.raises(DataError, match=hint):
        databases.open(workshop, tiny_source="builtin-scenes")
    for source in ("builtin", "builtin-text", "builtin-pages"):
        options = workshop.config(source).data
        options.regions = SMALL
        with pytest.raises(DataError, match=f'"?{source}"? has no regions, which data.regions asks for'):
            load_source(options, "train")
