"""Broken and malicious input: named, counted, never executed, and the run goes on within its limit."""

import json
import os
import pickle
import struct
import time
import zlib

import pytest

from engine.data import (
    DataError,
    RecordFault,
    held_out_batches,
    load_source,
    load_training_sets,
    make_tokenizer,
    training_stream,
)
from engine.data.records.record import MAX_CAPTION_CHARACTERS
from engine.data.sources.tar_index import build_index

MARKER = "a pickle was opened"


class Bomb:
    def __reduce__(self):
        return exec, (f"raise SystemExit({MARKER!r})",)


def png_of_size(width, height):
    """A PNG whose header promises `width` x `height` pixels and whose data is a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def broken_members(workshop):
    """(name of the broken record, a word of the reason, its members)."""
    image, jpeg = workshop.image(), workshop.image(kind="JPEG")
    return [
        (
            "half-jpeg",
            "cannot be decoded",
            [("half-jpeg.jpg", jpeg[: len(jpeg) // 2]), ("half-jpeg.txt", b"half")],
        ),
        ("not-jpeg", "cannot be decoded", [("not-jpeg.jpg", b"GIF89a" * 50), ("not-jpeg.txt", b"none")]),
        (
            "script",
            "cannot be decoded",
            [("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n"), ("script.txt", b"postscript")],
        ),
        ("bomb", "the limit is", [("bomb.png", png_of_size(60_000, 60_000)), ("bomb.txt", b"bomb")]),
        ("large", "the limit is", [("large.png", png_of_size(9_000, 9_000)), ("large.txt", b"large")]),
        ("no-pixels", "cannot be decoded", [("no-pixels.png", b""), ("no-pixels.txt", b"empty")]),
        ("silent", "caption is empty", [("silent.png", image), ("silent.txt", b" \n ")]),
        ("nested", "json cannot be read", [("nested.png", image), ("nested.json", b"[" * 200_000)]),
        ("cut-json", "json cannot be read", [("cut-json.png", image), ("cut-json.json", b'{"caption": "x')]),
        ("list", "must be an object", [("list.png", image), ("list.json", b"[]")]),
        ("number", "must be a string", [("number.png", image), ("number.json", b'{"caption": 7}')]),
        ("latin", "not UTF-8", [("latin.png", image), ("latin.txt", b"caf\xe9")]),
        (
            "surrogate",
            "not valid Unicode",
            [("surrogate.png", image), ("surrogate.json", b'{"caption": "\\ud800 x"}')],
        ),
        (
            "boxes",
            "regions must be",
            [("boxes.png", image), ("boxes.json", b'{"caption": "x", "regions": [[1]]}')],
        ),
        (
            "kind",
            "regions must be",
            [
                ("kind.png", image),
                ("kind.json", b'{"caption": "x", "regions": [{"box": [0, 0, 1, 1], "caption": "x", "class": -1}]}'),
            ],
        ),
    ]


def hostile_shard(workshop):
    members = [member for number in range(20) for member in workshop.pair(number)]
    for _, _, broken in broken_members(workshop):
        members += broken
    members += [("long.png", workshop.image(1)), ("long.txt", b"word " * 100_000)]
    members += [("blind.txt", b"no picture"), ("mute.png", workshop.image())]
    for name in ("evil.pkl", "evil.pickle", "deep/evil.pyd", "evil.pth", "mute.feature.pkl"):
        members.append((name, pickle.dumps(Bomb())))
    return workshop.shard("hostile.tar", members)


def names_of(faults):
    return {fault.split(": ")[0].rsplit("hostile.tar/")[-1] for fault in faults}


EXPECTED_AT_INDEXING = {
    "blind",
    "mute",
    "evil.pkl",
    "evil.pickle",
    "deep/evil.pyd",
    "evil.pth",
    "mute.feature.pkl",
}


def test_every_broken_record_is_refused_by_name_and_reason(workshop):
    source = load_source(workshop.config(str(hostile_shard(workshop))).data, "train")
    assert names_of(source.ledger.faults) == EXPECTED_AT_INDEXING
    assert len(source) == 20 + len(broken_members(workshop)) + 1
    for place, (name, reason, _) in enumerate(broken_members(workshop)):
        with pytest.raises(RecordFault, match=reason) as caught:
            source[20 + place]
        assert caught.value.key.endswith(f"hostile.tar/{name}")


def test_a_bomb_is_refused_before_its_pixels_are_decoded(workshop):
    source = load_source(workshop.config(str(hostile_shard(workshop))).data, "train")
    started = time.process_time()
    for place in (23, 24):
        with pytest.raises(RecordFault, match="the limit is"):
            source[place]
    assert time.process_time() - started < 0.1


def test_a_caption_of_a_hundred_thousand_words_is_cut_before_it_is_tokenized_and_named(workshop):
    source = load_source(workshop.config(str(hostile_shard(workshop))).data, "train")
    record = source[len(source) - 1]
    assert len(record.captions[0]) <= MAX_CAPTION_CHARACTERS
    assert record.notes == (f"caption cut to its first {MAX_CAPTION_CHARACTERS} characters",)
    content = {"caption": "word " * 100_000}
    shard = workshop.shard(
        "json.tar", [("a.png", workshop.image()), ("a.json", json.dumps(content).encode())]
    )
    record = load_source(workshop.config(str(shard)).data, "train")[0]
    assert len(record.captions[0]) <= MAX_CAPTION_CHARACTERS
    assert record.notes == (f"caption cut to its first {MAX_CAPTION_CHARACTERS} characters",)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_run_goes_on_and_names_every_fault(workshop, workers):
    config = workshop.config(str(hostile_shard(workshop)), workers=workers)
    sets = load_training_sets(config)
    stream = training_stream(config, sets, make_tokenizer(config, sets), 0, 1, step=0, samples_seen=0)
    windows = [next(stream) for _ in range(3 * len(sets) // 8)]
    assert all(len(batch.labels) == 8 for (batch,) in windows)
    broken = {name for name, _, _ in broken_members(workshop)}
    assert names_of(sets.ledger.faults) == EXPECTED_AT_INDEXING | broken | {"long"}
    assert any("boxes: regions must be" in fault for fault in sets.ledger.faults)


def test_replacements_do_not_depend_on_workers_or_ranks(workshop):
    def labels(world, workers):
        config = workshop.config(str(hostile_shard(workshop)), workers=workers)
        sets = load_training_sets(config)
        tokenizer = make_tokenizer(config, sets)
        start = {"step": 0, "samples_seen": 0}
        streams = [training_stream(config, sets, tokenizer, rank, world, **start) for rank in range(world)]
        return [label for _ in range(8) for stream in streams for label in next(stream)[0].labels.tolist()]

    assert labels(1, 0) == labels(2, 0) == labels(1, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_past_the_limit_the_run_stops_with_one_line(workshop, workers):
    config = workshop.config(str(hostile_shard(workshop)), workers=workers, fault_limit=12)
    sets = load_training_sets(config)
    tokenizer = make_tokenizer_of_good(sets.sets[0].source)
    stream = training_stream(config, sets, tokenizer, 0, 1, step=0, samples_seen=0)
    with pytest.raises(
        DataError, match=r"^13 broken records, more than data.fault_limit = 12; the last is .*hostile.tar/.*$"
    ):
        for _ in range(20):
            next(stream)


def make_tokenizer_of_good(source):
    """Of the good records alone, so that the ledger counts what the stream meets."""
    from engine.data import train_tokenizer

    return train_tokenizer([source.captions(index)[0] for index in range(20)], "wordpiece", 200, True)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_broken_records_alone_ends(workshop, workers):
    good = workshop.shard("good.tar", workshop.pair(0))
    shard = workshop.shard(
        "bad.tar", [member for i in range(9) for member in ((f"{i}.png", b""), (f"{i}.txt", b"x"))]
    )
    config = workshop.config(str(shard), workers=workers)
    tokenizer = make_tokenizer(config, load_training_sets(workshop.config(str(good))))
    with pytest.raises(
        DataError, match=r"^32 records drawn for stream position 0 are all broken; the last is .*$"
    ):
        next(training_stream(config, load_training_sets(config), tokenizer, 0, 1, step=0, samples_seen=0))


def test_held_out_records_that_are_broken_are_left_out(workshop):
    config = workshop.config(str(hostile_shard(workshop)))
    source = load_source(config.data, "held_out")
    tokenizer = make_tokenizer(config, load_training_sets(config))
    batches = list(held_out_batches(config, source, tokenizer, 16))
    assert sum(batch.counts["pairs"] for batch in batches) == 21
    faults = [fault for batch in batches for fault in batch.faults]
    assert names_of(faults) == {name for name, _, _ in broken_members(workshop)} | {"long"}


@pytest.mark.parametrize("keep", [0, 1, 511, 512, 700, 2047, 2048, 2500, 20_000])
def test_of_a_truncated_tar_the_readable_prefix_is_used_and_the_rest_named(workshop, keep):
    whole = workshop.shard("whole.tar", [member for number in range(20) for member in workshop.pair(number)])
    full = build_index(whole)
    cut = workshop.folder / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:keep])
    index = build_index(cut)
    ends = [max(offset + size for offset, size in (row["image"], row["text"])) for row in full.table]
    assert len(index.table) == sum(end <= keep for end in ends)
    assert index.table["key"].tolist() == full.table["key"].tolist()[: len(index.table)]
    assert any("cut.tar: truncated" in fault for fault in index.faults)


def test_rubbish_and_looping_tars_end(workshop):
    path = workshop.folder / "rubbish.tar"
    path.write_bytes(os.urandom(5000))
    assert "no valid tar header at byte 0" in build_index(path).faults[0]
    good = workshop.shard("good.tar", workshop.pair(1)).read_bytes()
    for size in (
        b"-0000000001\0",
        b"\xff" + b"\xff" * 11,
        b"\x80" + b"\xff" * 11,
        b"7" * 11 + b"\0",
        b"1_0\0" + b" " * 8,
    ):
        header = bytearray(good[:512])
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        path.write_bytes(bytes(header) + good[512:])
        index = build_index(path)
        assert len(index.table) == 0 and index.faults


def test_a_mutated_tar_never_raises(workshop):
    good = workshop.shard(
        "good.tar", [member for number in range(3) for member in workshop.pair(number)]
    ).read_bytes()
    path = workshop.folder / "mutated.tar"
    import numpy as np

    random = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(good)
        for place in random.integers(len(data), size=20):
            data[place] = random.integers(256)
        path.write_bytes(bytes(data))
        build_index(path)
