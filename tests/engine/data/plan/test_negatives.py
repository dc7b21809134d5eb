"""Pictures replaced at random: as often as asked, by all others alike, anew every epoch."""

import numpy as np
import pytest

from engine.data import DataError
from engine.data.plan.negatives import RandomPictures


def pictures_of(images, probability=0.5, seed=0, stream=0):
    return RandomPictures(np.asarray(images), probability, seed, stream, "coco", "objectives.random_matching")


def test_half_are_replaced_by_all_others_alike():
    """Within 4 standard deviations over 400,000 draws; numbers of pictures have gaps."""
    numbers = np.asarray([2, 3, 5, 8, 13])
    images = np.repeat(numbers, 80_000)
    shown = pictures_of(images).of_epoch(0)
    replaced = shown != images
    assert abs(replaced.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(images))
    for own in numbers:
        others = shown[(images == own) & replaced]
        counts = np.asarray([(others == other).sum() for other in numbers if other != own])
        assert counts.sum() == len(others), "no picture from elsewhere"
        assert (np.abs(counts / len(others) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / len(others))).all()


def test_every_epoch_draws_anew_and_repeats():
    images = np.arange(1000)
    keys = [(epoch, stream) for epoch in (0, 1) for stream in (0, 1)]
    drawn = {key: pictures_of(images, stream=key[1]).of_epoch(key[0]) for key in keys}
    assert len({shown.tobytes() for shown in drawn.values()}) == 4
    again = pictures_of(images)
    for epoch in (1, 0, 5, 6, 7, 1):
        shown = again.of_epoch(epoch)
        assert epoch > 1 or np.array_equal(shown, drawn[epoch, 0])
    both = (drawn[0, 0] != images) & (drawn[1, 0] != images)
    assert abs(both.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 1000), "epochs are independent"


def test_stand_ins_are_other_pictures_and_differ_by_attempt():
    pictures = pictures_of(np.arange(10))
    drawn = [[pictures.another(0, example, attempt) for attempt in range(60)] for example in range(10)]
    assert all(set(some) == set(range(10)) - {example} for example, some in enumerate(drawn))
    assert pictures.another(0, 3, 5) == drawn[3][5]


def test_never_and_one_picture():
    assert np.array_equal(pictures_of([4, 4, 7], probability=0.0).of_epoch(0), [4, 4, 7])
    with pytest.raises(DataError, match="draws other pictures: coco must have at least 2, got 1"):
        pictures_of([3, 3, 3])
