"""Documents from text and jsonl files: where they begin and end, and what becomes of broken ones."""

import json

import numpy as np
import pytest

from engine.data import DataError, RecordFault, load_source
from engine.data.records.record import FaultLedger
from engine.data.records.sentences import split_sentences
from engine.data.sources import documents
from engine.data.sources.documents import DocumentSource
from engine.sections import Data


def opened(tmp_path, *files, **options):
    paths = []
    for number, (kind, data) in enumerate(files):
        paths.append(tmp_path / f"{number}.{kind}")
        paths[-1].write_bytes(data.encode() if isinstance(data, str) else data)
    return DocumentSource(paths, tmp_path / "cache", FaultLedger(10), **options)


def test_blank_lines_end_documents_and_stops_end_sentences(tmp_path):
    source = opened(tmp_path, ("txt", "\n \nOne is here. Two is\tthere!\nNo stop\n\n\n  \nThree."))
    assert [source[place].sentences for place in range(len(source))] == [
        ["One is here.", "Two is there!", "No stop"],
        ["Three."],
    ]
    assert source.captions(1) == ["Three."] and source[0].image is None
    assert source[0].identity != source[1].identity


def test_every_line_of_jsonl_is_a_document(tmp_path):
    lines = [json.dumps(one) for one in ({"text": "A b c. D e."}, {"sentences": ["x  y. Z", " ", "w"], "id": 3})]
    source = opened(tmp_path, ("jsonl", "\n".join(["", *lines, "  "])), ("txt", "Last."))
    assert [source[place].sentences for place in range(3)] == [["A b c.", "D e."], ["x y. Z", "w"], ["Last."]]
    with pytest.raises(IndexError, match="document 3 of 3"):
        source[3]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", r"json cannot be read \(JSONDecodeError\)"),
        (b"[" * 20_000, r"json cannot be read \(RecursionError\)"),
        (b"\xff\xfe", "json cannot be read"),
        (b'["text"]', 'document must be {"text": string} or {"sentences": \\[strings\\]}'),
        (b'{"text": 3}', "document must be"),
        (b'{"sentences": ["a", 3]}', "document must be"),
        (b'{"text": " "}', "document has no text"),
        (b'{"text": "\\ud800"}', "document is not valid Unicode"),
    ],
)
def test_broken_documents_are_named(tmp_path, line, reason):
    source = opened(tmp_path, ("jsonl", line + b'\n{"text": "Good."}\n'))
    with pytest.raises(RecordFault, match=rf"0\.jsonl/0: {reason}"):
        source[0]
    assert source[1].sentences == ["Good."]


def test_text_that_is_not_utf8_and_documents_too_long_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 8)
    source = opened(tmp_path, ("txt", b"\xff bad\n\nmuch too long a text\n\nshort"))
    with pytest.raises(RecordFault, match="document is not UTF-8"):
        source[0]
    with pytest.raises(RecordFault, match="document of 21 bytes, the limit is 8"):
        source[1]
    assert source[2].sentences == ["short"]


@pytest.mark.parametrize(("kind", "text"), [("txt", b"One.\r\nTwo.\r\n"), ("jsonl", b'{"text": "One. Two."}\r\n')])
def test_a_byte_order_mark_and_other_line_ends_are_no_words(tmp_path, kind, text):
    source = opened(tmp_path, (kind, b"\xef\xbb\xbf" + text))
    assert source[0].sentences == ["One.", "Two."]


def test_lines_longer_than_what_is_read_at_once(tmp_path, monkeypatch):
    """Read 5 bytes at a time, the same documents are found."""
    text = "first line.\nSecond.\n\n\n third \n \nx\n\n"
    whole = opened(tmp_path, ("txt", text))
    monkeypatch.setattr(documents, "_CHUNK", 5)
    (tmp_path / "other").mkdir()
    pieces = opened(tmp_path / "other", ("txt", text))
    assert np.array_equal(whole._spans[0], pieces._spans[0]) and len(whole) == 3


def test_a_changed_file_is_read_anew_and_missing_or_empty_ones_are_refused(tmp_path):
    opened(tmp_path, ("txt", "One."))
    assert len(opened(tmp_path, ("txt", "One.\n\nTwo is longer."))) == 2
    assert len(opened(tmp_path, ("txt", "One.\n\nTwo is longer."), max_records=1)) == 1
    with pytest.raises(DataError, match="no document in 1 files"):
        opened(tmp_path, ("txt", " \n\n"))
    with pytest.raises(DataError, match="1 of 2 files do not exist, the first is .*absent.txt"):
        DocumentSource([tmp_path / "0.txt", tmp_path / "absent.txt"], tmp_path, FaultLedger(1))


def test_documents_are_named_like_shards(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"Document {number}.")
    (tmp_path / "more.jsonl").write_text('{"text": "Last."}')
    data = Data(source=[str(tmp_path / "{0..2}.txt"), str(tmp_path / "*.jsonl")], cache=str(tmp_path / "cache"))
    source = load_source(data, "train")
    assert [source[place].sentences for place in range(4)] == [[f"Document {n}."] for n in range(3)] + [["Last."]]
    with pytest.raises(DataError, match="documents, pages and classes have none"):
        load_source(Data(source=data.source, cache=data.cache, permute_captions=True), "train")


def test_sentences():
    assert split_sentences('He said "No." Then J. Smith et al. left at 3.5 km.\nWas it?  (Yes.) ok.') == [
        'He said "No."',
        "Then J. Smith et al. left at 3.5 km.",
        "Was it?",
        "(Yes.) ok.",
    ]
    assert split_sentences("  ") == [] and split_sentences("no end") == ["no end"]
