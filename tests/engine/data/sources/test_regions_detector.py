"""The built-in detector of scenes: UNITER's form, a fixed function of the picture, and worth learning from."""

import time
from collections import Counter

import numpy as np
import pytest

from engine.data import DataError, load_source
from engine.data.builtin import picture_sets
from engine.data.builtin.picture_sets import NUM_KINDS, scene_glyphs
from engine.data.records.regions import ARRAYS, select_regions
from engine.data.sources.detector import _projection, detect
from engine.sections import Data, Regions
from tests.engine.data.region_files import tokenizer_of

ALL = Regions(confidence=0.0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def scenes(cache):
    return load_source(
        Data(source="builtin-scenes", held_out="builtin-scenes", cache=cache, regions=Regions()), "held_out"
    )


@pytest.fixture(scope="module")
def pictures(cache):
    return load_source(Data(held_out="builtin-scenes", cache=cache), "held_out")


def kind_of(name):
    return 1 + [glyph.captions[0] for glyph in scene_glyphs()].index(name)


def test_kinds_are_families_of_training_glyphs_whose_last_word_only_the_picture_tells():
    kinds = scene_glyphs()
    assert len(kinds) == len({glyph.captions for glyph in kinds}) == NUM_KINDS
    families = Counter(glyph.captions[0].rpartition(" ")[0] for glyph in kinds)
    assert len(families) == 8 and set(families.values()) == {8}
    assert {glyph.code_points for glyph in kinds} <= {
        glyph.code_points for glyph in picture_sets.split_glyphs("train")
    }


def test_scenes_give_regions_in_uniters_form(scenes):
    for place in range(0, len(scenes), 50):
        record = scenes[place]
        found = record.detections
        count = len(found.boxes)
        assert 10 <= count <= 28 and record.image is None
        assert found.features.shape == (count, 2048) and found.features.min() == 0
        assert 0.3 < found.features.mean() < 0.8
        assert found.boxes.shape == (count, 7) and 0 <= found.boxes.min() <= found.boxes.max() <= 1
        assert found.soft_labels.shape == (count, 1601)
        assert np.allclose(found.soft_labels.sum(1), 1, atol=1e-5)
        assert not found.soft_labels[:, 1 + NUM_KINDS :].any()


def test_the_box_of_every_glyph_is_found_with_its_class(scenes, pictures):
    for place in range(0, len(scenes), 25):
        record, found = pictures[place], scenes[place].detections
        width, height = record.image.size
        for region in record.regions:
            box = np.asarray(region.box) / [width, height, width, height]
            (row,) = np.flatnonzero(np.abs(found.boxes[:, :4] - box).max(1) < 1e-6)
            assert found.soft_labels[row].argmax() == kind_of(region.caption)
            assert found.soft_labels[row].max() > 0.9


def test_parts_are_less_certain_than_whole_glyphs(pictures):
    whole, part = [], []
    for place in range(0, len(pictures), 25):
        record = pictures[place]
        boxes = [region.box for region in record.regions]
        arrays = detect(record.image, boxes, ARRAYS, ALL)
        sides = arrays["norm_bb"][:, 4:] * record.image.size
        for glyph in boxes:
            wide, high = glyph[2] - glyph[0], glyph[3] - glyph[1]
            whole += arrays["conf"][np.abs(sides - [wide, high]).max(1) < 1e-3].tolist()
            part += arrays["conf"][np.abs(sides - [wide / 2, high]).max(1) < 1e-3].tolist()
    assert np.mean(whole) > 0.9 > 0.5 > np.mean(part) > 0.05


def test_features_tell_the_kinds_apart_linearly(scenes, pictures):
    """A region of one scene has its nearest neighbour, by features, among those of the same kind in others."""
    features, kinds = [], []
    for place in range(len(scenes)):
        found = scenes.detections(place)[1]
        sure = found.soft_labels.max(1) > 0.9
        features.append(found.features[sure])
        kinds += found.soft_labels[sure].argmax(1).tolist()
    features, kinds = np.concatenate(features), np.asarray(kinds)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    alike = unit[:300] @ unit.T
    alike[np.arange(300), np.arange(300)] = -1
    assert (kinds[alike.argmax(1)] == kinds[:300]).mean() > 0.95


def test_regions_are_the_same_every_time(cache, scenes):
    again = load_source(Data(held_out="builtin-scenes", cache=cache, regions=Regions()), "held_out")
    for place in (0, 17):
        (identity, first), (same, second) = scenes.detections(place), again.detections(place)
        assert identity == same == scenes.identity(place) and np.array_equal(first.features, second.features)
        assert np.array_equal(first.soft_labels, second.soft_labels)
    assert np.sign(_projection(2048)[0, :8]).tolist() == [1, -1, 1, -1, 1, -1, -1, -1]


def test_the_index_counts_the_regions_that_are_read(scenes):
    index = scenes.index(tokenizer_of(), 64)
    assert len(index.records) == len(scenes) and len(set(index.regions.tolist())) > 5
    for place in range(0, len(scenes), 40):
        assert index.regions[place] == len(scenes.detections(place)[1].boxes)


def test_a_run_may_ask_for_other_limits(cache):
    few = Regions(feature_values=64, classes=70, confidence=0.9, min_count=2, max_count=3)
    source = load_source(Data(held_out="builtin-scenes", cache=cache, regions=few), "held_out")
    counts = {len(source.detections(place)[1].features) for place in range(30)}
    assert counts == {2, 3} and source.detections(0)[1].features.shape[1] == 64
    with pytest.raises(DataError, match="shows 64 kinds of glyph, .* at least 65, got 64"):
        load_source(Data(held_out="builtin-scenes", cache=cache, regions=Regions(classes=64)), "held_out")


def test_a_picture_without_glyphs_has_one_region(pictures):
    blank = pictures[0].image.point(lambda _: 255)
    found = select_regions("k", detect(blank, [], ARRAYS, ALL), ALL)
    assert found.boxes.tolist() == [[0, 0, 1, 1, 1, 1, 1]]


def test_a_region_costs_less_than_a_millisecond(scenes):
    scenes.detections(0)
    started = time.process_time()
    regions = sum(len(scenes.detections(place)[1].boxes) for place in range(50))
    assert (time.process_time() - started) / regions < 1e-3
