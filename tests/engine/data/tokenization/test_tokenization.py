"""Tokenizers: three kinds, repeatable, saved and loaded, special tokens in their places."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from engine.data import Tokenizer, load_tokenizer, train_tokenizer
from engine.data.builtin.glyphs import caption_of
from engine.data.tokenization.tokenizer import SPECIAL_TOKENS

KINDS = ("wordpiece", "bpe", "unigram")
CAPTIONS = [caption_of(code_point) for code_point in range(0x20, 0x600) if caption_of(code_point)]
SENTENCE = "latin small letter u with double acute"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_come_first_and_frame_every_caption(kind):
    tokenizer = train_tokenizer(CAPTIONS, kind, 400, lowercase=True)
    assert [tokenizer.model.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert 300 < tokenizer.vocab_size <= 400
    assert tokenizer.ordinary_ids.tolist() == list(range(5, tokenizer.vocab_size))
    ids, words = tokenizer.encode(SENTENCE.title(), 64)
    assert (ids[0], ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id) and (words[0], words[-1]) == (-1, -1)
    assert tokenizer.decode(ids).strip() == SENTENCE
    assert sorted(set(words[1:-1])) == list(range(7)) and (np.diff(words[1:-1]) >= 0).all()


def test_training_is_repeatable_in_any_order_and_any_process():
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))

    def models(captions):
        return [train_tokenizer(captions, kind, 400, True).model.to_str() for kind in KINDS]

    script = (
        "import sys, json; from engine.data import train_tokenizer; captions = json.load(sys.stdin)\n"
        "train = lambda kind: train_tokenizer(captions, kind, 400, True).model.to_str()\n"
        f"print(json.dumps([train(kind) for kind in {KINDS!r}]))"
    )
    other = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(shuffled), capture_output=True, text=True
    )
    assert models(CAPTIONS) == models(shuffled) == json.loads(other.stdout), other.stderr


def test_characters_that_no_piece_needs_are_scored_alike():
    """The unigram trainer puts them back in hash order, each with a higher score."""
    captions = CAPTIONS + [caption.title() for caption in CAPTIONS[::3]]  # capitals in frequent words alone
    first, *others = [train_tokenizer(captions, "unigram", 300, lowercase=False).model.to_str() for _ in range(3)]
    scores = dict(json.loads(first)["model"]["vocab"])
    assert len({scores[capital] for capital in "ABCDEFGHIJKL"}) == 1
    assert others == [first, first]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_loads_the_same(kind, tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, kind, 400, True)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    for caption in CAPTIONS[::20]:
        assert all(
            np.array_equal(a, b)
            for a, b in zip(tokenizer.encode(caption, 64), loaded.encode(caption, 64), strict=True)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_cut_and_unknown_characters_survive(kind):
    tokenizer = train_tokenizer(CAPTIONS, kind, 400, True)
    ids, words = tokenizer.encode(" ".join([SENTENCE] * 50), 16)
    assert len(ids) == len(words) == 16 and ids[-1] == tokenizer.sep_id
    ids, _ = tokenizer.encode("\U0001f600 \u4e00", 16)
    assert len(ids) > 2 and (ids >= 0).all()
    assert len(tokenizer.encode("x" * 8192, 16)[0]) <= 16


def test_ids_in_place_of_a_caption_are_enclosed_and_cut_like_it():
    tokenizer = train_tokenizer(CAPTIONS, "wordpiece", 400, lowercase=True)
    sentence = "unheard stalactites hang above " + SENTENCE
    for max_tokens in (64, 9):
        ids, words = tokenizer.encode(sentence, max_tokens)
        whole = tokenizer.encode(sentence, 64)[0][1:-1].tolist()
        enclosed, numbered = tokenizer.enclose(whole, max_tokens)
        assert enclosed.tolist() == ids.tolist() and numbered.tolist() == words.tolist()
    assert np.bincount(words[1:-1]).max() > 1, "some word has several pieces"
    assert [part.tolist() for part in tokenizer.enclose([], 64)] == [[1, 2], [-1, -1]]


def test_ids_that_no_token_has_are_refused():
    tokenizer = train_tokenizer(CAPTIONS, "wordpiece", 400, lowercase=True)
    last = tokenizer.vocab_size - 1
    for wrong in ([5, last + 1], [-1, 5]):
        with pytest.raises(ValueError, match=f"must be from 0 to {last}, got {min(wrong)} to {max(wrong)}"):
            tokenizer.enclose(wrong, 64)


def test_the_free_places_of_berts_vocabularies_are_no_words():
    vocabulary = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused2]", "!", "a", "##s"]
    numbers = {piece: number for number, piece in enumerate(vocabulary)}
    model = tokenizers.models.WordPiece(numbers, unk_token="[UNK]")
    assert Tokenizer(tokenizers.Tokenizer(model)).ordinary_ids.tolist() == [7, 8, 9]


def test_case_is_kept_on_request():
    tokenizer = train_tokenizer(["Alpha beta", "alpha Beta"], "wordpiece", 100, lowercase=False)
    assert not np.array_equal(tokenizer.encode("Alpha", 9)[0], tokenizer.encode("alpha", 9)[0])


def test_a_large_alphabet_leaves_room_for_pieces():
    captions = [chr(0x4E00 + number) for number in range(500)] + ["word another longest"] * 1000
    tokenizer = train_tokenizer(captions, "wordpiece", 100, True)
    assert tokenizer.vocab_size <= 100
    assert len(tokenizer.encode("word another", 9)[0]) == 4


def test_mistakes_are_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="tokenizer kind must be wordpiece, bpe, unigram, got 'words'"):
        train_tokenizer(CAPTIONS, "words", 400, True)
    with pytest.raises(ValueError, match="tokenizer file .*none.json does not exist"):
        load_tokenizer(tmp_path / "none.json")
    content = json.loads(train_tokenizer(CAPTIONS, "bpe", 400, True).model.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "[MASK]"]
    del content["model"]["vocab"]["[MASK]"]
    (tmp_path / "lacking.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"it lacks \[MASK\]"):
        load_tokenizer(tmp_path / "lacking.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json cannot be read"):
        load_tokenizer(tmp_path / "broken.json")


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_sentinels_are_the_last_ids_and_no_ordinary_ones(kind):
    tokenizer = train_tokenizer(["some captions of few words"] * 3, kind, 300, True, sentinels=5)
    assert tokenizer.vocab_size <= 300
    assert tokenizer.sentinel_ids.tolist() == list(range(tokenizer.vocab_size - 5, tokenizer.vocab_size))
    assert not set(tokenizer.sentinel_ids) & set(tokenizer.ordinary_ids)
    again = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer.model.to_str()))
    assert again.sentinel_ids.tolist() == tokenizer.sentinel_ids.tolist()
    assert train_tokenizer(["some captions"], kind, 80, True).sentinel_ids.tolist() == []


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_texts_and_words_are_encoded_like_captions(kind):
    tokenizer = train_tokenizer(["some captions of few words, (some)"] * 3, kind, 80, True)
    ids, words = tokenizer.encode("some (few) words", 50)
    ((bare, begins),) = tokenizer.encode_all(["some (few) words"])
    assert bare.tolist() == ids[1:-1].tolist()
    assert begins.tolist() == (np.diff(words[1:-1], prepend=-1) != 0).tolist()
    given, places = tokenizer.encode_words(["some", "(few)", "words"], 50)
    assert given.tolist() == ids.tolist() and sorted(set(places)) == [-1, 0, 1, 2]
    cut, places = tokenizer.encode_words(["some", "(few)", "words"], 4)
    assert cut.tolist() == [tokenizer.cls_id, *ids[1:3], tokenizer.sep_id] and len(places) == 4
