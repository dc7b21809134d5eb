"""What LayoutLMv2's losses make of a page, and what they cost, by hand."""

from math import log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vlkernels as vk
from torch.nn import functional as F

from engine.batch import Pixels, Places, Sample, Words
from engine.data import collate
from engine.data.batches.samples import SampleMaker
from engine.data.plan.order import generator
from engine.models.transformer import Tokens
from engine.objectives import find
from engine.objectives.covered_lines import AskedWords, CoveredLines
from engine.objectives.masked_language import MaskedLanguage
from engine.objectives.page_matching import PageMatching
from engine.objectives.parts.objective import Draw
from engine.recipes import table

CLS, SEP, MASK = 1, 2, 3
TOKENIZER = SimpleNamespace(cls_id=CLS, sep_id=SEP, mask_id=MASK, ordinary_ids=np.arange(4, 30), vocab_size=30)
LINES = np.asarray([-1, 0, 0, 1, 2, 2, -1])
BOXES = np.asarray(
    [[0, 0, 0, 0], [0, 0, 200, 100], [300, 0, 500, 100], [0, 200, 400, 300], [0, 400, 100, 500], [200, 400, 300, 600], [1000] * 4],
    dtype=np.int32,
)  # fmt: skip
CELL = 100  # thousandths per pixel of a picture of 10 x 10


def page(own_image: bool | None = None) -> Sample:
    """Three lines of two, one and two words; every pixel is 1."""
    ids, words = np.asarray([CLS, 5, 6, 7, 8, 9, SEP]), np.asarray([-1, 0, 1, 2, 3, 4, -1])
    image = Pixels(torch.ones(1, 3, 10, 10), torch.zeros(4, 2, dtype=torch.int32))
    return Sample(Words(ids, words, boxes=BOXES, lines=LINES), image, 0, own_image=own_image)


def draw(seed: int) -> Draw:
    return Draw(TOKENIZER, lambda: generator(seed, 0, 0, 1))


def blanked(*boxes: list[int]) -> torch.Tensor:
    """The picture with these boxes blank."""
    expected = torch.ones(3, 10, 10)
    for left, top, right, bottom in boxes:
        expected[:, top // CELL : bottom // CELL, left // CELL : right // CELL] = 0
    return expected


@pytest.mark.parametrize("seed", range(8))
def test_masked_words_are_blank_and_keep_their_places(seed):
    sample = page()
    MaskedLanguage(probability=0.4, blank_words=True).prepare(sample, draw(seed))
    masked = sample.views["masked_language"].places.offsets.numpy()
    assert len(masked) and not np.isin(masked, [0, 6]).any()
    assert torch.equal(sample.image.values[0], blanked(*BOXES[masked].tolist()))
    assert np.array_equal(sample.text.boxes, BOXES)


def test_pictures_are_left_alone_without_the_option():
    sample = page()
    MaskedLanguage(probability=0.4).prepare(sample, draw(0))
    assert sample.image.values.min() == 1


@pytest.mark.parametrize("seed", range(8))
def test_lines_are_covered_from_their_first_word_to_their_last(seed):
    sample = page(own_image=True)
    CoveredLines(probability=0.5).prepare(sample, draw(seed))
    asked = sample.views["covered_lines"]
    assert asked.places.offsets.tolist() == [1, 2, 3, 4, 5]
    covered = {int(LINES[place]) for place in asked.places.offsets[asked.covered > 0]}
    around = {0: [0, 0, 500, 100], 1: [0, 200, 400, 300], 2: [0, 400, 300, 600]}
    assert torch.equal(sample.image.values[0], blanked(*(around[line] for line in covered)))
    assert asked.covered.tolist() == [float(LINES[place] in covered) for place in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize("own_image", [True, False])
def test_masked_words_are_not_asked_and_no_line_is_seen_beside_another_picture(own_image):
    sample = page(own_image)
    MaskedLanguage(probability=0.4).prepare(sample, draw(1))
    CoveredLines(probability=0.5).prepare(sample, draw(2))
    masked = set(sample.views["masked_language"].places.offsets.tolist())
    asked = sample.views["covered_lines"]
    assert set(asked.places.offsets.tolist()) == {1, 2, 3, 4, 5} - masked
    if not own_image:
        assert asked.covered.all() and sample.image.values.min() == 0  # covered all the same


def test_objectives_that_look_at_others_views_come_last():
    config = table.recipe("layoutlmv2_base", "--tiny=true")
    objectives = list(config.objectives.active.values())
    maker = SampleMaker(config, TOKENIZER, train=True, objectives=objectives)
    assert [one.name for one in maker.objectives] == ["masked_language", "page_matching", "covered_lines"]
    known = find()
    assert all(set(one.beside) <= known.keys() for one in known.values())


def test_the_loss_of_covered_lines():
    """Odds 3 : 1 for a covered word, 1 : 1 for one that is not; the state of [CLS] is not read."""
    objective = CoveredLines()
    sample = page()
    sample.views[objective.name] = AskedWords(Places.of_sample(np.asarray([1, 3])), torch.tensor([1.0, 0.0]))
    batch = collate([sample], [0])
    seen: list = []
    layout = vk.SegmentLayout([[7, 4]])
    states = torch.full((11, 1), 1e3)
    states[1], states[3] = log(3), 0.0
    read = lambda _, view: seen.append(view) or Tokens(states, layout)  # noqa: E731
    model = SimpleNamespace(
        joint=SimpleNamespace(segment=lambda _: 0), joint_states=read, heads={objective.name: lambda x: x}, impl="auto"
    )
    losses, report = objective(model, batch)
    torch.testing.assert_close(losses["covered_lines"], torch.tensor((log(4 / 3) + log(2)) / 2))
    assert report["covered_lines_accuracy"] == 1 and seen == [None]


def test_the_loss_of_page_matching():
    """Label 1 is the page's own picture; the pass is that of the masked words, where there are any."""
    objective, samples = PageMatching(), [page(True), page(False)]
    for number, sample in enumerate(samples):
        MaskedLanguage().prepare(sample, draw(number))
        objective.prepare(sample, draw(number))
    batch = collate(samples, [0, 1])
    assert batch.views[objective.name].tolist() == [1, 0]
    pooled, seen = torch.tensor([[0.0, log(3)], [0.0, log(3)]]), []
    model = SimpleNamespace(
        joint=SimpleNamespace(pooled=lambda read: read),
        joint_states=lambda _, view: seen.append(view) or pooled,
        heads={objective.name: lambda x: x},
    )
    losses, report = objective(model, batch)
    torch.testing.assert_close(losses["page_matching"], F.cross_entropy(pooled, torch.tensor([1, 0])))
    assert report["page_matching_accuracy"] == 0.5 and seen == ["masked_language"]


def test_what_no_page_can_be():
    with pytest.raises(ValueError, match=r"together within \(0, 1\), got \[0.9, 0.1\]"):
        PageMatching(replaced=0.9, dropped=0.1)
    with pytest.raises(ValueError, match="a picture that is always the text's own, page_matching needs pages"):
        PageMatching().prepare(page(), draw(0))
    config = table.recipe("uniter_base")
    for objective in (CoveredLines(), PageMatching(), MaskedLanguage(blank_words=True)):
        with pytest.raises(ValueError, match="model.joint.image.kind must be grid, got regions"):
            objective.check(config)
