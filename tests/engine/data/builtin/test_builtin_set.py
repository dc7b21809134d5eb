"""The built-in glyphs and scenes: a fixed, honest split, exact regions, the same bytes every time."""

from collections import Counter
from functools import partial

import numpy as np
import pytest
from PIL import Image

from engine.data import (
    DataError,
    TrainingSet,
    TrainingSets,
    held_out_batches,
    load_source,
    make_tokenizer,
    train_tokenizer,
)
from engine.data.builtin import glyphs, picture_sets, split
from engine.data.builtin.held_out import HELD_OUT_CODE_POINTS
from engine.data.builtin.picture_sets import NAMES, NUM_KINDS, NUM_SCENES, shards, split_glyphs
from engine.data.records.cache_folder import write_folder
from engine.data.sources.load import usable_captions
from engine.sections import Data


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def training(cache):
    return load_source(Data(cache=str(cache)), "train")


@pytest.fixture(scope="module")
def held_out(cache):
    return load_source(Data(cache=str(cache)), "held_out")


def test_the_gallery_is_large_and_apart(training, held_out):
    assert len(held_out) == len(HELD_OUT_CODE_POINTS) == split.GALLERY >= 700 and len(training) > 4000
    seen = list(usable_captions(training))
    unseen = list(usable_captions(held_out))
    assert len(set(unseen)) == len(unseen) == len(held_out) and set(seen).isdisjoint(unseen)
    identities = [{source[index].identity for index in range(len(source))} for source in (training, held_out)]
    assert len(identities[1]) == len(held_out) and identities[0].isdisjoint(identities[1])


def test_every_word_of_a_held_out_caption_is_in_three_training_captions(training, held_out):
    counts = Counter(word for caption in usable_captions(training) for word in set(split.words(caption)))
    for caption in usable_captions(held_out):
        assert len(set(split.words(caption))) >= 3 and all(
            counts[word] >= 3 for word in split.words(caption)
        ), caption


def test_no_held_out_picture_is_nearly_one_of_training_or_of_the_gallery():
    """As they were chosen, at the threshold; another renderer may move single pictures by a little."""
    unseen = np.stack([split.ink(glyph) for glyph in split_glyphs("held_out")])
    seen = np.stack([split.ink(glyph) for glyph in split_glyphs("train")])
    assert split.ink_differences(unseen, seen).min() > 0.9 * split.NEAR_IDENTICAL
    among = split.ink_differences(unseen, unseen)
    assert (among + np.eye(len(among))).min() > 0.9 * split.NEAR_IDENTICAL


def test_near_identical_pictures_are_told_apart_from_different_ones():
    picture = np.zeros((1, 32, 32), dtype=np.float32)
    picture[0, 8:24, 10:14] = 1
    longer = picture.copy()
    longer[0, 24:28, 10:14] = 1
    shifted = np.roll(picture, (1, -1), axis=(1, 2))
    assert split.ink_differences(picture, np.concatenate([picture, shifted, longer]))[
        0
    ].tolist() == pytest.approx([0, 0, 0.2])


def test_equal_pictures_are_one_record_with_every_name(training):
    captions = [training.captions(index) for index in range(len(training))]
    (names,) = [names for names in captions if "greek capital letter alpha" in names]
    assert names[:3] == ["latin capital letter a", "greek capital letter alpha", "cyrillic capital letter a"]


def alone(source):
    return TrainingSets([TrainingSet("data", source, None)], fault_limit=0)


def test_the_tokenizer_is_trained_on_the_training_captions_only(workshop, training, held_out):
    config = workshop.config("builtin")

    def trained(captions):
        return train_tokenizer(captions, "wordpiece", config.tokenizer.vocab_size, True).model.to_str()

    seen, unseen = (list(usable_captions(source)) for source in (training, held_out))
    assert make_tokenizer(config, alone(training)).model.to_str() == trained(seen) != trained(seen + unseen)


def test_held_out_captions_have_no_unknown_tokens(workshop, training, held_out):
    config = workshop.config("builtin")
    tokenizer = make_tokenizer(config, alone(training))
    (batch,) = held_out_batches(config, held_out, tokenizer, split.GALLERY)
    assert not (batch.text.ids == tokenizer.model.token_to_id("[UNK]")).any()


@pytest.mark.parametrize("name", ["builtin", "builtin-scenes"])
def test_regions_are_exact(cache, name):
    source = load_source(Data(source=name, cache=str(cache)), "train")
    for index in range(0, len(source), 23):
        record = source[index]
        pixels = np.asarray(record.image.convert("L")) < 255
        outside = pixels.copy()
        for region in record.regions:
            left, top, right, bottom = region.box
            inside = pixels[top:bottom, left:right]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            outside[top:bottom, left:right] = False
        assert not outside.any()


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_scenes_say_how_their_glyphs_lie(cache, part):
    source = load_source(Data(source="builtin-scenes", held_out="builtin-scenes", cache=str(cache)), part)
    assert len(source) == NUM_SCENES[part]
    shapes = Counter()
    for index in range(0, len(source), 5):
        record = source[index]
        relation = " left of " if record.image.height == 32 else " above "
        axis = 0 if record.image.height == 32 else 1
        named = [region.caption for region in record.regions]
        assert record.captions == [relation.join(named)]
        starts = [region.box[axis] // 32 for region in record.regions]
        assert starts == list(range(len(named))) and max(record.image.size) == 32 * len(named)
        shapes[record.image.size] += 1
    assert set(shapes) == {(32 * size, 32) for size in (2, 3, 4)} | {(32, 32 * size) for size in (2, 3, 4)}


def test_glyphs_of_scenes_have_a_class_and_a_family(cache):
    source = load_source(Data(source="builtin-scenes", cache=str(cache)), "train")
    regions = [region for index in range(0, len(source), 5) for region in source[index].regions]
    names = {(region.kind, region.caption) for region in regions}
    assert len(names) == NUM_KINDS and {kind for kind, _ in names} == set(range(NUM_KINDS))
    families = {(region.attribute, region.caption.rpartition(" ")[0]) for region in regions}
    assert {number for number, _ in families} == set(range(8)) and len(families) == 8


def test_held_out_scenes_are_new_combinations_of_training_glyphs(cache):
    data = Data(source="builtin-scenes", held_out="builtin-scenes", cache=str(cache))
    seen, unseen = (set(usable_captions(load_source(data, part))) for part in ("train", "held_out"))
    known = {glyph.captions[0] for glyph in split_glyphs("train")}
    assert seen.isdisjoint(unseen) and len(unseen) == NUM_SCENES["held_out"]
    for part in ("train", "held_out"):
        source = load_source(data, part)
        assert {
            region.caption for index in range(0, len(source), 7) for region in source[index].regions
        } <= known


@pytest.mark.parametrize("name", ["builtin", "builtin-scenes"])
def test_shards_are_the_same_bytes_every_time(cache, tmp_path, name):
    first, second = (shards(name, "held_out", folder) for folder in (cache, tmp_path))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second] != []
    assert [path.name for path in tmp_path.iterdir()] == [second[0].parent.name]
    before = second[0].stat().st_mtime_ns
    assert shards(name, "held_out", tmp_path) == second and second[0].stat().st_mtime_ns == before


def test_a_process_that_finishes_second_uses_what_is_there(tmp_path):
    (first,) = shards("builtin", "held_out", tmp_path)
    before = first.read_bytes()
    late = iter([(Image.new("L", (32, 32)), ("late",), [])])
    write_folder(first.parent, partial(picture_sets._write_shards, late))
    assert first.read_bytes() == before and list(tmp_path.iterdir()) == [first.parent]


def test_emoji_need_their_font(cache, tmp_path, monkeypatch):
    with pytest.raises(DataError, match='"builtin-emoji" has no held-out part'):
        shards("builtin-emoji", "held_out", cache)
    monkeypatch.setattr(glyphs, "_EMOJI_FOLDERS", (str(tmp_path),))
    with pytest.raises(DataError, match='"builtin-emoji" needs the font NotoColorEmoji.ttf; none lies under'):
        shards("builtin-emoji", "train", cache)
    assert NAMES == ("builtin", "builtin-scenes", "builtin-emoji")
