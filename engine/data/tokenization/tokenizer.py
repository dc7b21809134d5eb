"""Texts to ids: a tokenizer with the special tokens that models need, loaded from a tokenizer.json."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers

PAD, CLS, SEP, MASK, UNK = SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
CONTINUATION = "##"
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
        self.full_stop_id = model.token_to_id(".")
        # with the word before
        self.goes_on = np.asarray([piece.startswith(CONTINUATION) for piece in pieces])

    @property
    def vocab_size(self) -> int:
        return self.model.get_vocab_size()

    @property
    def ids(self) -> dict[str, int]:
        """Of every token."""
        return self.model.get_vocab()

    def encode(self, caption: str, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, words): at most `max_tokens` ids with [CLS] and [SEP], and the word of each, specials -1."""
        encoding = self.model.encode(caption, add_special_tokens=False)
        ids = np.asarray([self.cls_id, *encoding.ids[: max_tokens - 2], self.sep_id], dtype=np.int64)
        words = np.asarray([-1, *encoding.word_ids[: max_tokens - 2], -1], dtype=np.int64)
        return ids, words

    def fill(self, ids: np.ndarray, words: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """With [PAD], which has id 0 and belongs to no word, up to a length."""
        missing = (0, length - len(ids))
        return np.pad(ids, missing), np.pad(words, missing, constant_values=-1)

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
