"""A flat sequence by hand: what is read, what is asked for, and by what it can be told."""

from math import log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vlkernels as vk

from engine.batch import Objects, Patches, Sample, Words
from engine.build import build_model
from engine.data import collate
from engine.objectives.flat_sequence import READ, FlatSequence, bins_of
from engine.recipes import table

NAME = "flat_sequence"
CLS, SEP, FIRST = 1, 2, 30
TOKENIZER = SimpleNamespace(sentinel_ids=np.arange(FIRST, FIRST + 4))
BOXES = [[0.125, 0.5, 0.25, 1.0], [0.75, 0.5, 0.5, 0.999]]


def sample_of(boxes: list[list[float]], words: list[int], patches: float = 0.0) -> Sample:
    count = len(boxes)
    unknown = torch.zeros(count, dtype=torch.int64)
    objects = Objects(vk.SegmentLayout([[count]]), torch.tensor(boxes).view(-1, 4), unknown, unknown)
    grid = torch.from_numpy(np.indices((2, 2), dtype=np.int32).reshape(2, -1).T.copy())
    ids = np.asarray([CLS, *words, SEP])
    values = torch.full((4, 3 * 8**2), patches) * torch.linspace(-1, 1, 192)
    return Sample(Words(ids, np.arange(len(ids))), Patches(values, grid), 0, objects=objects)


def prepared(*arguments, **options) -> Sample:
    sample = sample_of(*arguments)
    FlatSequence(bins=4, objects=2, **options).prepare(sample, SimpleNamespace(tokenizer=TOKENIZER))
    return sample


@pytest.mark.parametrize("value, number", [(0.0, 0), (0.2499, 0), (0.25, 1), (0.999, 3), (1.0, 3)])
def test_bins_have_equal_width_and_the_last_its_upper_end(value, number):
    assert bins_of(np.asarray([value]), 4).tolist() == [number]


def test_numbers_stand_before_the_words():
    sample = prepared(BOXES, [7, 8])
    numbers = [FIRST, FIRST + 2, FIRST + 1, FIRST + 3, FIRST + 3, FIRST + 2, FIRST + 2, FIRST + 3]
    assert sample.views[READ].ids.tolist() == [CLS, *numbers, 7, 8, SEP]
    asked = sample.views[NAME]
    assert asked.targets.tolist() == [*numbers, 7, 8, SEP] and asked.places.offsets.tolist() == list(range(11))
    assert asked.numbers.tolist() == [True] * 8 + [False] * 3
    nothing = prepared([], [7]).views
    assert nothing[READ].ids.tolist() == [CLS, 7, SEP] and not nothing[NAME].numbers.any()


@pytest.mark.parametrize(
    "boxes, bins, reason",
    [
        (BOXES + BOXES[:1], 4, "3 objects, more than objectives.flat_sequence.objects = 2"),
        (BOXES, 5, "the tokenizer has 4 sentinels"),
    ],
)
def test_samples_that_do_not_fit_are_refused(boxes, bins, reason):
    with pytest.raises(ValueError, match=reason):
        FlatSequence(bins=bins, objects=2).prepare(sample_of(boxes, [7]), SimpleNamespace(tokenizer=TOKENIZER))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"model.joint.mask": "full"}, "its mask causal, got full"),
        ({"tokenizer.sentinels": "1000"}, "tokenizer.sentinels must be 1024 at least, got 1000"),
        ({"objectives.flat_sequence.objects": "65"}, "up to 324 tokens, more than model.joint.max_positions = 320"),
        ({"data.flip": "true"}, "objectives.flat_sequence knows where things are in the whole picture: leave out data.flip"),
    ],
)
def test_runs_that_cannot_be_are_refused(change, reason, capsys):
    with pytest.raises(SystemExit):
        table.recipe("gato", *(f"--{path}={value}" for path, value in change.items()))
    assert reason in capsys.readouterr().err


def test_a_token_is_told_by_the_picture_and_what_is_before_it():
    """One batch of two: states behind which tokens are told differ from the first token on that differs, and all where the
    picture does. Words that know nothing cost ln of their number."""
    config = table.recipe("gato", "--tiny=true")
    objective = FlatSequence(bins=4, objects=2)
    config.objectives.flat_sequence = objective
    model = build_model(config, 40).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.2)

    def states(*arguments) -> torch.Tensor:
        with torch.no_grad():
            return objective.states(model, collate([prepared(*arguments)], [0]))

    own = states(BOXES, [7, 8])
    other_word, other_picture = states(BOXES, [7, 9]), states(BOXES, [7, 8], 1.0)
    torch.testing.assert_close(own[:10], other_word[:10])
    assert (own[10] - other_word[10]).abs().max() > 1e-3, "behind the second word"
    assert ((own - other_picture).abs().amax(1) > 1e-3).all()
    model.joint.text.words.data.zero_()
    losses, _ = objective(model, collate([prepared(BOXES, [7, 8]), prepared([], [9])], [0, 1]))
    assert losses[NAME].item() == pytest.approx(log(40), rel=1e-5)
