"""Word-piece, byte-pair and unigram tokenizers, trained on captions or loaded from a tokenizer.json."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

PAD, CLS, SEP, MASK, UNK = SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
_CONTINUATION = "##"
_UNUSED = "[unused"  # places that BERT's vocabularies keep free
_SENTINEL = "<extra_id_"  # what T5 puts in place of spans


def sentinel(number: int) -> str:
    return f"{_SENTINEL}{number}>"


class Tokenizer:
    """Captions to ids between [CLS] and [SEP], with the word that every id belongs to."""

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        missing = [token for token in SPECIAL_TOKENS if model.token_to_id(token) is None]
        if missing:
            raise ValueError(
                f"the tokenizer must have the tokens {', '.join(SPECIAL_TOKENS)}; "
                f"it lacks {', '.join(missing)}"
            )
        if model.token_to_id(PAD) != 0:
            raise ValueError(f"{PAD} must have id 0, got {model.token_to_id(PAD)}")
        model.no_padding()
        model.no_truncation()
        self.model = model
        self.cls_id, self.sep_id, self.mask_id = (model.token_to_id(token) for token in (CLS, SEP, MASK))
        pieces = [model.id_to_token(number) or "" for number in range(self.vocab_size)]
        ordinary = [piece not in SPECIAL_TOKENS and not piece.startswith((_UNUSED, _SENTINEL)) for piece in pieces]
        self.ordinary_ids = np.flatnonzero(ordinary)
        named = [model.token_to_id(sentinel(number)) for number in range(self.vocab_size)]
        self.sentinel_ids = np.asarray([one for one in named if one is not None], dtype=np.int64)
        # with the word before
        self.goes_on = np.asarray([piece.startswith(_CONTINUATION) for piece in pieces])

    @property
    def vocab_size(self) -> int:
        return self.model.get_vocab_size()

    def encode(self, caption: str, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, words): at most `max_tokens` ids with [CLS] and [SEP], and the word of each, specials -1."""
        encoding = self.model.encode(caption, add_special_tokens=False)
        ids = np.asarray([self.cls_id, *encoding.ids[: max_tokens - 2], self.sep_id], dtype=np.int64)
        words = np.asarray([-1, *encoding.word_ids[: max_tokens - 2], -1], dtype=np.int64)
        return ids, words

    def encode_all(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, whether each begins a word) of every text, without special tokens and however long."""
        encodings = self.model.encode_batch(texts, add_special_tokens=False)
        words = [np.asarray(encoding.word_ids, dtype=np.int64) for encoding in encodings]
        return [
            (np.asarray(encoding.ids, dtype=np.int64), np.diff(word, prepend=-1) != 0)
            for encoding, word in zip(encodings, words, strict=True)
        ]

    def encode_words(self, words: list[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, words) as `encode`, of a text that comes as words: each id has its place in the list."""
        encoding = self.model.encode(words, is_pretokenized=True, add_special_tokens=False)
        places = np.asarray(encoding.word_ids[: max_tokens - 2], dtype=np.int64)
        ids = np.asarray([self.cls_id, *encoding.ids[: max_tokens - 2], self.sep_id], dtype=np.int64)
        return ids, np.concatenate(([-1], places, [-1]))

    def enclose(self, ids: list[int], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """As `encode`, of a caption that comes as ids without [CLS] and [SEP]."""
        inner = np.asarray(ids[: max_tokens - 2], dtype=np.int64)
        if inner.size and not (0 <= inner.min() and inner.max() < len(self.goes_on)):
            raise ValueError(
                f"token ids must be from 0 to {len(self.goes_on) - 1}, got {inner.min()} to {inner.max()}"
            )
        words = np.maximum(np.cumsum(~self.goes_on[inner]) - 1, 0)  # the first has no word to go on with
        return np.concatenate(([self.cls_id], inner, [self.sep_id])), np.concatenate(([-1], words, [-1]))

    def decode(self, ids: Iterable[int]) -> str:
        return self.model.decode(list(ids))

    def save(self, path: str | Path) -> None:
        self.model.save(str(path))


def load_tokenizer(path: str | Path) -> Tokenizer:
    if not Path(path).is_file():
        raise ValueError(f"tokenizer file {path} does not exist")
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except ValueError:
        raise
    except Exception as error:  # the library raises plain exceptions
        raise ValueError(f"tokenizer file {path} cannot be read ({error})") from None


def train_tokenizer(
    captions: Iterable[str], kind: str, vocab_size: int, lowercase: bool, sentinels: int = 0
) -> Tokenizer:
    """A tokenizer of at most `vocab_size` ids, the last of them sentinels: the same for the same captions in any order.

    The library's trainers walk hash maps with random seeds; each kind below restores a fixed order.
    """
    if kind not in _TRAIN:
        raise ValueError(f"tokenizer kind must be {', '.join(_TRAIN)}, got {kind!r}")
    steps = [normalizers.NFKC(), *([normalizers.Lowercase()] if lowercase else [])]
    with _one_thread():
        model = _TRAIN[kind](list(captions), vocab_size - sentinels, normalizers.Sequence(steps))
    model.add_special_tokens([*SPECIAL_TOKENS, *map(sentinel, range(sentinels))])
    return Tokenizer(model)


def _train_wordpiece(
    captions: list[str], vocab_size: int, normalizer: normalizers.Normalizer
) -> tokenizers.Tokenizer:
    alphabet = _alphabet(captions, normalizer, vocab_size)
    model = _wordpiece(models.WordPiece(unk_token=UNK), normalizer)
    # the trainer gives "##x" pieces ids in hash order unless they are there before, and ids break ties
    pieces = [_CONTINUATION + character for character in alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *pieces],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=_CONTINUATION,
        show_progress=False,
    )
    model.train_from_iterator(captions, trainer)
    return _wordpiece(models.WordPiece(model.get_vocab(), unk_token=UNK), normalizer)


def _alphabet(captions: list[str], normalizer: normalizers.Normalizer, vocab_size: int) -> list[str]:
    """The most frequent characters: each takes up to two ids, half of the ids are left to longer pieces."""
    counts = Counter(character for caption in captions for character in normalizer.normalize_str(caption))
    visible = sorted(
        (character for character in counts if not character.isspace()), key=lambda c: (-counts[c], c)
    )
    return sorted(visible[: max(1, (vocab_size - len(SPECIAL_TOKENS)) // 4)])


def _wordpiece(model: models.WordPiece, normalizer: normalizers.Normalizer) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUATION)
    return tokenizer


def _train_bpe(
    captions: list[str], vocab_size: int, normalizer: normalizers.Normalizer
) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def _train_unigram(
    captions: list[str], vocab_size: int, normalizer: normalizers.Normalizer
) -> tokenizers.Tokenizer:
    def build(model: models.Unigram) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        return tokenizer

    trained = build(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), unk_token=UNK, show_progress=False
    )
    trained.train_from_iterator(captions, trainer)
    scored = json.loads(trained.to_str())["model"]["vocab"][len(SPECIAL_TOKENS) :]
    # sums in hash order differ in their last digits
    pieces = sorted(
        ((piece, round(score, 6)) for piece, score in scored), key=lambda item: (-item[1], item[0])
    )
    vocabulary = [(token, 0.0) for token in SPECIAL_TOKENS] + pieces
    return build(models.Unigram(vocabulary, unk_id=SPECIAL_TOKENS.index(UNK)))


_TRAIN = {"wordpiece": _train_wordpiece, "bpe": _train_bpe, "unigram": _train_unigram}


@contextmanager
def _one_thread() -> Iterator[None]:
    """Without the library's thread pool, which once used complains in every forked loader worker."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
