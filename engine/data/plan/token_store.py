"""Documents as ids, tokenized once and mapped from disk: runs of their tokens are examples."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.records.index_cache import cached_arrays
from engine.data.records.record import DataError, FaultLedger, RecordFault, Source
from engine.data.tokenization.tokenizer import Tokenizer

_FORMAT = "tokens 1"


class TokenStore:
    """All tokens of some documents in order, with a separator behind each document.

    Positions count these tokens; sentences and documents are ranges of them, the separators in none.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, cache: Path, ledger: FaultLedger, content: list[Any]) -> None:
        """`content` tells the documents, and how many of them, from others."""
        content = [_FORMAT, *content, tokenizer.model.to_str()]
        build = partial(_tokenize, source, tokenizer)
        ids, starts, sentences, documents, faults = cached_arrays(cache, "tokens", content, build)
        for fault in faults.tolist():
            ledger.add(fault)
        if not len(documents):
            raise DataError(f"no document has a token, of {len(source)}: {ledger.summary()}")
        self.ids: np.ndarray = ids
        """int32 [N]."""
        self.starts_word: np.ndarray = starts
        """bool [N]."""
        self.sentences: np.ndarray = sentences
        """int64 [S, 2]: first token of each sentence and the one behind its last."""
        self.first_sentences: np.ndarray = documents
        """int64 [D]: of each document; sentence `s` is of document `document_of(s)`."""

    def document_of(self, sentence: int) -> int:
        return int(np.searchsorted(self.first_sentences, sentence, side="right")) - 1

    def last_sentence(self, document: int) -> int:
        """The first one of the next document."""
        following = document + 1
        return int(self.first_sentences[following]) if following < len(self.first_sentences) else len(self.sentences)

    def positions(self, first: int, last: int) -> list[np.ndarray]:
        """Those of the tokens of sentences first .. last - 1, one array each."""
        return [np.arange(*span) for span in self.sentences[first:last].tolist()]

    def words(self, positions: np.ndarray) -> np.ndarray:
        """int64: a number for the word of each token, of positions that rise within a word; separators -1."""
        numbers = np.cumsum(self.starts_word[positions])
        return numbers.astype(np.int64)


def _tokenize(source: Source, tokenizer: Tokenizer) -> list[np.ndarray]:
    ids, starts, lengths, documents, faults = [], [], [], [], list[str]()
    for found in _documents(source, tokenizer, faults):
        documents.append(len(lengths))
        for number, (one, begins) in enumerate(found):
            last = number == len(found) - 1
            ids.append(np.append(one, tokenizer.sep_id).astype(np.int32) if last else one.astype(np.int32))
            starts.append(np.append(begins, False) if last else begins)
            lengths.append((len(one), len(one) + last))
    used = np.asarray(lengths, dtype=np.int64).reshape(-1, 2)
    firsts = np.cumsum(used[:, 1]) - used[:, 1]
    return [
        np.concatenate([*ids, np.zeros(0, np.int32)]),
        np.concatenate([*starts, np.zeros(0, bool)]),
        np.stack([firsts, firsts + used[:, 0]], axis=1),
        np.asarray(documents, dtype=np.int64),
        np.asarray(faults, dtype=np.str_),
    ]


def _documents(
    source: Source, tokenizer: Tokenizer, faults: list[str]
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """The sentences of every document that can be read, those without a token left out."""
    for record in range(len(source)):
        try:
            encoded = tokenizer.encode_all(source.captions(record))
        except RecordFault as fault:
            faults.append(str(fault))
            continue
        if found := [one for one in encoded if len(one[0])]:
            yield found


def chunks(store: TokenStore, fits: Callable[[int, np.ndarray], int]) -> np.ndarray:
    """int64 [C, 2]: consecutive runs of sentences, first and behind the last, none across documents.

    `fits(start, ends)`: how many sentences a run takes that begins at token `start`, of those that end at `ends`.
    """
    found = []
    for document in range(len(store.first_sentences)):
        first, last = int(store.first_sentences[document]), store.last_sentence(document)
        while first < last:
            start, ends = int(store.sentences[first, 0]), store.sentences[first:last, 1]
            taken = max(1, fits(start, ends))
            found.append((first, first + taken))
            first += taken
    return np.asarray(found, dtype=np.int64)


def within(limit: int) -> Callable[[int, np.ndarray], int]:
    """As many as are not longer than `limit` together."""
    return lambda start, ends: int(np.searchsorted(ends, start + limit, side="right"))


def until(limit: int) -> Callable[[int, np.ndarray], int]:
    """As many as it takes to be `limit` long, or all."""
    return lambda start, ends: min(int(np.searchsorted(ends, start + limit)) + 1, len(ends))
