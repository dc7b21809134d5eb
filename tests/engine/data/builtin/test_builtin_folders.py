"""The built-in documents, pages and classes: real, exact, apart, the same bytes every time."""

import hashlib

import numpy as np
import pytest
from shared_cache import shared_cache

from engine.data import load_source
from engine.data.builtin import folder_sets, prose
from engine.data.builtin.folder_sets import GLYPH_CLASSES, PAGES, TEXT
from engine.data.builtin.page_drawing import HEIGHT, KINDS, TAGS, WIDTH, draw_page
from engine.sections import Data

__all__ = ["shared_cache"]


@pytest.fixture(scope="module")
def documents():
    return list(prose.documents())


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = [(path.relative_to(folder), hashlib.blake2b(path.read_bytes()).digest()) for path in files]
    return hashlib.blake2b(repr(parts).encode()).hexdigest()


def both(name, shared_cache):
    data = Data(source=name, held_out=name, cache=str(shared_cache))
    return load_source(data, "train"), load_source(data, "held_out")


def test_the_documents_are_enough_english_and_apart(shared_cache):
    train, held_out = both(TEXT, shared_cache)
    seen, unseen = (
        {one for place in range(len(source)) for one in source[place].sentences} for source in (train, held_out)
    )
    assert len(train) >= 150 and len(held_out) >= 15 and len(seen) >= 6000 and len(unseen) >= 600
    assert seen.isdisjoint(unseen)
    words = [word.strip(".,()'\"").lower() for sentence in seen for word in sentence.split()]
    assert len(words) > 60_000 and 0.04 < words.count("the") / len(words) < 0.12
    assert sum(any(sign in one for sign in "<>=\\|_{}[]*#") for one in seen) == 0


def test_a_sentence_of_two_documents_stays_with_the_first(documents):
    sentences = [sentence for one in documents for sentence in one.sentences]
    assert len(set(sentences)) == len(sentences)
    assert [one.name for one in documents] == [one.name for one in prose.documents()]


def test_sets_have_the_same_bytes_again(shared_cache, tmp_path, monkeypatch):
    monkeypatch.setitem(folder_sets.NUM_PAGES, "held_out", 5)
    for name in (TEXT, GLYPH_CLASSES):
        assert digest(folder_sets.folder(name, "held_out", tmp_path)) == digest(
            folder_sets.folder(name, "held_out", shared_cache)
        )
    again = [digest(folder_sets.folder(PAGES, "held_out", tmp_path / place)) for place in "ab"]
    assert again[0] == again[1]


def test_pages_are_read_as_they_were_drawn(documents, tmp_path, monkeypatch):
    monkeypatch.setitem(folder_sets.NUM_PAGES, "held_out", 12)
    source = load_source(Data(source=PAGES, held_out=PAGES, cache=str(tmp_path)), "held_out")
    texts = [one.sentences for one in documents if one.held_out]
    assert len(source) == 12 and source.class_names == TAGS
    for place in range(12):
        record, page = source[place], draw_page(folder_sets.NUM_PAGES["train"] + place, texts)
        assert record.page.words == page.words and np.array_equal(record.page.boxes, page.boxes)
        assert record.page.lines.tolist() == page.lines and record.image.size == (WIDTH, HEIGHT)
        assert {TAGS[number] for number in record.classes} == set(page.tags)


def test_boxes_hold_the_ink_of_their_words_and_nothing_else_is_written(documents):
    """But for the rules of forms and tables, which are grey; words do not overlap, lines are a row of words each."""
    texts = [one.sentences for one in documents]
    kinds = set()
    for number in range(25):
        page = draw_page(number, texts)
        kinds.add(page.tags[0])
        ink = np.asarray(page.picture) < 100
        for left, top, right, bottom in page.pixel_boxes:
            assert 0 <= left < right <= WIDTH and 0 <= top < bottom <= HEIGHT
            assert ink[top:bottom, left:right].any()
        outside = ink.copy()
        for left, top, right, bottom in page.pixel_boxes:
            outside[top:bottom, left:right] = False
        assert not outside.any()
        scaled = page.boxes
        exact = np.asarray(page.pixel_boxes) * 1000 / np.asarray([WIDTH, HEIGHT, WIDTH, HEIGHT])
        assert (scaled[:, :2] <= exact[:, :2]).all() and (scaled[:, 2:] >= exact[:, 2:]).all()
        assert np.abs(scaled - exact).max() < 1
        boxes, lines = np.asarray(page.pixel_boxes), np.asarray(page.lines)
        for line in range(lines.max() + 1):
            row = boxes[lines == line]
            assert len(row) and (np.diff(row[:, 0]) > 0).all() and (row[1:, 0] >= row[:-1, 2] - 1).all()
            assert row[:, 1].max() < row[:, 3].min() + 6  # apostrophes and commas are apart
        assert set(page.tags) <= set(TAGS) and len(page.words) >= 20
    assert kinds == set(KINDS)


def test_glyphs_are_classed_by_the_first_word_of_their_name(shared_cache):
    train, held_out = both(GLYPH_CLASSES, shared_cache)
    assert train.class_names == held_out.class_names and {"greek", "latin", "braille"} <= set(train.class_names)
    assert len(train) > 2500 and len(held_out) > 400
    counts = np.bincount([train._pictures[place][1] for place in range(len(train))])
    assert counts.min() >= 40 and len(counts) == len(train.class_names)
    record = held_out[0]
    assert record.captions == [held_out.class_names[record.classes[0]]] and record.image.size == (32, 32)
