"""The examples that documents make: runs of sentences, blocks of tokens, pairs of segments."""

from dataclasses import dataclass

import numpy as np

from engine.corruption.sentence_pairs import SentencePair, next_sentence, sentence_order
from engine.data.plan.order import Purpose, generator
from engine.data.plan.token_store import TokenStore, chunks, until, within
from engine.data.records.record import DataError
from engine.data.tokenization.tokenizer import Tokenizer

_BORDERS, _PAIR_BORDERS = 2, 3  # [CLS] text [SEP], [CLS] first [SEP] second [SEP]


@dataclass(frozen=True)
class TextExample:
    """One example; special tokens are of word -1 and end their segment."""

    ids: np.ndarray
    words: np.ndarray
    types: np.ndarray | None = None
    """Of a pair: 0 for the first segment, 1 for the second."""
    pair: int | None = None
    """Of a pair: 0 as in the document, 1 otherwise."""


class DocumentExamples:
    """The examples of a store by number. What is drawn depends on (seed, stream, epoch, example) alone."""

    def __init__(
        self, store: TokenStore, tokenizer: Tokenizer, kind: str, limit: int, short: float, seed: int, stream: int = 0
    ) -> None:
        self.store, self.tokenizer, self.kind = store, tokenizer, kind
        self.limit, self.short, self.seed, self.stream = limit, short, seed, stream
        self.pairs = kind in ("next_sentence", "sentence_order")
        if kind == "next_sentence" and len(store.first_sentences) < 2:
            raise DataError("data.documents: next_sentence needs at least 2 documents, got 1")
        if kind == "blocks":
            self.runs = np.zeros((0, 2), dtype=np.int64)
            self.count = len(store.ids) // limit
        else:
            self.runs = chunks(store, until(limit - _PAIR_BORDERS) if self.pairs else within(limit - _BORDERS))
            if kind == "sentence_order":
                self.runs = self.runs[np.diff(self.runs)[:, 0] > 1]
            self.count = len(self.runs)
        if not self.count:
            raise DataError(f"data.documents: {kind} of {limit} tokens makes no example of {len(store.ids)} tokens")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: tuple[int, int]) -> TextExample:
        """Of (epoch, example)."""
        epoch, example = place
        if self.kind == "blocks":
            positions = np.arange(example * self.limit, (example + 1) * self.limit)
            ids = self.store.ids[positions].astype(np.int64)
            return TextExample(ids, np.where(ids == self.tokenizer.sep_id, -1, self.store.words(positions)))
        first, last = self.runs[example].tolist()
        sentences = self.store.positions(first, last)
        if not self.pairs:
            return self._enclosed([np.concatenate(sentences)[: self.limit - _BORDERS]])
        random = generator(self.seed, epoch, example, Purpose.SEGMENTS, self.stream)
        pair = self._pair(sentences, self.store.document_of(first), random)
        return self._enclosed([pair.first, pair.second], pair.label)

    def _pair(self, sentences: list[np.ndarray], document: int, random: np.random.Generator) -> SentencePair:
        limit, least = self.limit - _PAIR_BORDERS, 1 if self.kind == "next_sentence" else 2
        if random.random() < self.short:
            limit = int(random.integers(2, limit, endpoint=True))
            sizes = np.cumsum([len(sentence) for sentence in sentences])
            sentences = sentences[: max(least, int((sizes < limit).sum()) + 1)]
        if self.kind == "sentence_order":
            return sentence_order(sentences, limit, random)
        other = int(random.integers(len(self.store.first_sentences) - 1))
        other += other >= document
        begins, ends = int(self.store.first_sentences[other]), self.store.last_sentence(other)
        start = int(random.integers(begins, ends))
        stop = min(ends, start + limit)  # a sentence has a token at least
        return next_sentence(sentences, self.store.positions(start, stop), limit, random)

    def _enclosed(self, segments: list[np.ndarray], label: int | None = None) -> TextExample:
        """[CLS], and every segment, of positions, with [SEP] behind it."""
        ids, words, types = [np.asarray([self.tokenizer.cls_id])], [np.asarray([-1])], [0]
        for number, positions in enumerate(segments):
            ids.append(np.append(self.store.ids[positions].astype(np.int64), self.tokenizer.sep_id))
            words.append(np.append(self.store.words(positions) + (words[-1].max() + 1), -1))
            types += [number] * (len(positions) + 1)
        kinds = np.asarray(types, dtype=np.int64) if label is not None else None
        return TextExample(np.concatenate(ids), np.concatenate(words), kinds, label)
