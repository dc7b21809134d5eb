"""Detection by hand, against `transformers`, and what its decoder may read."""

from math import e, log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vlkernels as vk
from PIL import Image
from shared_cache import shared_cache
from torch import nn
from transformers.loss.loss_for_object_detection import ImageLoss

from engine.batch import Batch, Objects, Pixels, Sample, Words
from engine.build import build_model
from engine.data import collate, load_source
from engine.data.batches.readers import PatchReader
from engine.data.batches.samples import objects_of
from engine.data.records.record import Record, RecordFault, Region
from engine.objectives import PretrainingModule
from engine.objectives.causal_language import CausalLanguage
from engine.objectives.detection import ATTRIBUTES, BOXES, OVERLAP, Answers, Detection
from engine.recipes import table
from engine.sections import Data
from engine.training.step import normalizers

__all__ = ["shared_cache"]

NAME = "detection"
LEFT_HALF, RIGHT_HALF = [0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]
FAR = [0.1, 0.1, 0.1, 0.1]


def objects(*boxes: list[float], classes: tuple[int, ...], attributes: tuple[int, ...] | None = None) -> Objects:
    return Objects(
        vk.SegmentLayout([[len(boxes)]]),
        torch.tensor(boxes).view(-1, 4),
        torch.tensor(classes, dtype=torch.int64),
        torch.tensor(attributes or [-1] * len(classes), dtype=torch.int64),
    )


def batch_of(*pictures: Objects) -> Batch:
    return collate([Sample(None, None, number, views={NAME: one}) for number, one in enumerate(pictures)], range(len(pictures)))


@pytest.fixture
def losses(monkeypatch):
    """Losses of a batch where the model says so."""

    def of(how: Detection, batch: Batch, answers: Answers) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(Detection, "answers", lambda *_: answers)
        return how(None, batch)[0]

    return of


def answers_of(classes: list, boxes: list, attributes: list | None = None) -> Answers:
    return Answers(torch.tensor(classes), torch.tensor(boxes), None if attributes is None else torch.tensor(attributes))


def test_by_hand(losses):
    """One picture, whose right half is of class 1 and whose left half of class 0. The first query is sure of class 0 and lies
    on the left half, the second knows no class and covers the middle, the third says that there is nothing."""
    batch = batch_of(objects(RIGHT_HALF, LEFT_HALF, classes=(1, 0), attributes=(1, -1)))
    said = [[[2.0, 0, 0], [0, 0, 0], [0, 0, 1]]]
    answers = answers_of(said, [[LEFT_HALF, [0.5, 0.5, 0.5, 1.0], FAR]], [[[0.0, 5], [1, 0], [0, 0]]])
    how = Detection(queries=3, classes=2, attributes=2, no_object=0.1, distance=5.0, overlap=2.0)
    found = losses(how, batch, answers)
    first, second, third = log((e**2 + 2) / e**2), log(3), log((2 + e) / e)
    assert found[NAME].item() == pytest.approx((first + second + 0.1 * third) / 2.1, rel=1e-5)
    assert found[BOXES].item() == pytest.approx(5 * (0 + 0.25) / 2)
    assert found[OVERLAP].item() == pytest.approx(2 * (0 + 2 / 3) / 2, rel=1e-5)
    assert found[ATTRIBUTES].item() == pytest.approx(log(1 + e) / 2, rel=1e-5), "one of two has an attribute"


def test_a_picture_of_nothing(losses):
    """Alone, every query shall say so; no box is compared."""
    answers = answers_of([[[0.0, 0, 1], [0, 0, 3]]], [[FAR, FAR]])
    answers.classes.requires_grad_()
    found = losses(Detection(queries=2, classes=2), batch_of(objects(classes=())), answers)
    assert found[NAME].item() == pytest.approx((log(1 + 2 / e) + log(1 + 2 / e**3)) / 2, rel=1e-5)
    assert found[BOXES] == found[OVERLAP] == 0
    sum(found.values()).backward()
    assert answers.classes.grad.isfinite().all()


def random_case() -> tuple[list[Objects], Answers, torch.Generator]:
    """Four pictures of three, no, one and two objects, five queries, four classes."""
    draw = torch.Generator().manual_seed(0)
    pictures = []
    for count in (3, 0, 1, 2):
        boxes, classes = torch.rand(count, 4, generator=draw) * 0.5 + 0.1, torch.randint(4, (count,), generator=draw)
        pictures.append(objects(*boxes.tolist(), classes=tuple(classes.tolist())))
    boxes = torch.rand(4, 5, 4, generator=draw) * 0.5 + 0.1
    return pictures, Answers(torch.randn(4, 5, 5, generator=draw), boxes, None), draw


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_ranks_and_micro_batches_share_the_counts(losses, cut):
    """The mean of two parts is the loss of all, whichever objects they have; pictures 1 and 2 alone have few."""
    pictures, answers, _ = random_case()
    how = Detection(queries=5, classes=4)
    whole, parts = losses(how, batch_of(*pictures), answers), []
    for some in (slice(None, cut), slice(cut, None)):
        batch = batch_of(*pictures[some])
        batch.normalizers = normalizers({"pairs": 4, NAME: 6}, 2, torch.device("cpu"))
        parts.append(losses(how, batch, Answers(answers.classes[some], answers.boxes[some], None)))
    for name, value in whole.items():
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, value)


def test_neither_queries_nor_objects_have_an_order(losses):
    pictures, answers, draw = random_case()
    how, order = Detection(queries=5, classes=4), torch.randperm(5, generator=draw)
    expected = losses(how, batch_of(*pictures), answers)
    turned = [objects(*one.boxes.flip(0).tolist(), classes=tuple(one.classes.flip(0).tolist())) for one in pictures]
    found = losses(how, batch_of(*turned), Answers(answers.classes[:, order], answers.boxes[:, order], None))
    torch.testing.assert_close(found, expected)


def test_losses_are_detrs(losses):
    """Of `transformers`, told the same matches; a batch of one process, whose weights it sums as all ranks' are here."""
    pictures, answers, _ = random_case()
    batch, how = batch_of(*pictures), Detection(queries=5, classes=4, no_object=0.1, distance=1.0, overlap=1.0)
    queries = how.match(answers, batch.views[NAME]).split([len(one) for one in pictures])
    matches = [(part - 5 * number, torch.arange(len(part))) for number, part in enumerate(queries)]
    theirs = ImageLoss(nn.Identity(), 4, 0.1, [])
    outputs = {"logits": answers.classes, "pred_boxes": answers.boxes}
    targets = [{"class_labels": one.classes, "boxes": one.boxes} for one in pictures]
    expected = theirs.loss_labels(outputs, targets, matches, 6) | theirs.loss_boxes(outputs, targets, matches, 6)
    found = losses(how, batch, answers)
    for ours, name in ((NAME, "loss_ce"), (BOXES, "loss_bbox"), (OVERLAP, "loss_giou")):
        torch.testing.assert_close(found[ours], expected[name])


def test_blind_figures(monkeypatch):
    """Half the objects are of class 0, and three quarters of the boxes the left half."""
    seen = [objects(LEFT_HALF, LEFT_HALF, classes=(0, 1)), objects(LEFT_HALF, RIGHT_HALF, classes=(0, 2))]
    how = Detection(queries=12, classes=3, no_object=0.2)
    names = (NAME, BOXES, OVERLAP, "accuracy")
    totals = {"": dict.fromkeys(names, 4.0), "_shuffled_image": dict.fromkeys(names, 2.0)}
    found = how._figures(totals, seen, pictures=2)
    # 20 queries of weight 0.2 are matched with nothing: as much as all objects
    prior = 0.5 * log(2) + 0.25 * log(4) + 2 * 0.125 * log(8)
    assert found[NAME] == pytest.approx(
        {"loss": 0.5, "loss_shuffled_image": 0.25, "loss_class_prior": prior, "accuracy": 1.0, "accuracy_shuffled_image": 0.5}
    )
    assert found[BOXES] == pytest.approx({"loss": 1.0, "loss_shuffled_image": 0.5, "loss_median_box": 0.125})
    assert found[OVERLAP]["loss_median_box"] == pytest.approx(0.25)


def test_another_picture_comes_with_its_objects(shared_cache):
    """Where captions are shown with others' pictures."""
    source = load_source(Data(source="builtin-scenes", cache=str(shared_cache), max_records=20), "train")
    shown = SimpleNamespace(of_epoch=lambda _: np.roll(np.arange(20), 1))
    reader = PatchReader(source, lambda record, *_, own_image: (record, own_image), shown)
    found, own = reader.read(0, 7, [])
    assert not own and found.captions == source[7].captions
    assert found.regions == source[6].regions and found.image == source[6].image


def record(*regions: Region) -> Record:
    return Record("k", Image.new("RGB", (200, 100)), ["x"], list(regions), 0)


def test_regions_become_shares_of_the_sides():
    found = objects_of(record(Region((0, 0, 100, 100), "a", 5, 2), Region((150, 25, 200, 75), "b", 0)))
    assert found.boxes.tolist() == [LEFT_HALF, [0.875, 0.5, 0.25, 0.5]]
    assert found.classes.tolist() == [5, 0] and found.attributes.tolist() == [2, -1]
    assert len(objects_of(record())) == 0


@pytest.mark.parametrize(
    "region, reason",
    [
        (Region((0, 0, 201, 50), "a", 0), r"region \[0, 0, 201, 50\] does not lie in its picture of 200 x 100 pixels"),
        (Region((60, 0, 50, 50), "a", 0), "does not lie in"),
        (Region((-1, 0, 50, 50), "a", 0), "does not lie in"),
        (Region((0, 0, 50, 50), "a"), r"region \[0, 0, 50, 50\] has no class"),
    ],
)
def test_regions_that_cannot_be_told_are_refused(region, reason):
    with pytest.raises(RecordFault, match=reason):
        objects_of(record(region))


@pytest.mark.parametrize(
    "found, reason",
    [
        (objects(LEFT_HALF, RIGHT_HALF, FAR, classes=(0, 1, 1)), "3 objects, more than objectives.detection.queries = 2"),
        (objects(LEFT_HALF, classes=(2,)), "number 2 of the classes, objectives.detection.classes is 2"),
        (objects(LEFT_HALF, classes=(1,), attributes=(4,)), "number 4 of the attributes, objectives.detection.attributes is 4"),
    ],
)
def test_samples_that_do_not_fit_are_refused(found, reason):
    with pytest.raises(ValueError, match=reason):
        Detection(queries=2, classes=2, attributes=4).prepare(Sample(None, None, 0, objects=found), None)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"data.random_crop": "resized", "data.flip": "true"}, "leave out data.random_crop, data.flip"),
        ({"data.resize": "shorter"}, "leave out data.resize"),
        (
            {"model.decoder.source": "null", "objectives.causal_language.source_reads": "all"},
            "must be image or joint and reads attention, got None and attention",
        ),
        ({"model.decoder.reads": "prefix", "model.decoder.max_positions": "500"}, "got joint and prefix"),
        (
            {"objectives.causal_language.source_reads": "all"},
            "writes the text, which the source of its decoder, joint, reads too",
        ),
    ],
)
def test_runs_that_cannot_be_are_refused(change, reason, capsys):
    with pytest.raises(SystemExit):
        table.recipe("e2e_vlp", *(f"--{path}={value}" for path, value in change.items()))
    assert reason in capsys.readouterr().err


def test_an_image_tower_reads_no_text_to_begin_with():
    with pytest.raises(ValueError, match="source_reads image needs a joint stream with text"):
        CausalLanguage(source_reads="image").check(table.recipe("blip_base"))


def test_the_decoder_reads_the_picture_alone():
    """Another text in the encoder changes neither what is detected nor what is said of the first word; another picture does."""
    config = table.recipe("e2e_vlp", "--tiny=true", "--data.sets=null", "--objectives.masked_language=null",
                          "--objectives.random_matching=null")  # fmt: skip
    objectives = config.objectives.active
    model = build_model(config, 40).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.2)

    def read(words: list[int], picture: int) -> dict[str, torch.Tensor]:
        random = np.random.default_rng(picture)
        pixels = torch.from_numpy(random.standard_normal((1, 3, 32, 32)).astype(np.float32))
        cells = torch.from_numpy(np.indices((4, 4), dtype=np.int32).reshape(2, -1).T.copy())
        found = objects(LEFT_HALF, classes=(3,))
        sample = Sample(Words(np.asarray([1, *words, 2]), np.arange(len(words) + 2)), Pixels(pixels, cells), 0, objects=found)
        for objective in objectives.values():
            objective.prepare(sample, None)
        batch = collate([sample], [0])
        with torch.no_grad():
            answers, (written, _) = objectives[NAME].answers(model, batch), objectives["causal_language"].written(model, batch)
        total, named, _ = PretrainingModule(model, objectives)(batch)
        assert named.keys() == {"causal_language", NAME, BOXES, OVERLAP, ATTRIBUTES}
        return {"said": answers.classes, "placed": answers.boxes, "first": written.hidden[0]}

    own, other_words, other_picture = read([5, 6, 7], 0), read([9, 8, 7, 11], 0), read([5, 6, 7], 1)
    for name, value in own.items():
        torch.testing.assert_close(value, other_words[name])
        assert (value - other_picture[name]).abs().max() > 1e-3
