"""Word-piece, byte-pair and unigram tokenizers, trained on captions."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from engine.data.tokenization.tokenizer import CONTINUATION, SPECIAL_TOKENS, UNK, Tokenizer, sentinel


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
    pieces = [CONTINUATION + character for character in alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *pieces],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=CONTINUATION,
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
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION)
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
        ((piece, round(score, 6)) for piece, score in _rare_alike(scored)), key=lambda item: (-item[1], item[0])
    )
    vocabulary = [(token, 0.0) for token in SPECIAL_TOKENS] + pieces
    return build(models.Unigram(vocabulary, unk_id=SPECIAL_TOKENS.index(UNK)))


def _rare_alike(scored: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The same with the lowest score for all characters that are there only because a text has them.

    The trainer leaves them out and puts them back with the lowest score, plus 0.0001 more for each in hash order.
    """
    lowest = min(score for _, score in scored)
    put_back = lowest + 1e-4 * sum(len(piece) == 1 for piece, _ in scored)
    return [(piece, lowest if len(piece) == 1 and score <= put_back else score) for piece, score in scored]


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
