"""What one objective, or several that share batches, read of a source: samples by number."""

from dataclasses import replace
from typing import Protocol

import numpy as np

from engine.data.negatives import RandomPictures
from engine.data.records import DataError, Detections, Record, RecordFault, Source, Texts
from engine.data.samples import Sample, SampleMaker

MAX_REPLACEMENTS = 32


class Reader(Protocol):
    """Makes the samples of a source; `read` raises RecordFault and appends what it could mend to `faults`."""

    def read(self, epoch: int, example: int, faults: list[str]) -> Sample: ...


class PatchReader:
    """Pictures as patches. Every record is an example, with one of its captions."""

    def __init__(self, source: Source, maker: SampleMaker) -> None:
        self.source, self.maker = source, maker

    def read(self, epoch: int, example: int, faults: list[str]) -> Sample:
        record = self.source[example]
        faults += _notes(record)
        return self.maker(record, epoch, example)


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

    def read(self, epoch: int, example: int, faults: list[str]) -> Sample:
        texts = self.source.texts(int(self.records[example]))
        image, caption = int(self.images[example]), int(self.captions[example])
        record = _record(texts, *self.source.detections(image, self.maker.needs_soft_labels))
        faults += _notes(texts)
        if self.pictures is None:
            return self.maker(record, epoch, example, caption)
        shown = self._shown(record, self.pictures, epoch, example, faults)
        sample = self.maker(shown, epoch, example, caption)
        sample.own_image = shown.identity == record.identity
        return sample

    def _shown(
        self, record: Record, pictures: RandomPictures, epoch: int, example: int, faults: list[str]
    ) -> Record:
        """The record with the picture that is drawn for it, or another where that one is broken."""
        image = int(pictures.of_epoch(epoch)[example])
        if image == self.images[example]:
            return record
        for attempt in range(MAX_REPLACEMENTS):
            try:
                identity, detections = self.source.detections(image, self.maker.needs_soft_labels)
                return replace(record, identity=identity, detections=detections)
            except RecordFault as fault:
                faults.append(str(fault))
                image = pictures.another(epoch, example, attempt)
        raise DataError(
            f"{MAX_REPLACEMENTS} pictures drawn for {record.key} are all broken; the last is {faults[-1]}"
        )


def _record(texts: Texts, identity: int, detections: Detections) -> Record:
    return Record(
        texts.key, None, texts.captions, [], identity, texts.notes, detections, token_ids=texts.token_ids
    )


def _notes(texts: Record | Texts) -> list[str]:
    return [f"{texts.key}: {note}" for note in texts.notes]
