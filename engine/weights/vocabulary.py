"""Rows of word tables by the words they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

ALIASES = {
    "[PAD]": ("<pad>",),
    "[CLS]": ("<s>", "<|startoftext|>"),
    "[SEP]": ("</s>", "<|endoftext|>"),
    "[MASK]": ("<mask>",),
    "[UNK]": ("<unk>",),
}
"""What other tokenizers call our special tokens."""


def read_words(folder: Path) -> dict[str, int] | None:
    """Ids by token of the tokenizer of a folder, where it has one that we can read."""
    whole, plain, lines = (folder / name for name in ("tokenizer.json", "vocab.json", "vocab.txt"))
    if whole.is_file():
        read = json.loads(whole.read_bytes())
        pieces = read["model"]["vocab"]
        words = dict(pieces) if isinstance(pieces, dict) else {piece: number for number, (piece, _) in enumerate(pieces)}
        return words | {token["content"]: token["id"] for token in read.get("added_tokens", ())}
    if plain.is_file():
        return json.loads(plain.read_bytes())
    if lines.is_file():
        return {word: number for number, word in enumerate(lines.read_text(encoding="utf-8").splitlines())}
    return None


def copy_words(name: str, found: Tensor, target: Tensor, theirs: Mapping[str, int], ours: Mapping[str, int]) -> str | None:
    """Fill the rows of words that both know; a note where these are not all, each at its own row."""
    rows = [(number, row) for word, number in ours.items() if (row := row_of(word, theirs)) is not None and row < len(found)]
    if rows:
        own, their = zip(*rows, strict=True)
        target[list(own)] = found[list(their)]
    if len(rows) == len(target) and all(number == row for number, row in rows):
        return None
    return f"{name} {len(rows)} of its {len(target)} rows by their words"


def row_of(word: str, words: Mapping[str, int]) -> int | None:
    """The id of a token under our name for it or another's."""
    return next((words[name] for name in (word, *ALIASES.get(word, ())) if name in words), None)
