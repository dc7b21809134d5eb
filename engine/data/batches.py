"""Samples put together into batches, and the streams of them that training and evaluation read."""

from collections.abc import Iterable, Iterator
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import vlkernels as vk
from engine.batch import Batch, MaskedWords, Patches, Places
from engine.config import Config
from engine.data.plan import BatchPlan
from engine.data.records import DataError, Record, RecordFault, Source
from engine.data.samples import Sample, SampleMaker
from engine.data.tokenization import Tokenizer

_MAX_REPLACEMENTS = 32
_PREFETCHED = 4  # micro-batches that every worker prepares ahead


def collate(samples: list[Sample], sample_ids: Iterable[int], faults: Iterable[str] = ()) -> Batch:
    """The samples one behind the other."""
    ids = torch.as_tensor(list(sample_ids), dtype=torch.int32)
    lengths = [[len(sample.text_ids), len(sample.patches)] for sample in samples]
    batch = Batch(
        layout=vk.SegmentLayout(lengths, sample_ids=ids),
        text_ids=_joined(sample.text_ids for sample in samples),
        image=Patches(
            _joined(sample.patches for sample in samples), _joined(sample.patch_positions for sample in samples)
        ),
        labels=torch.tensor([sample.identity for sample in samples], dtype=torch.int64),
        sample_ids=ids,
        counts={"pairs": len(samples)},
        faults=list(faults),
    )
    if samples[0].masked_ids is not None:
        batch.masked_words = _masked_words(samples)
        batch.counts["masked_words"] = len(batch.masked_words.places)
    return batch


def _masked_words(samples: list[Sample]) -> MaskedWords:
    return MaskedWords(
        ids=_joined(sample.masked_ids for sample in samples),
        places=_places([sample.masked_positions for sample in samples]),
        targets=_joined(sample.text_ids[sample.masked_positions] for sample in samples),
    )


def _places(offsets: list[np.ndarray]) -> Places:
    samples = np.repeat(np.arange(len(offsets)), [len(some) for some in offsets])
    return Places(torch.from_numpy(samples), _joined(offsets))


def _joined(arrays: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(list(arrays)))


class MicroBatches(Dataset):
    """The micro-batches of one rank by number, counted from the run's start at stream position `position`."""

    def __init__(
        self, config: Config, source: Source, tokenizer: Tokenizer, rank: int, world: int, position: int
    ) -> None:
        self.source = source
        self.maker = SampleMaker(config, tokenizer, train=True)
        self.plan = BatchPlan(len(source), config.seed)
        self.global_batch = config.train.global_batch
        self.accumulation = config.train.accumulation
        self.size = config.micro_batch(world)
        self.rank, self.world, self.position = rank, world, position

    def __getitem__(self, number: int) -> Batch | DataError:
        """An error is returned, not raised: a loader process would bury its one line in a traceback."""
        try:
            return self._batch(number)
        except DataError as error:
            return error

    def _batch(self, number: int) -> Batch:
        step, micro_step = divmod(number, self.accumulation)
        first = (micro_step * self.world + self.rank) * self.size  # within the optimizer step's global batch
        position = self.position + step * self.global_batch + first
        faults: list[str] = []
        samples = [
            self._sample(position + offset, epoch, index, faults)
            for offset, (epoch, index) in enumerate(self.plan.records(position, self.size))
        ]
        return collate(samples, range(first, first + self.size), faults)

    def _sample(self, position: int, epoch: int, index: int, faults: list[str]) -> Sample:
        for attempt in range(_MAX_REPLACEMENTS):
            record = _read(self.source, index, faults)
            if record is not None:
                return self.maker(record, epoch, index)
            epoch, index = self.plan.replacement(position, attempt)
        raise DataError(
            f"{_MAX_REPLACEMENTS} records drawn for stream position {position} are all broken; "
            f"the last is {faults[-1]}"
        )


def _read(source: Source, index: int, faults: list[str]) -> Record | None:
    """The record, or None when it is broken; what was amiss is appended to `faults`."""
    try:
        record = source[index]
    except RecordFault as fault:
        faults.append(str(fault))
        return None
    faults += [f"{record.key}: {note}" for note in record.notes]
    return record


def training_stream(
    config: Config, source: Source, tokenizer: Tokenizer, rank: int, world: int, position: int
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each optimizer step, for ever, from stream position `position` on.

    The order depends on the seed alone: not on workers, ranks or accumulation. Faults go to `source.ledger`.
    """
    micro_batches = MicroBatches(config, source, tokenizer, rank, world, position)
    workers = config.data.workers
    loader = DataLoader(
        micro_batches,
        batch_size=None,
        sampler=count(),
        num_workers=workers,
        prefetch_factor=_PREFETCHED if workers else None,
        generator=torch.Generator(),  # its own, so that starting workers draws nothing from the global one
    )
    batches = iter(loader)
    while True:
        window = list(islice(batches, config.train.accumulation))
        for batch in window:
            if isinstance(batch, DataError):
                raise batch
            for fault in batch.faults:
                source.ledger.add(fault)
        yield window


def held_out_batches(config: Config, source: Source, tokenizer: Tokenizer, batch: int) -> Iterator[Batch]:
    """The records of a held-out source in order, first captions, no random crop, masks of a fixed draw.

    Broken records are left out and named in the faults of the batch that they would have been in.
    """
    maker = SampleMaker(config, tokenizer, train=False)
    for first in range(0, len(source), batch):
        faults: list[str] = []
        indices = range(first, min(first + batch, len(source)))
        records = [(index, _read(source, index, faults)) for index in indices]
        samples = [maker(record, 0, index) for index, record in records if record is not None]
        for fault in faults:
            source.ledger.add(fault)
        if samples:
            yield collate(samples, range(first, first + len(samples)), faults)
