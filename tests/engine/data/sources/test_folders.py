"""Folders of pages and of classes: what they hold, how broken pages are named."""

import json

import numpy as np
import pytest

from engine.data import DataError, RecordFault, load_source
from engine.data.records.pages import lines_of, parse_page
from engine.data.records.record import FaultLedger
from engine.data.sources.folders import ClassFolder, PageFolder
from engine.sections import Data

GOOD = {"words": ["Dear", "Sir,", "hello"], "boxes": [[0, 0, 90, 20], [100, 2, 200, 22], [0, 30, 120, 50]], "tags": ["letter"]}


@pytest.fixture
def pages(tmp_path, workshop):
    folder = tmp_path / "pages"
    folder.mkdir()
    for name in ("b", "a"):
        (folder / f"{name}.png").write_bytes(workshop.image(ord(name), (40, 60)))
        (folder / f"{name}.json").write_text(json.dumps(GOOD))
    (folder / "tags.txt").write_bytes(b"\xef\xbb\xbfform\r\nletter\r\n")  # as editors on Windows write it
    return folder


def test_a_page_is_words_with_boxes_lines_and_tags(pages):
    source = load_source(Data(source=f"pages:{pages}"), "train")
    record = source[0]
    assert len(source) == 2 and record.key.endswith("pages/a") and record.image.size == (40, 60)
    assert record.page.words == GOOD["words"] and record.page.boxes.tolist() == GOOD["boxes"]
    assert record.page.lines.tolist() == [0, 0, 1]
    assert source.class_names == ("form", "letter") and record.classes == (1,)
    assert source.captions(1) == ["Dear Sir, hello"] and source.picture(1)[0].size == (40, 60)
    assert record.identity != source[1].identity


def test_given_lines_are_numbered_from_0_and_empty_words_left_out():
    content = {**GOOD, "words": [" De ar", " \n", "x" * 300], "lines": [7, 7, 4]}
    words, notes = parse_page("page", content)
    assert words.words == ["Dear", "x" * 256] and words.lines.tolist() == [1, 0] and len(words.boxes) == 2
    assert notes == ("1 of 3 words are empty", "1 words cut to their first 256 characters")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"words": "Dear"}, "words must be a list of strings"),
        ({"words": ["a", 3, "b"]}, "words must be a list of strings"),
        ({"words": ["a", "\ud800", "b"]}, "words are not valid Unicode"),
        ({"words": [], "boxes": []}, "page has no words"),
        ({"boxes": None}, "boxes must be 3 lists of 4 integers from 0 to 1000, as many as words"),
        ({"boxes": [[0, 0, 1, 1]] * 2}, "boxes must be 3 lists"),
        ({"boxes": [[0, 0, 1, 1], [0, 0, 1], [0, 0, 1, 1, 2]]}, "boxes must be 3 lists"),
        ({"boxes": [[0, 0, 1, 1001]] * 3}, "boxes must be 3 lists"),
        ({"boxes": [[0, 0, True, 1]] * 3}, "boxes must be 3 lists"),
        ({"boxes": [[0, 0, 0.5, 1]] * 3}, "boxes must be 3 lists"),
        ({"boxes": [[0, 9, 1, 8]] * 3}, "boxes must be left, top, right, bottom: none may end before it begins"),
        ({"lines": [0, 1]}, "lines must be 3 integers from 0 to 65536, as many as words"),
        ({"lines": [0, 1, -1]}, "lines must be 3 integers"),
        ({"tags": "letter"}, "tags must be a list of strings"),
        ({"tags": ["memo"]}, "tags.txt has no tag 'memo'"),
    ],
)
def test_broken_pages_are_named(pages, change, reason):
    (pages / "a.json").write_text(json.dumps({**GOOD, **change}))
    source = PageFolder(pages, 10**6, FaultLedger(1))
    with pytest.raises(RecordFault, match=f"pages/a: {reason}"):
        source[0]
    assert source[1].page.words == GOOD["words"]


def test_pictures_that_lie_or_are_too_large_are_named(pages):
    (pages / "a.png").write_bytes(b"no picture")
    with pytest.raises(RecordFault, match="image cannot be decoded"):
        PageFolder(pages, 10**6, FaultLedger(1))[0]
    with pytest.raises(RecordFault, match="image of 40 x 60 pixels, the limit is 2000"):
        PageFolder(pages, 2000, FaultLedger(1))[1]
    (pages / "b.json").write_bytes(b'{"words": [')
    with pytest.raises(RecordFault, match="json cannot be read"):
        PageFolder(pages, 10**6, FaultLedger(1))[1]


def test_halves_of_pages_are_left_out_and_a_folder_without_any_is_refused(pages, tmp_path):
    (pages / "c.json").write_text("{}")
    (pages / "d.png").write_bytes(b"")
    (pages / "e.pkl").write_bytes(b"never opened")
    ledger = FaultLedger(5)
    assert len(PageFolder(pages, 10**6, ledger)) == 2
    assert ledger.faults == [f"{pages}/c: no picture", f"{pages}/d: no json"]
    with pytest.raises(DataError, match="has no page"):
        PageFolder(tmp_path, 10**6, FaultLedger(0))
    with pytest.raises(DataError, match="pages:/absent: no such folder"):
        load_source(Data(source="pages:/absent"), "train")


def test_lines_follow_from_boxes():
    """A word to the right at the same height goes on; lower, or back to the left in a second column, a line begins."""
    boxes = [[0, 0, 10, 10], [12, 4, 20, 14], [22, 12, 30, 22], [0, 24, 9, 30], [50, 24, 60, 34], [40, 25, 45, 33]]
    assert lines_of(np.asarray(boxes)).tolist() == [0, 0, 1, 2, 2, 3]


def classes(folder, workshop, **counts):
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number}.jpg").write_bytes(workshop.image(number, (32, 32), "JPEG"))
    return folder


def test_folders_are_classes_in_order_of_their_names(tmp_path, workshop):
    train, held_out = classes(tmp_path / "t", workshop, sea_horse=2, cat=3), classes(tmp_path / "h", workshop, sea_horse=1)
    data = Data(source=f"classes:{train}", held_out=f"classes:{held_out}")
    source = load_source(data, "train")
    assert source.class_names == ("cat", "sea_horse") and len(source) == 5
    assert [source[place].classes for place in range(5)] == [(0,)] * 3 + [(1,)] * 2
    assert source[4].captions == ["sea horse"] and source[4].image.size == (32, 32)
    unseen = load_source(data, "held_out")
    assert len(unseen) == 1 and unseen[0].classes == (1,)
    few = ClassFolder(train, 10**6, FaultLedger(0), max_records=2)
    assert [few[place].classes for place in range(2)] == [(0,), (1,)]


def test_classes_that_training_lacks_and_folders_without_any_are_refused(tmp_path, workshop):
    train, held_out = classes(tmp_path / "t", workshop, cat=1), classes(tmp_path / "h", workshop, dog=1)
    with pytest.raises(DataError, match="has the class 'dog', which the training pictures have not"):
        load_source(Data(source=f"classes:{train}", held_out=f"classes:{held_out}"), "held_out")
    with pytest.raises(DataError, match="has no folders, one for each class"):
        load_source(Data(source=f"classes:{train}/cat"), "train")
    (train / "cat" / "0.jpg").unlink()
    with pytest.raises(DataError, match="has no picture in a folder of its class"):
        load_source(Data(source=f"classes:{train}"), "train")
