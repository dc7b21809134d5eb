"""Streams of several sets and tasks: the same samples however they are cut, and what tasks make of them."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import sections
from engine.batch import IMAGE, TEXT
from engine.data import (
    DataError,
    TrainingSet,
    TrainingSets,
    check_streams,
    held_out_batches,
    load_training_sets,
    make_tokenizer,
    training_stream,
)
from engine.data.batches.streams import task_streams
from engine.objectives import Objectives
from engine.objectives.contrastive import Contrastive
from engine.objectives.random_matching import RandomMatching
from tests.engine.data.region_set import CLASSES, TASKS, TOKENIZER, WORDS, RegionSet, region_run, sets_of


def windows_of(config, steps, step=0, world=1, sets=None):
    """The window of every rank, step by step."""
    sets = sets or sets_of(config)
    done = {"step": step, "samples_seen": 0}
    streams = [training_stream(config, sets, TOKENIZER, rank, world, **done) for rank in range(world)]
    return list(islice(zip(*streams, strict=True), steps))


def samples_of(windows):
    """Task and samples of every step, in the order of their ids."""
    steps = []
    for window in windows:
        (task,) = {batch.task for batches in window for batch in batches}
        micro_steps = [batch for together in zip(*window, strict=True) for batch in together]
        samples = [sample for batch in micro_steps for sample in samples_of_batch(batch)]
        assert [sample[0] for sample in samples] == list(range(len(samples)))
        steps.append((task, samples))
    return steps


def samples_of_batch(batch):
    """Everything about each sample of a batch."""
    tokens, regions = batch.layout.lengths.T.tolist()
    texts, features = batch.text.ids.split(tokens), batch.image.features.split(regions)
    boxes = batch.image.boxes.split(regions)
    words, own = batch.views.get("masked_language"), batch.views.get("random_matching")
    masked = batch.views.get("masked_region_features", batch.views.get("masked_region_classes"))
    for row, sample_id in enumerate(batch.sample_ids.tolist()):
        found = [sample_id, int(batch.labels[row]), texts[row].tolist()]
        found += [features[row].tolist(), boxes[row].tolist()]
        if words is not None:
            chosen = words.places.samples == row
            found += [words.ids.split(tokens)[row].tolist(), words.places.offsets[chosen].tolist()]
        if masked is not None:
            chosen = masked.places.samples == row
            found += [masked.places.offsets[chosen].tolist()]
            found += [] if masked.soft_labels is None else [masked.soft_labels[chosen].tolist()]
        found += [] if own is None else [int(own[row])]
        yield found


@pytest.mark.parametrize("world, accumulation, workers", [
    (2, 1, 0), (3, 1, 0), (1, 2, 0), (1, 6, 2), (2, 3, 0), (3, 2, 1), (2, 6, 0),
])  # fmt: skip
@pytest.mark.parametrize("buckets", [True, False])
def test_ranks_accumulation_and_workers_do_not_change_the_samples(buckets, world, accumulation, workers):
    plain = samples_of(windows_of(region_run(buckets=buckets), 6))
    config = region_run(buckets=buckets, accumulation=accumulation, workers=workers)
    assert samples_of(windows_of(config, 6, world=world)) == plain
    assert len({task for task, _ in plain}) > 1


@settings(max_examples=8, deadline=None)
@given(step=st.integers(0, 50), world=st.sampled_from([1, 2]), buckets=st.booleans())
def test_restarts_continue_the_same_stream(step, world, buckets):
    """Epochs of the little sets end inside of many of these steps."""
    config = region_run(buckets=buckets, batches=6)
    whole = samples_of(windows_of(config, step + 3))
    assert samples_of(windows_of(config, 3, step=step, world=world)) == whole[step:]


def test_every_step_trains_one_task_on_one_set():
    tasks = {"one": {"masked_language": 3.0, "random_matching": 1.0}, "two": {"masked_language": 2.0}}
    config = region_run(tasks, batches=2)
    sets = TrainingSets([
        TrainingSet("one", RegionSet(), tasks["one"]),
        TrainingSet("two", RegionSet(alike=range(100)), tasks["two"]),
    ], 0)  # fmt: skip
    drawn = Counter()
    for ((batch,),) in windows_of(config, 600, sets=sets):
        drawn[batch.task, len(set(batch.labels.tolist())) == 1] += 1
    assert drawn.keys() == {
        (("masked_language",), False), (("random_matching",), False), (("masked_language",), True)
    }  # fmt: skip
    for (task, alike), count in drawn.items():
        share = 2 / 6 if alike else tasks["one"][task[0]] / 6
        assert abs(count / 600 - share) < 4 * np.sqrt(share * (1 - share) / 600)


@pytest.mark.parametrize("task", list(TASKS))
def test_an_epoch_has_every_example_once(task):
    config = region_run({"one": {task: 1.0}}, batches=4)
    source = RegionSet()
    count = sum(map(len, source.texts_of))
    texts = []
    for ((batch,),) in windows_of(config, 40, sets=sets_of(config, one=source)):
        texts += [tuple(ids.tolist()) for ids in batch.text.ids.split(batch.layout.lengths[:, TEXT].tolist())]
    captions = [caption for captions in source.texts_of for caption in captions]
    expected = Counter(tuple(TOKENIZER.encode(caption, 64)[0].tolist()) for caption in captions)
    assert Counter(texts[:count]) == Counter(texts[count : 2 * count]) == expected
    assert texts[:count] != texts[count : 2 * count]


def test_tasks_of_a_set_draw_independently():
    """The same epoch of the same examples: other orders, and other masks on the same picture."""
    tasks = {"masked_region_features": 1.0, "masked_region_classes": 1.0}
    found = {task: {} for task in tasks}
    order = {task: [] for task in tasks}
    for task, samples in samples_of(windows_of(region_run({"one": tasks}, batches=6), 40)):
        for sample in samples:
            key = str(sample[2:4])
            order[task[0]].append(key)
            found[task[0]].setdefault(key, sample[5])
    first, second = found.values()
    assert order["masked_region_features"][:20] != order["masked_region_classes"][:20]
    both = [key for key in first.keys() & second.keys()]
    assert len(both) > 40 and sum(first[key] != second[key] for key in both) > len(both) / 3


def test_words_are_masked_and_nothing_else():
    config = region_run({"one": {"masked_language": 1.0}})
    (((batch,),),) = windows_of(config, 1)
    assert batch.views.keys() == {"masked_language"}
    assert batch.counts == {"pairs": len(batch.labels), "masked_language": len(batch.views["masked_language"].places)}
    rows = batch.views["masked_language"].places.rows(batch.text.layout)
    assert torch.equal(batch.text.ids[rows], batch.views["masked_language"].targets)


@pytest.mark.parametrize("task", ["masked_region_features", "masked_region_classes"])
def test_some_regions_are_masked_and_soft_labels_are_those_of_the_masked_ones(task):
    config = region_run({"one": {task: 1.0}})
    source = RegionSet()
    (((batch,),),) = windows_of(config, 1, sets=sets_of(config, one=source))
    assert batch.views.keys() == {task}
    masked = batch.views[task]
    assert batch.counts == {"pairs": len(batch.labels), task: len(masked.places)}
    assert set(masked.places.samples.tolist()) == set(range(len(batch.labels))), "one at least"
    assert (masked.places.offsets < batch.layout.lengths[masked.places.samples, IMAGE]).all()
    if task == "masked_region_features":
        assert masked.soft_labels is None
    else:
        assert torch.equal(masked.soft_labels, torch.eye(CLASSES)[masked.places.offsets % CLASSES])


def test_half_of_the_pictures_are_replaced_and_named_so():
    """The label says whose picture it is, also where a drawn one is the same picture as the caption's."""
    source = RegionSet(records=60, alike=range(20))
    config = region_run({"one": {"random_matching": 1.0}})
    captions = {}
    for record, texts in enumerate(source.texts_of):
        for text in texts:
            ids = tuple(TOKENIZER.encode(text, 64)[0].tolist())
            captions.setdefault(ids, set()).add(source.identity(source.image_of(record)))
    own = []
    for _, samples in samples_of(windows_of(config, 30, sets=sets_of(config, one=source))):
        for _, label, ids, features, _, own_image in samples:
            assert label == source.identity(int(features[0][0]))
            if len(captions[tuple(ids)]) == 1:
                assert own_image == (label in captions[tuple(ids)])
            own.append(own_image)
    alike = 20 / 40  # of the pictures: these are their own where another of them is drawn
    share = 0.5 + 0.5 * alike * 19 / 39
    assert abs(np.mean(own) - share) < 4 * np.sqrt(share * (1 - share) / len(own))


@pytest.mark.parametrize("task", list(TASKS))
def test_batches_are_sorted_by_the_lengths_they_have(task):
    """Longest first: the pictures that captions are shown with count, not their own. [CLS] and [SEP] do not."""
    config = region_run({"one": {task: 1.0}})
    (stream,) = task_streams(config, sets_of(config), TOKENIZER)
    for unit in range(30):
        samples = stream.samples(unit, 1, [])
        lengths = [len(sample.text) - 2 + len(sample.image.boxes) for sample in samples]
        assert lengths == sorted(lengths, reverse=True) and lengths[0] * len(lengths) <= 80


def test_broken_pictures_are_replaced_the_same_way_everywhere_and_named():
    def run(world, workers):
        config = region_run(workers=workers)
        sets = sets_of(config, one=RegionSet(broken=[3, 7, 11]), two=RegionSet(seed=1, broken=[5]))
        return samples_of(windows_of(config, 8, world=world, sets=sets)), sorted(sets.ledger.faults)

    plain, faults = run(1, 0)
    assert run(2, 0) == (plain, faults) and run(3, 1) == (plain, faults)
    assert faults == [f"picture {number}: is broken" for number in (11, 3, 5, 7)]
    shown = {int(sample[3][0][0]) for task, samples in plain for sample in samples}
    assert len(shown) > 15


def test_of_a_replaced_picture_nothing_but_its_name_is_read():
    source, read = RegionSet(records=60), []
    config = region_run({"one": {"random_matching": 1.0}})
    (stream,) = task_streams(config, sets_of(config, one=source), TOKENIZER)
    detections = source.detections
    source.detections = lambda image, soft_labels: read.append(image) or detections(image, soft_labels)
    samples = [stream.reader.read(0, example, []) for example in range(60)]
    assert read == [int(sample.image.features[0, 0]) for sample in samples]
    assert 15 < sum(sample.own_image for sample in samples) < 45


def test_a_replaced_picture_that_is_broken_gives_way_to_another():
    """The caption stays, and keeps its own picture where that was drawn."""
    source = RegionSet(records=60, broken=range(20))
    config = region_run({"one": {"random_matching": 1.0}})
    (stream,) = task_streams(config, sets_of(config, one=source), TOKENIZER)
    images, faults, own = source.index(TOKENIZER, 64).images, [], []
    for example in np.flatnonzero(images >= 20):
        found: list[str] = []
        sample = stream.reader.read(0, example, found)
        shown = int(sample.image.features[0, 0])
        assert shown >= 20 and sample.own_image == (shown == images[example])
        assert sample.own_image <= (not found), "what was to be replaced is"
        faults += found
        own.append(sample.own_image)
    assert 10 < len(faults) < 60 and 0.3 < np.mean(own) < 0.7


def test_what_cannot_be_trained_is_told_in_one_line():
    config = region_run({"one": {"masked_region_classes": 1.0}})
    with pytest.raises(DataError, match="32 records .*: no soft labels, which masked_region_classes needs$"):
        windows_of(config, 1, sets=sets_of(config, one=RegionSet(soft_labels=False)))
    config.train.buckets.tokens = 20
    with pytest.raises(DataError, match="must hold train.buckets.multiple = 2 examples of 17 tokens, .* one"):
        windows_of(config, 1)


def test_what_training_or_evaluation_cannot_read_is_told_before_they_begin():
    config = region_run({"one": {task: 1.0 for task in TASKS}})
    sets, good = sets_of(config), RegionSet()
    check_streams(config, sets, good, TOKENIZER)
    for held_out, line in (
        (RegionSet(soft_labels=False), "no soft labels, which masked_region_classes needs"),
        (RegionSet(records=1), "data.held_out must have at least 2, got 1"),
        (RegionSet(broken=range(40)), "data.held_out has no usable pair for objectives.masked_language"),
    ):
        with pytest.raises(DataError, match=line):
            check_streams(config, sets, held_out, TOKENIZER)
    config.train.buckets.tokens = 20
    with pytest.raises(DataError, match="must hold train.buckets.multiple"):
        check_streams(config, sets, good, TOKENIZER)


def test_the_budget_holds_the_longest_text_with_the_largest_picture_where_any_may_meet():
    """The first epoch may not have drawn them together; a later one does."""
    source = RegionSet(records=60)
    source.texts_of[0] = [" ".join(WORDS)]
    index = source.index(TOKENIZER, 64)
    words = index.tokens - 2
    short = min(range(source.num_images), key=lambda image: words[index.images == image].max())
    source.counts = np.where(np.arange(source.num_images) == short, 12, 3)
    together = int((words + source.counts[index.images]).max())
    assert together < words.max() + 12
    for task, needed in (("random_matching", words.max() + 12), ("masked_language", together)):
        config = region_run({"one": {task: 1.0}})
        config.train.buckets.tokens = 2 * int(needed)
        windows_of(config, 1, sets=sets_of(config, one=source))
        config.train.buckets.tokens -= 1
        with pytest.raises(DataError, match=f"2 examples of {needed} tokens, the longest of one"):
            windows_of(config, 1, sets=sets_of(config, one=source))


def test_faults_of_several_sets_count_together():
    config = region_run(tasks={"one": {"masked_language": 1.0}, "two": {"masked_language": 1.0}})
    config.data.fault_limit = 3
    broken = {"one": RegionSet(broken=[1, 2]), "two": RegionSet(seed=1, broken=[3, 4])}
    with pytest.raises(DataError, match="4 broken records, more than data.fault_limit = 3"):
        windows_of(config, 30, sets=sets_of(config, **broken))


def test_sets_of_pictures_train_one_objective_per_step(workshop):
    """Towers read patches: every record is an example, with one of its captions; words are masked for MLM."""
    pattern = workshop.good_shards(records=30)
    config = workshop.config(pattern, batch=10)
    tasks = {"masked_language": 1.0, "contrastive": 1.0}
    config.data.sets = {name: sections.DataSet(pattern, tasks) for name in ("one", "two")}
    config.objectives.contrastive = Contrastive()
    sets = load_training_sets(config)
    assert len(sets) == 60 and [one.name for one in sets.sets] == ["one", "two"]
    stream = training_stream(config, sets, make_tokenizer(config, sets), 0, 1, step=0, samples_seen=0)
    labels = {task: [] for task in tasks}
    for (batch,) in islice(stream, 40):
        (task,) = batch.task
        assert batch.views.keys() == {"masked_language"} & {task} and len(batch.counts) == 1 + len(batch.views)
        labels[task].append(tuple(batch.labels.tolist()))
    assert all(len(found) > 10 and len(set(found)) == len(found) for found in labels.values())


def test_patches_of_other_pictures(workshop):
    """About half of the pictures are another's, named so, anew every epoch; so are those held out, the same each time."""
    pattern = workshop.good_shards(records=30)
    config = workshop.config(pattern, batch=30)
    config.objectives = Objectives(random_matching=RandomMatching(aligned="words"))
    config.data.max_patches = 3
    sets = load_training_sets(config)
    tokenizer = make_tokenizer(config, sets)
    source, shown = sets.sets[0].source, []
    for (batch,) in islice(training_stream(config, sets, tokenizer, 0, 1, step=0, samples_seen=0), 8):
        assert batch.image_layout.lengths.max() == 3, "of larger pictures some are drawn"
        for row in range(30):
            ids = tuple(batch.text.ids.split(batch.text.layout.lengths[:, 0].tolist())[row].tolist())
            shown.append((ids, int(batch.labels[row]), int(batch.views["random_matching"][row])))
        words = batch.views["random_matching words"]
        assert len(words) == len(batch.text.ids) - 2 * 30 and words.offsets.min() == 1
    own = {}
    for record in (source[n] for n in range(30)):
        for caption in record.captions:
            own.setdefault(tuple(tokenizer.encode(caption, 64)[0].tolist()), set()).add(record.identity)
    unique = [(ids, label, mark) for ids, label, mark in shown if len(own.get(ids, ())) == 1]
    assert len(unique) > 100 and all((label in own[ids]) == bool(mark) for ids, label, mark in unique)
    share = np.mean([mark for *_, mark in shown])
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(len(shown))
    first, again = (next(held_out_batches(config, source, tokenizer, 30, "random_matching")) for _ in range(2))
    assert torch.equal(first.views["random_matching"], again.views["random_matching"])
    assert 0 < first.views["random_matching"].sum() < 30 and first.image_layout.lengths.max() > 3


@pytest.mark.parametrize("task", [None, *TASKS])
def test_held_out_batches_are_for_one_task_and_repeat(task):
    config = region_run()
    source = RegionSet(seed=9, broken=[4])

    def read(batch, seed):
        config.seed = seed
        batches = list(held_out_batches(config, source, TOKENIZER, batch, task))
        assert all(one.task == (None if task is None else (task,)) for one in batches)
        return [sample[1:] for one in batches for sample in samples_of_batch(one)], batches

    (whole, (batch,)), (again, _) = read(100, 0), read(7, 5)
    assert whole == again and len(whole) == 38, "two records have the broken picture"
    assert batch.views.keys() == ({task} if task else set())
    assert [sample[1] for sample in whole] == [
        TOKENIZER.encode(captions[0], 64)[0].tolist()
        for record, captions in enumerate(source.texts_of)
        if source.image_of(record) != 4
    ]
