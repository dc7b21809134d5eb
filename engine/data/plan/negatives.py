"""The pictures of captions in image-text matching: their own, or others drawn before batching."""

import numpy as np

from engine.data.plan.order import OfEpoch, Purpose, generator
from engine.data.records.record import DataError


class RandomPictures:
    """Each example's picture, replaced with a probability by another one of the same set, anew every epoch.

    All other pictures that examples have are equally likely.
    """

    def __init__(
        self, images: np.ndarray, probability: float, seed: int, stream: int, name: str, asked_by: str
    ) -> None:
        self.pictures, own = np.unique(images, return_inverse=True)
        if len(self.pictures) < 2:
            raise DataError(
                f"{asked_by} draws other pictures: {name} must have at least 2, "
                f"got {len(self.pictures)}"
            )
        self.own = own.astype(np.int32)
        self.probability = probability
        self.seed, self.stream = seed, stream
        self.of_epoch = OfEpoch(self._draw)

    def another(self, epoch: int, example: int, attempt: int) -> int:
        """A picture in place of a drawn one that is broken."""
        purpose = Purpose.PICTURE_REPLACEMENT
        draws = generator(self.seed, epoch, example, purpose, self.stream).integers(
            len(self.pictures) - 1, size=attempt + 1
        )
        return int(self._other(draws[-1:], self.own[example])[0])

    def _draw(self, epoch: int) -> np.ndarray:
        """int32 [E]: the picture of every example."""
        random = generator(self.seed, epoch, 0, Purpose.PICTURE, self.stream)
        shown = self.pictures[self.own].astype(np.int32)
        replaced = random.random(len(shown)) < self.probability
        draws = random.integers(len(self.pictures) - 1, size=np.count_nonzero(replaced), dtype=np.int32)
        shown[replaced] = self._other(draws, self.own[replaced])
        return shown

    def _other(self, draws: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Numbers below the number of pictures less one, made to leave out a picture."""
        return self.pictures[draws + (draws >= own)]
