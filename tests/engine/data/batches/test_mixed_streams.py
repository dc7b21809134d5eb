"""Documents beside pairs in every step: a fixed share of it, in places that depend on nothing but the position."""

import json
from itertools import islice

import numpy as np
import pytest

from engine import sections
from engine.batch import IMAGE, TEXT
from engine.config import Config
from engine.data import DataError, load_training_sets, make_tokenizer, training_stream
from engine.objectives import Objectives
from engine.objectives.denoising import READ, Denoising
from engine.objectives.masked_language import MaskedLanguage

SIZES = {"width": 32, "layers": 1, "heads": 2, "mlp_width": 32}
CELLS = 4
MASKED = Objectives(denoising=Denoising(), masked_language=MaskedLanguage())


@pytest.fixture
def mixed(workshop):
    """Twenty pairs and thirty documents; two thirds of a step are pairs."""
    documents = workshop.folder / "documents.jsonl"
    lines = [json.dumps({"sentences": [f"document number {n} of some", "that is read alone"]}) for n in range(30)]
    documents.write_text("\n".join(lines))
    pairs = workshop.good_shards(records=20)
    texts = sections.Texts(source=str(documents), per_step=4)
    grid = sections.ImageInput(kind="grid", backbone="resnet18", stages=1, max_grid=(2, 2), embedding_norm=False)
    joint = sections.JointStack(**SIZES, image=grid, embedding_norm=False, pooling="mean")
    decoder = sections.DecoderStack(**SIZES, source="joint", shares="words")

    def config(accumulation=1, **options):
        return Config(
            data=sections.Data(
                source=pairs, held_out=pairs, texts=options.get("texts", texts), cache=str(workshop.folder / "cache"),
                sets=options.get("sets"),
            ),
            tokenizer=sections.Tokenizer(vocab_size=400),
            model=sections.Model(image=None, text=None, fusion=None, joint=options.get("joint", joint), decoder=decoder),
            objectives=options.get("objectives", Objectives(denoising=Denoising(noise="prefix"))),
            train=sections.Train(global_batch=options.get("batch", 12), accumulation=accumulation, max_steps=3),
        )  # fmt: skip

    return config


def windows_of(config, steps=3, world=1, first=0):
    sets = load_training_sets(config)
    tokenizer = make_tokenizer(config, sets)
    done = {"step": first, "samples_seen": first * 12}
    streams = [training_stream(config, sets, tokenizer, rank, world, **done) for rank in range(world)]
    return [
        [window[micro] for micro in range(config.train.accumulation) for window in windows]
        for windows in islice(zip(*streams, strict=True), steps)
    ]


def samples_of(batches):
    """(id in the step, has an image, words) of each sample."""
    found = []
    for batch in batches:
        lengths = batch.layout.lengths
        texts = batch.text.ids.split(lengths[:, TEXT].tolist())
        images = (lengths[:, IMAGE] > 0).tolist()
        found += [(n, image, tuple(t.tolist())) for n, image, t in zip(batch.sample_ids.tolist(), images, texts, strict=True)]
    return found


def test_every_step_has_its_share_of_documents(mixed):
    for (batch,) in windows_of(mixed()):
        lengths = batch.layout.lengths
        with_image = lengths[:, IMAGE] > 0
        assert lengths[:, IMAGE].tolist() == [CELLS, CELLS, 0] * 4, "evenly spread"
        assert len(batch.image.values) == 8 and len(batch.image) == 8 * CELLS
        read = batch.views[READ].layout.lengths[:, 0]
        assert (read[~with_image] >= 1).all() and (read < lengths[:, TEXT]).all()


def test_nothing_but_the_position_says_what_a_step_has(mixed):
    whole = [samples_of(batches) for batches in windows_of(mixed())]
    assert [samples_of(batches) for batches in windows_of(mixed(accumulation=2), world=2)] == whole
    assert [samples_of(batches) for batches in windows_of(mixed(), steps=1, first=2)] == whole[2:]


def test_an_epoch_has_every_document_and_every_pair_once(mixed):
    samples = [one for batches in windows_of(mixed(), steps=15) for one in samples_of(batches)]
    for image, count in ((True, 20), (False, 30)):
        texts = [words for _, with_image, words in samples if with_image == image]
        assert len(set(texts[:count])) == count == len(set(texts))


def test_a_picture_may_be_all_that_is_read(mixed):
    """A prefix of no words has the picture before it; a document's has a word at least."""
    reads = [batch.views[READ].layout.lengths[:, 0] for batches in windows_of(mixed(), steps=10) for batch in batches]
    images = [batch.layout.lengths[:, IMAGE] > 0 for batches in windows_of(mixed(), steps=10) for batch in batches]
    shortest = [int(np.concatenate([r[i == image] for r, i in zip(reads, images)]).min()) for image in (True, False)]
    assert shortest == [0, 1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sets": {"one": sections.DataSet("builtin", {"denoising": 1.0})}}, "leave out data.sets and data.regions"),
        ({"joint": sections.JointStack(**SIZES)}, "model.joint must read text and image"),
        ({"batch": 6}, "data.texts.per_step must be at most half of train.global_batch = 6, got 4"),
        ({"objectives": MASKED}, "objectives.masked_language is for samples that all have an image"),
    ],
)
def test_what_cannot_be_mixed(mixed, options, message):
    with pytest.raises(ValueError, match=message):
        mixed(**options)


def test_a_micro_batch_of_one_might_have_no_image(mixed):
    with pytest.raises(ValueError, match="data.texts needs micro-batches of at least 2, got 1"):
        mixed().micro_batch(world=12)


def test_pictures_are_no_documents(mixed, workshop):
    texts = sections.Texts(source=workshop.good_shards(records=20), per_step=4)
    with pytest.raises(DataError, match="data.texts.source must be documents, got .*tar"):
        load_training_sets(mixed(texts=texts))
