"""What one objective, or several that share batches, read of a source: samples by number."""

import dataclasses
from typing import Protocol

import numpy as np
from PIL import Image

from engine.batch import Sample, Words
from engine.corruption.pages import Picture, draw_picture
from engine.data.batches.samples import SampleMaker
from engine.data.plan.document_examples import DocumentExamples
from engine.data.plan.negatives import RandomPictures
from engine.data.plan.order import Purpose
from engine.data.records.record import DataError, Detections, Record, RecordFault, Source, Texts

MAX_REPLACEMENTS = 32


class Reader(Protocol):
    """Makes the samples of a source; `read` raises RecordFault and appends what it could mend to `faults`."""

    def __len__(self) -> int:
        """Number of examples."""

    def read(self, epoch: int, example: int, faults: list[str]) -> Sample: ...


class PatchReader:
    """Pictures as patches. Every record is an example, with one of its captions, shown with what `pictures` draws."""

    def __init__(self, source: Source, maker: SampleMaker, pictures: RandomPictures | None) -> None:
        self.source, self.maker, self.pictures = source, maker, pictures

    def __len__(self) -> int:
        return len(self.source)

    def read(self, epoch: int, example: int, faults: list[str]) -> Sample:
        record = self.source[example]
        faults += _notes(record)
        if self.pictures is None:
            return self.maker(record, epoch, example)
        shown = self._shown(epoch, example, record, faults)
        own = shown.identity == record.identity
        record = dataclasses.replace(record, image=shown.image, identity=shown.identity, regions=shown.regions)
        return self.maker(record, epoch, example, own_image=own)

    def _shown(self, epoch: int, example: int, record: Record, faults: list[str]) -> Record:
        """The record itself, or the one whose picture is drawn, or another where that one is broken."""
        image = int(self.pictures.of_epoch(epoch)[example])
        for attempt in range(MAX_REPLACEMENTS):
            if image == example:
                return record
            try:
                return self.source[image]
            except RecordFault as fault:
                faults.append(str(fault))
                image = self.pictures.another(epoch, example, attempt)
        raise _all_broken(record.key, faults)


class RegionReader:
    """Pictures as regions. Every caption of a record is an example, shown with what `pictures` draws."""

    def __init__(
        self,
        source: Source,
        records: np.ndarray,
        captions: np.ndarray,
        images: np.ndarray,
        maker: SampleMaker,
        pictures: RandomPictures | None,
    ) -> None:
        self.source, self.maker, self.pictures = source, maker, pictures
        self.records, self.captions, self.images = records, captions, images

    def __len__(self) -> int:
        return len(self.records)

    def read(self, epoch: int, example: int, faults: list[str]) -> Sample:
        texts = self.source.texts(int(self.records[example]))
        identity, detections = self._shown(epoch, example, texts.key, faults)
        faults += _notes(texts)
        record = _record(texts, identity, detections)
        own = None
        if self.pictures is not None:
            own = identity == self.source.identity(int(self.images[example]))
        return self.maker(record, epoch, example, int(self.captions[example]), own)

    def _shown(self, epoch: int, example: int, key: str, faults: list[str]) -> tuple[int, Detections]:
        """The caption's own picture, or the one drawn in its place, or another where that one is broken."""
        own = int(self.images[example])
        image = own if self.pictures is None else int(self.pictures.of_epoch(epoch)[example])
        for attempt in range(MAX_REPLACEMENTS):
            try:
                return self.source.detections(image, self.maker.needs_soft_labels)
            except RecordFault as fault:
                if image == own:
                    raise
                faults.append(str(fault))
                image = self.pictures.another(epoch, example, attempt)
        raise _all_broken(key, faults)


class DocumentReader:
    """Text alone."""

    def __init__(self, examples: DocumentExamples, maker: SampleMaker) -> None:
        self.examples, self.maker = examples, maker

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, epoch: int, example: int, faults: list[str]) -> Sample:
        found = self.examples[epoch, example]
        sample = Sample(Words(found.ids, found.words, found.types), None, example, found.pair)
        return self.maker.prepared(sample, f"example {example} of the documents", epoch, example)


class PageReader:
    """Pages: their words with boxes, and their picture, another page's or none."""

    def __init__(self, source: Source, maker: SampleMaker, another: float, none: float) -> None:
        self.source, self.maker = source, maker
        self.another, self.none = another, none
        if another > 0 and len(source) < 2:
            raise DataError("pages that are shown another's picture must be at least 2, got 1")

    def __len__(self) -> int:
        return len(self.source)

    def read(self, epoch: int, example: int, faults: list[str]) -> Sample:
        record = self.source.described(example)
        faults += _notes(record)
        if self.maker.transform is None:
            return self.maker(record, epoch, example)
        random = self.maker.random(epoch, example, Purpose.PICTURE)
        shown = draw_picture(random, self.another, self.none)
        image, identity = self._picture(example, shown, random, faults)
        record = dataclasses.replace(record, image=image, identity=identity)
        drawn = self.another + self.none > 0
        return self.maker(record, epoch, example, own_image=shown == Picture.OWN if drawn else None)

    def _picture(
        self, example: int, shown: Picture, random: np.random.Generator, faults: list[str]
    ) -> tuple[Image.Image, int]:
        own, identity = self.source.picture(example)
        if shown == Picture.NONE:
            return Image.new("RGB", own.size, self.maker.no_picture), identity
        if shown == Picture.OWN:
            return own, identity
        for _ in range(MAX_REPLACEMENTS):
            other = int(random.integers(len(self) - 1))
            try:
                return self.source.picture(other + (other >= example))
            except RecordFault as fault:
                faults.append(str(fault))
        raise DataError(f"{MAX_REPLACEMENTS} pictures drawn for a page are all broken; the last is {faults[-1]}")


def _record(texts: Texts, identity: int, detections: Detections) -> Record:
    return Record(
        texts.key, None, texts.captions, [], identity, texts.notes, detections, token_ids=texts.token_ids
    )


def _all_broken(key: str, faults: list[str]) -> DataError:
    return DataError(f"{MAX_REPLACEMENTS} pictures drawn for {key} are all broken; the last is {faults[-1]}")


def _notes(texts: Record | Texts) -> list[str]:
    return [f"{texts.key}: {note}" for note in texts.notes]
