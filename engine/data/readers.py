"""What one objective, or several that share batches, read of a source: samples by number."""

from typing import Protocol

import numpy as np

from engine.batch import Sample
from engine.data.negatives import RandomPictures
from engine.data.records import DataError, Detections, Record, RecordFault, Source, Texts
from engine.data.samples import SampleMaker

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
        raise DataError(
            f"{MAX_REPLACEMENTS} pictures drawn for {key} are all broken; the last is {faults[-1]}"
        )


def _record(texts: Texts, identity: int, detections: Detections) -> Record:
    return Record(
        texts.key, None, texts.captions, [], identity, texts.notes, detections, token_ids=texts.token_ids
    )


def _notes(texts: Record | Texts) -> list[str]:
    return [f"{texts.key}: {note}" for note in texts.notes]
