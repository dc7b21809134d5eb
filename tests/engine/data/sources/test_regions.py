"""Regions of npz files: read, selected and checked as UNITER does; hostile ones are named, never opened."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from engine.data import RecordFault, load_source
from engine.data.records.regions import ARRAYS, MAX_BYTES, number_used, read_npz, select_regions
from engine.data.sources.load import JoinedSources
from engine.sections import Regions
from tests.engine.data.region_files import npz, region_arrays, tokenizer_of

SMALL = Regions(feature_values=8, classes=5)


def small(number, count=12, **options):
    return region_arrays(number, count, SMALL.feature_values, SMALL.classes, **options)


def selected(arrays, options=SMALL, **changes):
    return select_regions("k", {**arrays, **changes}, options)


@pytest.mark.parametrize(
    "count, sure, used", [(150, 120, 100), (100, 36, 36), (20, 3, 10), (12, 12, 12), (5, 2, 5), (1, 0, 1)]
)
def test_as_many_regions_are_used_as_uniter_uses(count, sure, used):
    arrays = small(0, count, sure=sure)
    found = selected(arrays)
    assert len(found.features) == len(found.boxes) == len(found.soft_labels) == used
    assert np.array_equal(found.features, arrays["features"][:used].astype(np.float32))
    assert np.array_equal(found.soft_labels, arrays["soft_labels"][:used].astype(np.float32))
    assert {part.dtype for part in (found.features, found.boxes, found.soft_labels)} == {np.dtype(np.float32)}


def test_the_limit_of_confidence_is_not_above_itself():
    assert number_used(np.asarray([0.9, 0.5, 0.4]), Regions(confidence=0.5, min_count=1, max_count=9)) == 1


def test_the_area_is_the_seventh_value_of_a_box_whether_six_or_seven_come():
    arrays = small(0)
    boxes = arrays["norm_bb"].astype(np.float32)
    expected = np.concatenate([boxes, boxes[:, 4:5] * boxes[:, 5:]], axis=1)
    assert np.array_equal(selected(arrays).boxes, expected)
    seven = np.concatenate([boxes, np.full((12, 1), 9, dtype=np.float32)], axis=1)
    assert np.array_equal(selected(arrays, norm_bb=seven).boxes, expected)


def test_the_surest_regions_are_taken_from_any_order():
    arrays = small(0, 30, sure=15)
    order = np.random.default_rng(1).permutation(30)
    mixed = selected({name: array[order] for name, array in arrays.items()})
    assert np.array_equal(mixed.features, selected(arrays).features)


def test_regions_need_no_soft_labels():
    arrays = small(0)
    del arrays["soft_labels"]
    assert selected(arrays).soft_labels is None


def changed(name, place, value, dtype=np.float32):
    arrays = small(0)
    arrays[name] = arrays[name].astype(dtype)
    arrays[name][place] = value
    return {name: arrays[name]}


HOSTILE = {
    "nan": (
        changed("features", (3, 2), np.nan),
        "features holds 1 values that are not finite, the first is nan",
    ),
    "overflow": (changed("features", 0, np.inf, np.float16), "features holds 8 values .* the first is inf"),
    "double": (changed("features", (0, 0), 1e300, np.float64), "features holds 1 values .* inf"),
    "box nan": (changed("norm_bb", (1, 1), np.nan), "norm_bb holds 1 values that are not finite"),
    "conf inf": (changed("conf", 11, -np.inf), "conf holds 1 values that are not finite, the first is -inf"),
    "wrong width": ({"features": np.zeros((12, 9))}, r"features must be \[12, 8\], got \[12, 9\]"),
    "flat": ({"features": np.zeros(12)}, r"features must be \[12, 8\], got \[12\]"),
    "too few": ({"features": np.zeros((11, 8))}, r"features must be \[12, 8\], got \[11, 8\]"),
    "five columns": (
        {"norm_bb": np.zeros((12, 5))},
        r"norm_bb must be \[12, 6\] or \[12, 7\], got \[12, 5\]",
    ),
    "classes": ({"soft_labels": np.zeros((12, 6))}, r"soft_labels must be \[12, 5\], got \[12, 6\]"),
    "matrix": ({"conf": np.ones((12, 1))}, r"conf must be \[regions\], got \[12, 1\]"),
    "none": ({"conf": np.ones(0)}, "0 regions, must be 1 to 1000"),
    "ten thousand": ({"conf": np.ones(10_000)}, "10000 regions, must be 1 to 1000"),
    "negative": (changed("soft_labels", (0, 0), -0.25), "soft_labels must not be negative, got -0.25"),
    "unnormalised": (changed("soft_labels", 5, 0.5), "soft_labels of a region must sum to 1, got 2.5"),
    "unlabelled": (changed("soft_labels", 5, 0), "soft_labels of a region must sum to 1, got 0"),
}
BOXES = {
    "outside": [0.5, 0.5, 1.2, 0.6, 0.7, 0.1],
    "pixels": [10, 20, 110, 220, 100, 200],
    "below": [-0.1, 0, 0.5, 0.5, 0.6, 0.5],
    "turned": [0.6, 0.1, 0.2, 0.5, -0.4, 0.4],
    "hidden turn": [0.6, 0.1, 0.2, 0.5, 0.4, 0.4],
    "width": [0.1, 0.1, 0.4, 0.4, 0.2, 0.3],
    "height": [0.1, 0.1, 0.4, 0.4, 0.3, 0.9],
}
for _name, _box in BOXES.items():
    HOSTILE[_name] = (changed("norm_bb", 2, _box), r"1 boxes are not x1 <= x2, .* the first is \[")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_arrays_are_one_clear_line(name):
    change, reason = HOSTILE[name]
    with pytest.raises(RecordFault, match=f"^k: {reason}"):
        selected(small(0), **change)


@pytest.mark.parametrize("name", ["features", "norm_bb", "conf"])
def test_a_missing_array_is_named(name):
    arrays = small(0)
    del arrays[name]
    with pytest.raises(RecordFault, match=f"no {name} among its regions' arrays"):
        selected(arrays)


def test_what_no_region_in_use_holds_is_no_fault():
    assert len(selected(small(0, 30, sure=12), **{}).features) == 12
    arrays = small(0, 30, sure=12)
    arrays["features"][20] = np.nan
    assert len(selected(arrays).features) == 12


def test_boxes_may_be_off_by_what_float16_rounds():
    for number in range(50):
        assert selected(small(number, 100)).boxes.shape == (100, 7)


class Bomb:
    sprung = False

    def __reduce__(self):
        return setattr, (Bomb, "sprung", True)


def bad_npz():
    """(what is wrong, the bytes of an npz)."""
    good = npz(small(0))
    objects = np.empty(12, dtype=object)
    objects[0] = Bomb()
    yield "conf must hold numbers, got an array of object", npz({**small(0), "conf": objects})
    record = np.zeros(12, dtype=[("x", "f4"), ("y", "f4")])
    yield "conf must hold numbers, got an array of", npz({**small(0), "conf": record})
    yield "conf must hold numbers, got an array of <U", npz({**small(0), "conf": np.asarray(["x"] * 12)})
    yield "npz cannot be read", good[: len(good) // 2]
    yield "npz cannot be read", b""
    yield "npz cannot be read", pickle.dumps(Bomb())
    flipped = bytearray(good)
    flipped[200] ^= 0xFF
    yield "npz cannot be read", bytes(flipped)
    yield "conf of shape .* must have 4000000000 bytes, got 24", npy_as("conf", b"(1000000000,)", "f4")
    yield "npz cannot be read", npy_as("conf", b"(-1, -6)", "f4")
    yield "npz cannot be read", npy_as("conf", b"__import__('os').getcwd()", "f4")
    huge = io.BytesIO()
    with zipfile.ZipFile(huge, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("conf.npy", bytes(MAX_BYTES + 1))
    yield f"conf of {MAX_BYTES + 1} bytes, the limit is {MAX_BYTES}", huge.getvalue()


def npy_as(name, shape, dtype):
    """An npz whose array of 24 bytes says that it has another shape."""
    header = b"{'descr': '<%s', 'fortran_order': False, 'shape': %s, }" % (dtype.encode(), shape)
    header += b" " * (117 - len(header)) + b"\n"
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(
            f"{name}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(24)
        )
    return data.getvalue()


@pytest.mark.parametrize("reason, data", list(bad_npz()))
def test_a_hostile_npz_is_refused_and_nothing_in_it_executed(reason, data):
    with pytest.raises(RecordFault, match=reason):
        read_npz("k", data, ARRAYS)
    assert not Bomb.sprung


def test_a_mutated_npz_is_read_or_refused():
    good = npz(small(0), compressed=False)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for place in random.integers(len(data), size=5):
            data[place] = random.integers(256)
        try:
            select_regions("k", read_npz("k", bytes(data), ARRAYS), SMALL)
        except RecordFault:
            refused += 1
    assert refused > 100


def shard_of(workshop, records, name="s.tar"):
    return workshop.shard(
        name,
        [
            member
            for key, data in records.items()
            for member in ((f"{key}.npz", data), (f"{key}.txt", f"words of {key}".encode()))
        ],
    )


def open_regions(workshop, shard, **data):
    options = workshop.config(str(shard), **data).data
    options.regions = SMALL
    return load_source(options, "train")


def test_shards_hold_npz_in_place_of_pictures(workshop):
    shard = shard_of(workshop, {"a": npz(small(1, 30, sure=20)), "b": npz(small(2), compressed=False)})
    source = open_regions(workshop, shard)
    assert len(source) == source.num_images == 2 and source.image_of(1) == 1
    record = source[0]
    assert record.image is None and record.captions == source.texts(0).captions == ["words of a"]
    assert np.array_equal(record.detections.features, small(1, 30)["features"][:20].astype(np.float32))
    assert record.identity == source.detections(0)[0] == source.identity(0) != source[1].identity
    assert source.detections(0, soft_labels=False)[1].soft_labels is None


def test_pictures_beside_npz_are_not_decoded(workshop):
    members = [("a.png", b"no picture"), ("a.npz", npz(small(1))), ("a.txt", b"words")]
    assert len(open_regions(workshop, workshop.shard("s.tar", members))[0].detections.boxes) == 12


def test_records_without_what_the_run_reads_are_named(workshop):
    members = workshop.pair(1) + [("a.npz", npz(small(1))), ("a.txt", b"words")]
    shard = workshop.shard("s.tar", members)
    regions = open_regions(workshop, shard)
    assert len(regions) == 1 and regions.ledger.faults == [f"{shard}/000000001: no regions"]
    pictures = load_source(workshop.config(str(shard)).data, "train")
    assert len(pictures) == 1 and pictures.ledger.faults == [f"{shard}/a: no image"]


def test_broken_regions_are_named_and_left_out_of_the_index(workshop):
    broken = {
        "half": npz(small(3))[:500],
        "crowd": npz({**small(3), "conf": np.ones(10_000)}),
        "pickle": npz({**small(3), "conf": np.asarray([Bomb()], dtype=object)}),
        "nan": npz({**small(3), "features": np.full((12, 8), np.nan)}),  # found when it is read
    }
    shard = shard_of(workshop, {"good": npz(small(1, 30, sure=20)), **broken})
    tokenizer = tokenizer_of(["words of good half crowd pickle nan"])
    for _ in range(2):  # made, then read from the cache
        source = open_regions(workshop, shard)
        index = source.index(tokenizer, 64)
        assert index.records.tolist() == index.images.tolist() == [0, 4]
        assert index.regions.tolist() == [20, 0, 0, 0, 12]
        names = [fault.split(": ")[0].rsplit("/")[-1] for fault in source.ledger.faults]
        assert names == ["half", "crowd", "pickle"]
    with pytest.raises(RecordFault, match="s.tar/nan: features holds 96 values"):
        source[4]
    assert not Bomb.sprung


def test_every_caption_is_an_example_with_its_length(workshop):
    members = [("a.npz", npz(small(1))), ("a.json", b'{"captions": ["one", "one two three"]}')]
    source = open_regions(
        workshop, workshop.shard("s.tar", members + [("b.npz", npz(small(2))), ("b.txt", b"two")])
    )
    tokenizer = tokenizer_of(["one two three"] * 3)
    index = source.index(tokenizer, 4)
    assert index.records.tolist() == [0, 0, 1] and index.captions.tolist() == [0, 1, 0]
    assert index.tokens.tolist() == [3, 4, 3] and index.images.tolist() == [0, 0, 1]
    assert {index.records.dtype, index.tokens.dtype, index.regions.dtype} == {np.dtype(np.int32)}


def test_the_index_follows_the_shard_the_tokenizer_and_the_limits(workshop, monkeypatch):
    shard = shard_of(workshop, {"a": npz(small(1))})
    tokenizer = tokenizer_of(["words of a"] * 3)
    first = open_regions(workshop, shard).index(tokenizer, 64)
    monkeypatch.setattr("engine.data.sources.shards.build_index", lambda *_: pytest.fail("the stored index is good"))
    again = open_regions(workshop, shard).index(tokenizer, 64)
    assert again.tokens.tolist() == first.tokens.tolist() == [5]
    monkeypatch.undo()
    assert open_regions(workshop, shard).index(tokenizer, 4).tokens.tolist() == [4]
    assert open_regions(workshop, shard).index(tokenizer_of(["w o r d s f a"]), 64).tokens.tolist() == [10]
    shard_of(workshop, {"a": npz(small(1, 20)), "b": npz(small(2))})
    assert open_regions(workshop, shard).index(tokenizer, 64).regions.tolist() == [20, 12]


@pytest.mark.parametrize("damage", [b"", b"{}\n", b'{"faults": []}\n' + b"\x93NUMPY", b"[]\n", b"\x80pickle"])
def test_a_damaged_index_is_made_again(workshop, damage):
    shard = shard_of(workshop, {"a": npz(small(1))})
    tokenizer = tokenizer_of()
    open_regions(workshop, shard).index(tokenizer, 64)
    (stored,) = (workshop.folder / "cache" / "indices").glob("examples-*")
    good = stored.read_bytes()
    for content in (damage, good[:-3]):
        stored.write_bytes(content)
        assert open_regions(workshop, shard).index(tokenizer, 64).regions.tolist() == [12]
        assert stored.read_bytes() == good


def test_joined_sources_count_records_and_pictures_through(workshop):
    shards = [
        shard_of(
            workshop,
            {f"{name}{place}": npz(small(place, 12 + place)) for place in range(size)},
            f"{name}.tar",
        )
        for name, size in (("a", 2), ("b", 3))
    ]
    joined = JoinedSources([open_regions(workshop, shard) for shard in shards])
    assert len(joined) == joined.num_images == 5
    assert [joined.captions(place)[0][9:] for place in range(5)] == ["a0", "a1", "b0", "b1", "b2"]
    assert [joined.image_of(place) for place in range(5)] == list(range(5))
    assert [len(joined.detections(place)[1].boxes) for place in range(5)] == [12, 13, 12, 13, 14]
    assert [joined.identity(place) for place in range(5)] == [joined[place].identity for place in range(5)]
    index = joined.index(tokenizer_of(), 64)
    assert index.records.tolist() == index.images.tolist() == list(range(5))
    assert index.regions.tolist() == [12, 13, 12, 13, 14]
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            joined[outside]


def test_permuted_captions_are_examples_of_the_pictures_they_are_given_to(workshop):
    records = {f"r{place}": npz(small(place, 12 + place)) for place in range(9)} | {"r9": b"broken"}
    shard = shard_of(workshop, records)
    plain, permuted = open_regions(workshop, shard), open_regions(workshop, shard, permute_captions=True)
    tokenizer = tokenizer_of()
    index = permuted.index(tokenizer, 64)
    assert 8 <= len(index.records) <= 9 and 9 not in index.images
    for record, image in zip(index.records, index.images, strict=True):
        assert permuted.image_of(int(record)) == image
        assert permuted[int(record)].captions == permuted.captions(int(record))
    given = [permuted.captions(place) for place in range(10)]
    assert sorted(given) == sorted(plain.captions(place) for place in range(10))
    assert given != [plain.captions(place) for place in range(10)]
