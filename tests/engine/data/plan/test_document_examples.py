"""Documents tokenized once, and the examples made of them."""

import os

import numpy as np
import pytest

from engine.data import DataError, train_tokenizer
from engine.data.plan.document_examples import DocumentExamples
from engine.data.plan.token_store import TokenStore, chunks, until, within
from engine.data.records.record import FaultLedger
from engine.data.sources.documents import DocumentSource

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENIZER = train_tokenizer([" ".join(LETTERS), " ".join(LETTERS)], "wordpiece", 120, True)


def sentence(start, length):
    """`length` letters from number `start` on, one token each but the last two, which are one word of two."""
    letters = [LETTERS[(start + place) % 26] for place in range(length)]
    return " ".join(letters[:-2]) + " " + "".join(letters[-2:])


def stored(tmp_path, documents, ledger=None, tokenizer=TOKENIZER):
    """`documents`: lengths of the sentences of each."""
    start, blocks = 0, []
    for lengths in documents:
        lines = []
        for length in lengths:
            lines.append(sentence(start, length))
            start += length
        blocks.append("\n".join(lines))
    path = tmp_path / "documents.txt"
    path.write_text("\n\n".join(blocks))
    os.utime(path, (0, 0))  # as if it had not been written again
    source = DocumentSource([path], tmp_path / "cache", ledger or FaultLedger(3))
    return TokenStore(source, tokenizer, tmp_path / "cache", source.ledger, source.state())


def test_a_store_has_every_token_once_and_separators_behind_documents(tmp_path):
    store = stored(tmp_path, [[4, 3], [5]])
    letters = [TOKENIZER.model.token_to_id(letter) for letter in LETTERS[:12]]
    pieces = [TOKENIZER.model.token_to_id(f"##{letter}") for letter in LETTERS[:12]]
    sep = TOKENIZER.sep_id
    tokens = letters[:3] + pieces[3:4] + letters[4:6] + pieces[6:7] + [sep] + letters[7:11] + pieces[11:] + [sep]
    assert store.ids.tolist() == tokens
    assert store.starts_word.tolist() == [True] * 3 + [False] + [True] * 2 + [False] * 2 + [True] * 4 + [False] * 2
    assert store.sentences.tolist() == [[0, 4], [4, 7], [8, 13]] and store.first_sentences.tolist() == [0, 2]
    assert [store.document_of(one) for one in range(3)] == [0, 0, 1] and store.last_sentence(1) == 3
    assert store.words(np.arange(4)).tolist() == [1, 2, 3, 3]


def test_a_store_is_mapped_from_disk_and_made_anew_for_another_tokenizer(tmp_path, monkeypatch):
    first = stored(tmp_path, [[4, 3], [5]])
    assert isinstance(first.ids, np.memmap)
    with monkeypatch.context() as patch:
        patch.setattr(type(TOKENIZER), "encode_all", lambda *_: pytest.fail("tokenized again"))
        assert np.array_equal(stored(tmp_path, [[4, 3], [5]]).ids, first.ids)
    other = train_tokenizer(["a b c d e f g"], "unigram", 40, True)
    assert not np.array_equal(stored(tmp_path, [[4, 3], [5]], tokenizer=other).ids, first.ids)


def test_broken_documents_are_named_each_time_and_left_out(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a b c."}\n{"no": 1}\n{"text": "d e."}\n')
    for _ in range(2):
        source = DocumentSource([path], tmp_path / "cache", FaultLedger(3))
        store = TokenStore(source, TOKENIZER, tmp_path / "cache", source.ledger, source.state())
        assert len(store.first_sentences) == 2
        assert source.ledger.faults == [f'{path}/1: document must be {{"text": string}} or {{"sentences": [strings]}}']


def test_runs_of_sentences_stay_in_their_document(tmp_path):
    store = stored(tmp_path, [[4, 3, 6, 3], [20, 3]])
    assert chunks(store, within(7)).tolist() == [[0, 2], [2, 3], [3, 4], [4, 5], [5, 6]]
    assert chunks(store, within(9)).tolist() == [[0, 2], [2, 4], [4, 5], [5, 6]]
    assert chunks(store, until(7)).tolist() == [[0, 2], [2, 4], [4, 5], [5, 6]]
    assert chunks(store, until(8)).tolist() == [[0, 3], [3, 4], [4, 5], [5, 6]]


def test_sentences_are_enclosed_and_overlong_ones_cut(tmp_path):
    store = stored(tmp_path, [[4, 3], [20]])
    examples = DocumentExamples(store, TOKENIZER, "sentences", 9, 0.0, seed=0)
    whole, cut = examples[0, 0], examples[5, 1]
    assert len(examples) == 2
    assert whole.ids.tolist() == [TOKENIZER.cls_id, *store.ids[:7], TOKENIZER.sep_id]
    assert whole.words.tolist() == [-1, 1, 2, 3, 3, 4, 5, 5, -1] and whole.types is None and whole.pair is None
    assert cut.ids.tolist() == [TOKENIZER.cls_id, *store.ids[8:15], TOKENIZER.sep_id]


def test_blocks_are_the_tokens_in_a_row(tmp_path):
    store = stored(tmp_path, [[4, 3], [5, 9]])
    examples = DocumentExamples(store, TOKENIZER, "blocks", 5, 0.0, seed=0)
    assert len(examples) == len(store.ids) // 5 == 4
    joined = np.concatenate([examples[0, place].ids for place in range(4)])
    assert np.array_equal(joined, store.ids[:20])
    second = examples[0, 1]
    assert (second.words == -1).tolist() == (second.ids == TOKENIZER.sep_id).tolist() == [False] * 2 + [True] + [False] * 2


def test_pairs_go_on_or_are_of_another_document(tmp_path):
    """Every token of the first document's examples is known by its place: 23 letters, none twice."""
    store = stored(tmp_path, [[4, 3, 5, 4], [3, 3, 4]])
    examples = DocumentExamples(store, TOKENIZER, "next_sentence", 29, 0.0, seed=0)
    assert len(examples) == 2
    labels, cuts = [], set()
    for epoch in range(400):
        found = examples[epoch, 0]
        border = int(found.types.argmax())
        first, second = found.ids[1 : border - 1], found.ids[border:-1]
        assert found.ids[[0, border - 1, -1]].tolist() == [TOKENIZER.cls_id, TOKENIZER.sep_id, TOKENIZER.sep_id]
        assert (found.words < 0).nonzero()[0].tolist() == [0, border - 1, len(found.ids) - 1]
        assert set(found.words[1 : border - 1]).isdisjoint(found.words[border:-1])
        assert np.array_equal(first, store.ids[: len(first)]) and len(found.ids) <= 25
        own = store.ids[len(first) : 16]
        assert np.array_equal(second, own) == (found.pair == 0)
        if found.pair:
            assert set(second) <= set(store.ids[17:])
        labels.append(found.pair)
        cuts.add(len(first))
    assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / np.sqrt(400) and cuts == {4, 7, 12}


def test_examples_are_a_function_of_seed_stream_epoch_and_number(tmp_path):
    store = stored(tmp_path, [[4, 3, 5, 4] * 4, [3, 3, 4] * 4])

    def drawn(seed=0, stream=0, epoch=0):
        examples = DocumentExamples(store, TOKENIZER, "next_sentence", 30, 0.5, seed, stream)
        return [tuple(examples[epoch, place].ids) for place in range(len(examples))]

    assert drawn() == drawn()
    assert len({tuple(one) for one in (drawn(), drawn(seed=1), drawn(stream=1), drawn(epoch=1))}) == 4


def test_some_pairs_are_short(tmp_path):
    store = stored(tmp_path, [[4] * 30, [5] * 30])
    examples = DocumentExamples(store, TOKENIZER, "next_sentence", 53, 0.2, seed=0)
    lengths = [len(examples[epoch, 0].ids) - 3 for epoch in range(600)]
    short = np.mean(np.asarray(lengths) < 50)
    assert max(lengths) == 50 and abs(short - 0.2 * 48 / 49) < 4 * np.sqrt(0.16 / 600)


def test_orders_need_two_sentences(tmp_path):
    store = stored(tmp_path, [[4, 3, 5, 4], [30]])
    examples = DocumentExamples(store, TOKENIZER, "sentence_order", 10, 0.0, seed=0)
    assert examples.runs.tolist() == [[0, 2], [2, 4]]
    for epoch in range(20):
        found = examples[epoch, 0]
        inner = found.words >= 0
        order = np.argsort(found.types[inner] ^ found.pair, kind="stable")
        assert np.array_equal(found.ids[inner][order], store.ids[:7])


def test_what_makes_no_example_is_refused(tmp_path):
    store = stored(tmp_path, [[4, 3]])
    with pytest.raises(DataError, match="next_sentence needs at least 2 documents, got 1"):
        DocumentExamples(store, TOKENIZER, "next_sentence", 10, 0.0, seed=0)
    with pytest.raises(DataError, match="blocks of 10 tokens makes no example of 8 tokens"):
        DocumentExamples(store, TOKENIZER, "blocks", 10, 0.0, seed=0)
    path = tmp_path / "empty.jsonl"
    path.write_text('{"no": 1}\n')
    source = DocumentSource([path], tmp_path / "cache", FaultLedger(3))
    with pytest.raises(DataError, match="no document has a token, of 1"):
        TokenStore(source, TOKENIZER, tmp_path / "cache", source.ledger, source.state())
