"""Runs of text alone, of pages and of pictures of classes: streams that repeat, whatever ranks, workers and restarts."""

import dataclasses
import json
from itertools import islice

import numpy as np
import pytest
import torch

from engine.batch import IMAGE, TEXT, Pixels
from engine.corruption.pages import draw_picture
from engine.data import (
    DataError,
    check_streams,
    held_out_batches,
    load_source,
    load_training_sets,
    make_tokenizer,
    training_stream,
)
from engine.data.batches.readers import PageReader
from engine.data.batches.samples import SampleMaker
from engine.data.plan.order import Purpose


@pytest.fixture
def documents(workshop):
    """Forty documents of six sentences."""
    words = "some words of a text that is long enough to be cut into examples".split()
    random = np.random.default_rng(0)
    lines = [
        json.dumps({"sentences": [" ".join(random.choice(words, size=random.integers(3, 9))) for _ in range(6)]})
        for _ in range(40)
    ]
    path = workshop.folder / "documents.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def pages(workshop):
    """Thirty pages of three words, each picture of one grey of its own."""
    folder = workshop.folder / "pages"
    folder.mkdir()
    (folder / "tags.txt").write_text("odd\neven\n")
    for number in range(30):
        words = {"words": [f"page {number}"[:4], "number", str(number)], "tags": [("even", "odd")[number % 2]]}
        boxes = [[0, 0, 90, 20], [100, 0, 300, 20], [number, 500, 900, 540]]
        (folder / f"{number:02d}.json").write_text(json.dumps({**words, "boxes": boxes}))
        (folder / f"{number:02d}.png").write_bytes(workshop.image(number))
    return f"pages:{folder}"


def text_alone(workshop, source, **options):
    config = workshop.config(source, batch=12, max_caption_tokens=24, **options)
    config.model.image = None
    return config


def stream_of(config, steps, position=0, world=1, batch=12):
    sets = load_training_sets(config)
    tokenizer = make_tokenizer(config, sets)
    done = {"step": position // batch, "samples_seen": position}
    streams = [training_stream(config, sets, tokenizer, rank, world, **done) for rank in range(world)]
    found = []
    for windows in islice(zip(*streams, strict=True), steps):
        batches = [window[micro_step] for micro_step in range(len(windows[0])) for window in windows]
        found += [text for one in batches for text in texts_of(one)]
    return found


def texts_of(batch):
    lengths = batch.layout.lengths[:, TEXT].tolist()
    text = batch.text
    columns = [text.ids, *(column for column in (text.types, text.boxes) if column is not None)]
    parts = [column.split(lengths) for column in columns]
    return [tuple(tuple(part.flatten().tolist()) for part in one) for one in zip(*parts, strict=True)]


@pytest.mark.parametrize("kind", ["sentences", "blocks", "next_sentence", "sentence_order"])
def test_text_alone_is_a_stream_of_its_own(workshop, documents, kind):
    config = text_alone(workshop, documents, documents=kind)
    sets = load_training_sets(config)
    tokenizer = make_tokenizer(config, sets)
    check_streams(config, sets, load_source(config.data, "held_out"), tokenizer)
    (batch,) = next(training_stream(config, sets, tokenizer, 0, 1, step=0, samples_seen=0))
    assert batch.image is None and (batch.layout.lengths[:, IMAGE] == 0).all()
    lengths = batch.layout.lengths[:, TEXT]
    assert len(lengths) == 12 and int(lengths.max()) <= 24 and batch.text.layout.lengths[:, 0].equal(lengths)
    assert len(batch.views["masked_language"].targets) >= 12
    assert (batch.text.types is not None) == (kind in ("next_sentence", "sentence_order"))
    if batch.text.types is not None:
        assert set(batch.text.types.tolist()) == {0, 1}


@pytest.mark.parametrize("kind", ["sentences", "next_sentence"])
def test_the_order_of_text_depends_on_the_seed_alone(workshop, documents, kind):
    config = text_alone(workshop, documents, documents=kind, short_documents=0.2)
    whole = stream_of(config, 6)
    assert stream_of(config, 3, position=36) == whole[36:]
    assert stream_of(config, 6, world=2) == whole
    config.data.workers = 2
    assert stream_of(config, 2) == whole[:24]
    config.data.workers, config.seed = 0, 1
    assert stream_of(config, 6) != whole


def test_an_epoch_has_every_example_once_and_draws_anew(workshop, documents):
    config = text_alone(workshop, documents, documents="sentences")
    count = sum(len(batch.labels) for batch in held_out_batches(config, *held_out(config), 7))
    config.train.global_batch = count
    both = stream_of(config, 2, batch=count)
    assert sorted(both[:count]) == sorted(both[count:]) and both[:count] != both[count:]


def held_out(config):
    sets = load_training_sets(config)
    return load_source(config.data, "held_out"), make_tokenizer(config, sets)


def test_held_out_text_repeats_whatever_seed_and_batch(workshop, documents):
    config = text_alone(workshop, documents, documents="next_sentence")

    def texts(batch):
        return [text for one in held_out_batches(config, *held_out(config), batch) for text in texts_of(one)]

    first = texts(4)
    config.seed = 5
    assert texts(9) == first


def test_broken_documents_are_named_and_the_run_goes_on(workshop, documents):
    with open(documents, "a") as file:
        file.write('\n{"broken": 1}\n')
    config = text_alone(workshop, documents)
    sets = load_training_sets(config)
    tokenizer = make_tokenizer(config, sets)
    next(training_stream(config, sets, tokenizer, 0, 1, step=0, samples_seen=0))
    assert len(sets.ledger.faults) == 1 and "documents.jsonl/40: document must be" in sets.ledger.faults[0]


def test_every_piece_of_a_word_has_its_box_and_specials_the_corners(workshop, pages):
    config = text_alone(workshop, pages)
    source, tokenizer = held_out(config)
    batch = next(held_out_batches(config, source, tokenizer, 30))
    for row, (ids, boxes) in enumerate(texts_of(batch)):
        words = source[row].page
        expected, places = tokenizer.encode_words(words.words, 24)
        assert list(ids) == expected.tolist() and batch.image is None
        corners = np.asarray(boxes).reshape(-1, 4)
        assert corners[0].tolist() == [0] * 4 and corners[-1].tolist() == [1000] * 4
        assert np.array_equal(corners[1:-1], words.boxes[places[1:-1]])
    assert batch.text.boxes.dtype == torch.int32


def maker_of(config, tokenizer):
    return SampleMaker(config, tokenizer, train=True, objectives=[])


def test_pages_are_shown_their_own_picture_another_or_none(workshop, pages):
    config = workshop.config(pages, image_mean=(0.5, 0.4, 0.3))
    source, tokenizer = held_out(config)
    plain = PageReader(source, maker_of(config, tokenizer), 0.0, 0.0)
    own = [plain.read(0, place, []) for place in range(30)]
    reader = PageReader(source, maker_of(config, tokenizer), 0.3, 0.2)
    pictures = {one.image.values.numpy().tobytes(): place for place, one in enumerate(own)}
    seen = []
    for epoch in range(20):
        for place in range(30):
            sample = reader.read(epoch, place, [])
            fate = draw_picture(reader.maker.random(epoch, place, Purpose.PICTURE), 0.3, 0.2).name
            shown = pictures.get(sample.image.values.numpy().tobytes())
            assert sample.own_image == (fate == "OWN") == (shown == place)
            assert (shown is None) == (fate == "NONE")
            assert fate != "NONE" or sample.image.values.abs().max() < 0.01
            assert sample.text.lines.tolist()[1:-1] == [*own[place].text.lines[1:-1]]
            seen.append((fate, shown))
    fates = [fate for fate, _ in seen]
    assert abs(fates.count("ANOTHER") / 600 - 0.3) < 4 * np.sqrt(0.21 / 600)
    assert abs(fates.count("NONE") / 600 - 0.2) < 4 * np.sqrt(0.16 / 600)
    assert len({shown for fate, shown in seen if fate == "ANOTHER"}) == 30
    assert all(one.own_image is None for one in own) and own[3].classes == (0,) and own[4].classes == (1,)


def test_another_page_that_is_broken_is_named_and_replaced(workshop, pages):
    config = workshop.config(pages)
    source, tokenizer = held_out(config)
    for number in range(1, 30, 2):
        (workshop.folder / "pages" / f"{number:02d}.png").write_bytes(b"broken")
    reader, faults = PageReader(source, maker_of(config, tokenizer), 1.0, 0.0), []
    samples = [reader.read(0, place, faults) for place in range(0, 30, 2)]
    assert not any(sample.own_image for sample in samples) and faults and "image cannot be decoded" in faults[0]


def test_pages_keep_their_places(workshop, pages):
    for option in ({"resize": "shorter"}, {"flip": True}, {"random_crop": "resized"}, {"augment": "rand_augment"}):
        config = workshop.config(pages, **option)
        sets = load_training_sets(config)
        with pytest.raises(DataError, match="pages keep their places: data.resize must be squash"):
            next(training_stream(config, sets, make_tokenizer(config, sets), 0, 1, step=0, samples_seen=0))


def test_a_backbone_reads_pixels_and_its_cells_are_the_images_tokens(workshop, pages):
    config = workshop.config(pages, batch=6)
    source, tokenizer = held_out(config)
    maker = maker_of(config, tokenizer)
    patches = PageReader(source, maker, 0.0, 0.0).read(0, 3, []).image
    maker.as_pixels = True
    sample = PageReader(source, maker, 0.0, 0.0).read(0, 3, [])
    assert isinstance(sample.image, Pixels) and sample.image.values.shape == (1, 3, 32, 32)
    assert len(sample.image) == 144 and sample.image.positions[-1].tolist() == [11, 11]
    assert sample.image.values.sum().item() == pytest.approx(patches.values.sum().item(), rel=1e-4)


def test_pictures_of_classes_are_pairs_with_the_classes_name(workshop):
    for name in ("cat", "dog"):
        (workshop.folder / "classes" / name).mkdir(parents=True)
        for number in range(3):
            (workshop.folder / "classes" / name / f"{number}.png").write_bytes(workshop.image(number))
    config = workshop.config(f"classes:{workshop.folder}/classes")
    source, tokenizer = held_out(config)
    sample = maker_of(config, tokenizer)(source[4], 0, 4)
    assert sample.classes == (1,) and tokenizer.decode(sample.text.ids[1:-1]) == "dog" and len(sample.image) == 16


def test_records_that_lack_what_the_model_embeds_are_refused_before_anything_is_trained(workshop, documents, pages):
    pictures = workshop.good_shards()

    def refusal(config, training, held_out):
        sets = load_training_sets(dataclasses.replace(config, data=dataclasses.replace(config.data, source=training)))
        source = load_source(dataclasses.replace(config.data, held_out=held_out), "held_out")
        with pytest.raises(DataError) as refused:
            check_streams(config, sets, source, make_tokenizer(config, sets))
        return str(refused.value)

    reads_pictures = "are documents, and the model reads pictures: give shards, pages or classes"
    assert refusal(workshop.config(pictures), documents, pictures) == f"data {reads_pictures}"
    assert refusal(workshop.config(pictures), pictures, documents) == f"data.held_out {reads_pictures}"
    of_pages = text_alone(workshop, pages)
    of_pages.model.text.page = "sum"
    reads_places = "and the model reads where words lie on a page: give pages:FOLDER"
    assert refusal(of_pages, documents, pages) == f"data are documents, {reads_places}"
    assert refusal(of_pages, pages, pictures) == f"data.held_out are pictures, {reads_places}"
