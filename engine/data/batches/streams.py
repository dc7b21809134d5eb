"""The streams of batches that training and evaluation read."""

import signal
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from engine.batch import Batch, Sample
from engine.config import Config
from engine.data.batches.collation import collate
from engine.data.batches.readers import (
    MAX_REPLACEMENTS,
    DocumentReader,
    PageReader,
    PatchReader,
    Reader,
    RegionReader,
)
from engine.data.batches.samples import SampleMaker
from engine.data.batches.sets import TrainingSet, TrainingSets
from engine.data.plan.buckets import BucketPlan, check_budget
from engine.data.plan.document_examples import DocumentExamples
from engine.data.plan.mixture import Mixture
from engine.data.plan.negatives import RandomPictures
from engine.data.plan.order import PairPlan, Plan
from engine.data.plan.token_store import TokenStore
from engine.data.records.record import DataError, ExampleIndex, RecordFault, Source
from engine.data.sources.load import kind_of
from engine.data.tokenization.tokenizer import Tokenizer
from engine.objectives import Objective

_PREFETCHED = 4  # micro-batches that every worker prepares ahead
_SPECIAL_TOKENS = 2
_PICTURE_SHARES = ("replaced_images", "dropped_images")


class TaskStream:
    """The endless stream of one task on one set (task None: of all objectives, which share batches)."""

    def __init__(
        self,
        config: Config,
        data: TrainingSet,
        index: ExampleIndex | None,
        task: str | None,
        tokenizer: Tokenizer,
        stream: int,
    ) -> None:
        self.task = task
        objectives = list(config.objectives.active.values()) if task is None else [config.objectives.active[task]]
        maker = SampleMaker(config, tokenizer, train=True, objectives=objectives, stream=stream)
        self.reader: Reader
        self.plan: Plan
        if index is None:
            self.reader = plain_reader(config, data.source, tokenizer, maker, data.name)
            self.plan = PairPlan(len(self.reader), config.seed, stream)
            return
        pictures = random_pictures(objectives, index.images, config.seed, stream, data.name)
        self.reader = RegionReader(data.source, index.records, index.captions, index.images, maker, pictures)
        self.plan = region_plan(config, data.name, index, pictures, stream)

    def samples(self, position: int, size: int, faults: list[str]) -> list[Sample]:
        """Those of `size` units; faults that are met are appended."""
        first = self.plan.examples_before(position)
        drawn = self.plan.examples(position, size)
        return [self._sample(first + offset, *one, faults) for offset, one in enumerate(drawn)]

    def _sample(self, place: int, epoch: int, example: int, faults: list[str]) -> Sample:
        for attempt in range(MAX_REPLACEMENTS):
            try:
                return self.reader.read(epoch, example, faults)
            except RecordFault as fault:
                faults.append(str(fault))
            epoch, example = self.plan.replacement(place, attempt)
        raise DataError(
            f"{MAX_REPLACEMENTS} records drawn for stream position {place} are all broken; "
            f"the last is {faults[-1]}"
        )


class MixedStream:
    """Pairs, and in evenly spread places among them texts: `count` in every `period` samples."""

    def __init__(self, pairs: TaskStream, texts: TaskStream, count: int, period: int) -> None:
        self.pairs, self.texts = pairs, texts
        self.count, self.period = count, period
        self.task, self.plan = pairs.task, pairs.plan

    def samples(self, position: int, size: int, faults: list[str]) -> list[Sample]:
        """As `TaskStream.samples`; which are texts depends on their position alone."""
        before = [place * self.count // self.period for place in range(position, position + size + 1)]
        num_texts = before[-1] - before[0]
        texts = iter(self.texts.samples(before[0], num_texts, faults))
        pairs = iter(self.pairs.samples(position - before[0], size - num_texts, faults))
        return [next(texts if is_text else pairs) for is_text in np.diff(before)]


def plain_reader(config: Config, source: Source, tokenizer: Tokenizer, maker: SampleMaker, name: str) -> Reader:
    """Of documents, pages or pictures that are read as they are."""
    data, kind = config.data, kind_of(source)
    if kind == "documents":
        store = TokenStore(source, tokenizer, Path(data.cache), source.ledger, source.state())
        limit, short = data.max_caption_tokens, data.short_documents
        return DocumentReader(
            DocumentExamples(store, tokenizer, data.documents, limit, short, maker.seed, maker.stream), maker
        )
    if kind == "pictures":
        images = np.arange(len(source))
        return PatchReader(source, maker, random_pictures(maker.objectives, images, maker.seed, maker.stream, name))
    moved = data.resize != "squash" or data.random_crop != "none" or data.flip or data.augment != "none"
    if maker.transform is not None and moved:
        raise DataError(
            "pages keep their places: data.resize must be squash, data.random_crop and data.augment none, data.flip false"
        )
    shares = [max((getattr(one, share) for one in maker.objectives), default=0.0) for share in _PICTURE_SHARES]
    return PageReader(source, maker, *shares)


def random_pictures(
    objectives: Iterable[Objective], images: np.ndarray, seed: int, stream: int, name: str
) -> RandomPictures | None:
    """The pictures that an objective shows texts with; None where these are their own."""
    for objective in objectives:
        if objective.replaced_images > 0:
            return RandomPictures(
                images, objective.replaced_images, seed, stream, name, f"objectives.{objective.name}"
            )
    return None


def region_plan(
    config: Config, name: str, index: ExampleIndex, pictures: RandomPictures | None, stream: int
) -> Plan:
    """Of the examples of a set that is read as regions."""
    buckets, size = config.train.buckets, len(index.records)
    if not size:
        raise DataError(f"{name} has no usable example")
    if buckets is None:
        return PairPlan(size, config.seed, stream)
    words = index.tokens - _SPECIAL_TOKENS  # UNITER's sampler leaves them out

    def lengths(epoch: int) -> np.ndarray:
        return words + index.regions[index.images if pictures is None else pictures.of_epoch(epoch)]

    if pictures is None:
        longest = int(lengths(0).max())
    else:
        longest = int(words.max() + index.regions.max())
    check_budget(buckets, longest, name)
    return BucketPlan(lengths, size, buckets, config.seed, stream)


class MicroBatches(Dataset):
    """The micro-batches of one rank by number, counted from optimizer step `step` on.

    `ahead`: how many units the streams are past those of `step` steps.
    """

    def __init__(
        self,
        config: Config,
        sets: TrainingSets,
        tokenizer: Tokenizer,
        rank: int,
        world: int,
        step: int,
        ahead: int,
    ) -> None:
        self.streams = task_streams(config, sets, tokenizer)
        self.mixture = Mixture([ratio for one in sets.sets for ratio in one.ratios.values()], config.seed)
        self.global_batch = config.train.global_batch
        self.micro_steps = config.micro_steps(world)
        self.size = config.micro_batch(world)
        self.rank, self.world, self.step, self.ahead = rank, world, step, ahead

    def __getitem__(self, number: int) -> Batch | DataError:
        """An error is returned, not raised: a loader process would bury its one line in a traceback."""
        try:
            return self._batch(number)
        except DataError as error:
            return error

    def _batch(self, number: int) -> Batch:
        steps, micro_step = divmod(number, self.micro_steps)
        drawn, turn = self.mixture(self.step + steps)
        stream = self.streams[drawn]
        window = turn * self.global_batch + self.ahead
        position = window + (micro_step * self.world + self.rank) * self.size
        faults: list[str] = []
        samples = stream.samples(position, self.size, faults)
        first = stream.plan.examples_before(position) - stream.plan.examples_before(window)
        return collate(samples, range(first, first + len(samples)), faults, stream.task)


def task_streams(config: Config, sets: TrainingSets, tokenizer: Tokenizer) -> list[TaskStream] | list[MixedStream]:
    """One stream for every task of every set, in their order."""
    streams: list[TaskStream] = []
    for one, index in zip(sets.sets, sets.index(config, tokenizer), strict=True):
        for task in one.ratios:
            streams.append(TaskStream(config, one, index, task, tokenizer, len(streams)))
    if sets.texts is None:
        return streams
    (pairs,) = streams
    texts = TaskStream(config, TrainingSet("data.texts", sets.texts, None), None, None, tokenizer, len(streams))
    return [MixedStream(pairs, texts, config.data.texts.per_step, config.train.global_batch)]


def training_stream(
    config: Config,
    sets: TrainingSets,
    tokenizer: Tokenizer,
    rank: int,
    world: int,
    *,
    step: int,
    samples_seen: int,
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each optimizer step, for ever, after `step` steps of `samples_seen` pairs.

    The order depends on the seed alone: not on workers, ranks or accumulation. Faults go to `sets.ledger`.
    """
    # batches of pairs go on where the pairs end, also after steps of another size
    pairs = config.data.sets is None and config.train.buckets is None
    ahead = samples_seen - step * config.train.global_batch if pairs else 0
    micro_batches = MicroBatches(config, sets, tokenizer, rank, world, step, ahead)
    workers = config.data.workers
    loader = DataLoader(
        micro_batches,
        batch_size=None,
        sampler=count(),
        num_workers=workers,
        prefetch_factor=_PREFETCHED if workers else None,
        worker_init_fn=leave_signals_to_the_run,
        generator=torch.Generator(),  # its own, so that starting workers draws nothing from the global one
    )
    batches = iter(loader)
    while True:
        window = list(islice(batches, micro_batches.micro_steps))
        for batch in window:
            if isinstance(batch, DataError):
                raise batch
            for fault in batch.faults:
                sets.ledger.add(fault)
        yield window


def check_streams(config: Config, sets: TrainingSets, held_out: Source, tokenizer: Tokenizer) -> None:
    """Refuse before anything is trained what training or evaluation could not read."""
    for name, source in (*((one.name, one.source) for one in sets.sets), ("data.held_out", held_out)):
        check_kind(config, name, source)
    task_streams(config, sets, tokenizer)
    for task in config.objectives.active:
        if next(held_out_batches(config, held_out, tokenizer, 1, task), None) is None:
            summary = held_out.ledger.summary()
            raise DataError(f"data.held_out has no usable pair for objectives.{task}: {summary}")


def check_kind(config: Config, name: str, source: Source) -> None:
    """Refuse records that lack what the model embeds: documents have no picture, and pages alone have boxes of words."""
    kind, model = kind_of(source), config.model
    if kind == "documents" and model.reads_pictures is not None:
        raise DataError(f"{name} are documents, and the model reads pictures: give shards, pages or classes")
    if kind != "pages" and any(stream is not None and stream.page is not None for stream in (model.text, model.joint)):
        raise DataError(f"{name} are {kind}, and the model reads where words lie on a page: give pages:FOLDER")


def leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and schedulers signal a whole process group; a run that stops after its step needs its workers till
    then. They end with the loader, or with the process that started them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def held_out_batches(
    config: Config, source: Source, tokenizer: Tokenizer, batch: int, task: str | None = None
) -> Iterator[Batch]:
    """The records of a held-out source in order, first captions, no random crop, masks of a fixed draw.

    They are prepared for one objective, or for none (None). Broken records are left out and
    named in the faults of the batch that they would have been in.
    """
    reader = held_out_reader(config, source, tokenizer, task)
    for first in range(0, len(reader), batch):
        faults: list[str] = []
        samples = []
        for index in range(first, min(first + batch, len(reader))):
            try:
                samples.append(reader.read(0, index, faults))
            except RecordFault as fault:
                faults.append(str(fault))
        for fault in faults:
            source.ledger.add(fault)
        if samples:
            yield collate(samples, range(first, first + len(samples)), faults, task)


def held_out_reader(config: Config, source: Source, tokenizer: Tokenizer, task: str | None) -> Reader:
    objectives = [] if task is None else [config.objectives.active[task]]
    maker = SampleMaker(config, tokenizer, train=False, objectives=objectives)
    if config.data.regions is None:
        return plain_reader(config, source, tokenizer, maker, "data.held_out")
    source.check_tokenizer(tokenizer)
    records = np.arange(len(source))
    images = np.asarray([source.image_of(record) for record in records.tolist()])
    pictures = random_pictures(objectives, images, 0, 0, "data.held_out")
    return RegionReader(source, records, np.zeros_like(records), images, maker, pictures)
