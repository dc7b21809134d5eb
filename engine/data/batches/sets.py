"""The training sets of a run, with what each of them trains."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from engine.config import Config
from engine.data.records.record import DataError, ExampleIndex, FaultLedger, Source
from engine.data.sources.load import kind_of, load_source, usable_captions
from engine.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from engine.data.tokenization.training import train_tokenizer


@dataclass(frozen=True)
class TrainingSet:
    """Records and the ratio of each objective that they serve (None: all of the run, in every batch)."""

    name: str
    source: Source
    tasks: dict[str, float] | None

    @property
    def ratios(self) -> dict[str | None, float]:
        """The same with a share for each stream that the set feeds."""
        return {None: 1.0} if self.tasks is None else dict(self.tasks)


class TrainingSets:
    """All training records of a run, and one ledger of their faults. `texts` go along with those of the only set."""

    def __init__(self, sets: list[TrainingSet], fault_limit: int, texts: Source | None = None) -> None:
        self.sets, self.texts = sets, texts
        self.ledger = sets[0].source.ledger if len(self._sources) == 1 else FaultLedger(fault_limit)
        self._indices: list[ExampleIndex | None] | None = None
        self._merge_faults()

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    def captions(self) -> Iterator[str]:
        """Every caption of every record that has one; the others are named in the ledger."""
        for source in self._sources:
            yield from usable_captions(source)
        self._merge_faults()

    @property
    def _sources(self) -> list[Source]:
        return [one.source for one in self.sets] + ([] if self.texts is None else [self.texts])

    def index(self, config: Config, tokenizer: Tokenizer) -> list[ExampleIndex | None]:
        """The examples of each set and their lengths, made once; None where pictures are patches."""
        if self._indices is None:
            regions, limit = config.data.regions is not None, config.data.max_caption_tokens
            self._indices = [one.source.index(tokenizer, limit) if regions else None for one in self.sets]
            self._merge_faults()
        return self._indices

    def _merge_faults(self) -> None:
        """Name here what the sources have found by themselves."""
        for source in self._sources:
            for fault in list(source.ledger.faults):
                self.ledger.add(fault)


def load_training_sets(config: Config) -> TrainingSets:
    """The records of data.sets, or those of data.source as one set that trains all objectives."""
    data = config.data
    if data.sets is None:
        sets = [TrainingSet("data", load_source(data, "train", config.seed), None)]
    else:
        sets = [
            TrainingSet(
                name,
                load_source(dataclasses.replace(data, source=one.source, sets=None), "train", config.seed),
                one.tasks,
            )
            for name, one in data.sets.items()
        ]
    texts = None
    if data.texts is not None:
        alone = dataclasses.replace(data, source=data.texts.source, texts=None, permute_captions=False)
        texts = load_source(alone, "train", config.seed)
        if kind_of(texts) != "documents":
            raise DataError(f"data.texts.source must be documents, got {data.texts.source}")
    return TrainingSets(sets, data.fault_limit, texts)


def make_tokenizer(config: Config, sets: TrainingSets) -> Tokenizer:
    """tokenizer.path loaded, or a tokenizer trained on the captions of the training sets."""
    options = config.tokenizer
    if options.path is not None:
        return load_tokenizer(options.path)
    return train_tokenizer(
        sets.captions(), options.kind, options.vocab_size, options.lowercase, options.sentinels
    )
