"""Streams of batches: the same pairs and choices whatever workers, ranks, accumulation and restarts."""

import multiprocessing
import os
import signal
from itertools import islice

import numpy as np
import pytest
import torch

from engine.batch import TEXT, MaskedWords, Patches, Places, Sample, Words
from engine.data import (
    collate,
    held_out_batches,
    load_source,
    load_training_sets,
    make_tokenizer,
    training_stream,
)
from engine.objectives import Objectives
from engine.objectives.contrastive import Contrastive


@pytest.fixture
def run(workshop):
    """run(steps, position, world, accumulation, workers) -> the pairs of each step, in the global order."""
    pattern = workshop.good_shards(records=50)

    def pairs(steps, position=0, world=1, accumulation=1, workers=0):
        config = workshop.config(
            pattern, batch=24, accumulation=accumulation, workers=workers, random_crop="translate", flip=True
        )
        sets = load_training_sets(config)
        tokenizer = make_tokenizer(config, sets)
        done = {"step": position // 24, "samples_seen": position}
        streams = [training_stream(config, sets, tokenizer, rank, world, **done) for rank in range(world)]
        found = []
        for windows in islice(zip(*streams, strict=True), steps):
            assert all(len(window) == accumulation for window in windows)
            batches = [window[micro_step] for micro_step in range(accumulation) for window in windows]
            found.append([pair for batch in batches for pair in pairs_of(batch)])
        return found

    return pairs


def captions_of(batch):
    return [ids.tolist() for ids in batch.text.ids.split(batch.layout.lengths[:, TEXT].tolist())]


def pairs_of(batch):
    """Everything about each pair of a batch."""
    tokens, patches = batch.layout.lengths.T.tolist()
    places = batch.views["masked_language"].places
    for row, (ids, masked, values) in enumerate(
        zip(
            batch.text.ids.split(tokens),
            batch.views["masked_language"].ids.split(tokens),
            batch.image.values.split(patches),
            strict=True,
        )
    ):
        yield (
            int(batch.sample_ids[row]),
            int(batch.labels[row]),
            values.numpy().tobytes(),
            tuple(ids.tolist()),
            tuple(masked.tolist()),
            tuple(places.offsets[places.samples == row].tolist()),
        )


@pytest.mark.parametrize(
    "world, accumulation, workers", [(1, 1, 2), (2, 1, 0), (3, 2, 0), (1, 4, 0), (2, 3, 1)]
)
def test_workers_ranks_and_accumulation_do_not_change_the_pairs(run, world, accumulation, workers):
    plain = run(5)
    assert run(5, world=world, accumulation=accumulation, workers=workers) == plain
    assert [pair[0] for pair in plain[0]] == list(range(24))


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_resuming_anywhere_continues_the_same_stream(run, step):
    """Steps of 24 over 50 records: epochs end inside of steps."""
    assert run(4, position=24 * step, world=2) == run(step + 4)[step:]


def test_choices_change_from_epoch_to_epoch(run):
    found = [pair for step in run(25) for pair in step]
    first = {pair[1]: pair for pair in found[:50]}
    later = {pair[1]: pair for pair in found[550:600]}
    assert first.keys() == later.keys() and len(first) == 50
    assert sum(first[label][2] != later[label][2] for label in first) > 40
    assert sum(first[label][5] != later[label][5] for label in first) > 25


def test_starting_workers_draws_nothing_from_the_global_generator(run):
    before = torch.get_rng_state()
    run(1, workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_masked_rows_point_into_the_packed_stream(workshop):
    config = workshop.config(workshop.good_shards())
    sets = load_training_sets(config)
    (batch,) = next(training_stream(config, sets, make_tokenizer(config, sets), 0, 1, step=0, samples_seen=0))
    words, layout = batch.views["masked_language"], batch.text.layout
    rows = words.places.rows(layout)
    assert torch.equal(batch.text.ids[rows], words.targets)
    untouched = torch.ones(len(batch.text.ids), dtype=torch.bool)
    untouched[rows] = False
    assert torch.equal(batch.text.ids[untouched], words.ids[untouched])
    assert batch.counts == {"pairs": 8, "masked_language": len(rows)} and len(rows) >= 8
    assert layout.num_tokens == len(batch.text.ids)
    # in the joint stream the captions stand before their images
    joint = torch.full((batch.layout.num_tokens,), -1)
    joint[batch.layout.token_segment() == TEXT] = batch.text.ids
    assert torch.equal(joint[words.places.rows(batch.layout, TEXT)], words.targets)


def test_captions_are_filled_where_the_recipe_says_so(workshop):
    """The fillings are tokens of the batch, and masking leaves them alone."""

    def first(**options):
        config = workshop.config(workshop.good_shards(), **options)
        sets = load_training_sets(config)
        (batch,) = next(training_stream(config, sets, make_tokenizer(config, sets), 0, 1, step=0, samples_seen=0))
        return batch, config.data.max_caption_tokens

    (plain, _), (filled, most) = first(), first(fill_captions=True)
    assert filled.layout.lengths[:, TEXT].tolist() == [most] * 8
    assert captions_of(filled) == [ids + [0] * (most - len(ids)) for ids in captions_of(plain)]
    assert 0 not in filled.views["masked_language"].targets


def test_pictures_of_different_sizes_share_a_batch():
    def sample(patches):
        ids = np.arange(3)
        positions = np.indices((1, patches), dtype=np.int32).reshape(2, -1).T
        pixels = np.ones((patches, 192), np.float32)
        image = Patches(torch.from_numpy(pixels), torch.from_numpy(positions))
        masked = MaskedWords(torch.from_numpy(ids), Places.of_sample(ids[:0]), torch.from_numpy(ids[:0]))
        return Sample(Words(ids, ids), image, identity=1, views={"masked_language": masked})

    batch = collate([sample(4), sample(8)], [5, 9])
    assert batch.image.values.shape == (12, 192)
    assert batch.layout.lengths.tolist() == [[3, 4], [3, 8]]
    assert batch.image_layout.lengths.tolist() == [[4], [8]]
    assert batch.image_layout.sample_ids.tolist() == batch.text.layout.sample_ids.tolist() == [5, 9]
    assert batch.image.positions[-1].tolist() == [0, 7]
    assert batch.counts == {"pairs": 2, "masked_language": 0}
    moved = batch.to("meta")
    tensors = moved.image.values, moved.layout.starts, moved.views["masked_language"].places.offsets, moved.labels
    assert {tensor.device.type for tensor in tensors} == {"meta"} and moved.counts == batch.counts


def test_several_captions_take_turns_in_training_and_the_first_is_evaluated(workshop):
    content = b'{"captions": ["one", "two", "three"]}'
    members = [
        (f"{number}.{part}", data)
        for number in range(4)
        for part, data in (("png", workshop.image(number)), ("json", content))
    ]
    config = workshop.config(str(workshop.shard("s.tar", members)))
    sets = load_training_sets(config)
    source, tokenizer = sets.sets[0].source, make_tokenizer(config, sets)
    stream = training_stream(config, sets, tokenizer, 0, 1, step=0, samples_seen=0)
    counts = np.bincount([ids[1] for _ in range(75) for ids in captions_of(next(stream)[0])])
    assert sorted(counts[counts > 0]) == pytest.approx([200, 200, 200], abs=60)
    evaluated = [
        ids for batch in held_out_batches(config, source, tokenizer, 3) for ids in captions_of(batch)
    ]
    assert [tokenizer.decode(ids[1:2]) for ids in evaluated] == ["one"] * 4


def test_held_out_batches_repeat_in_order_whatever_the_seed_and_batch(workshop):
    config = workshop.config(workshop.good_shards(), random_crop="translate", flip=True)
    source = load_source(config.data, "held_out")
    tokenizer = make_tokenizer(config, load_training_sets(config))

    def evaluated(batch):
        return [
            pair[1:]
            for item in held_out_batches(config, source, tokenizer, batch, "masked_language")
            for pair in pairs_of(item)
        ]

    whole = evaluated(50)
    config.seed = 5
    assert evaluated(7) == whole and [pair[0] for pair in whole] == [
        source[index].identity for index in range(50)
    ]


def test_without_masked_language_nothing_is_masked(workshop):
    config = workshop.config(workshop.good_shards())
    config.objectives = Objectives(contrastive=Contrastive())
    sets = load_training_sets(config)
    (batch,) = next(training_stream(config, sets, make_tokenizer(config, sets), 0, 1, step=0, samples_seen=0))
    assert not batch.views and batch.counts == {"pairs": 8}


def test_permuted_captions_are_a_permutation_that_leaves_the_images(workshop):
    data = workshop.config(workshop.good_shards()).data
    plain = load_source(data, "train")
    data.permute_captions = True
    permuted, held_out = load_source(data, "train"), load_source(data, "held_out")
    own, other = ([source[index].captions[0] for index in range(50)] for source in (plain, permuted))
    assert sorted(own) == sorted(other) and sum(a == b for a, b in zip(own, other, strict=True)) < 6
    assert [plain[i].identity for i in range(50)] == [permuted[i].identity for i in range(50)]
    assert [held_out.captions(i)[0] for i in range(50)] == own
    assert [load_source(data, "train", seed=1).captions(i)[0] for i in range(50)] != other


def test_workers_outlive_the_signals_that_stop_a_run(workshop):
    """A whole process group gets them, and the step in progress is still to be finished."""
    config = workshop.config(workshop.good_shards(records=20), batch=8, workers=1)
    sets = load_training_sets(config)
    stream = training_stream(config, sets, make_tokenizer(config, sets), 0, 1, step=0, samples_seen=0)
    others = set(multiprocessing.active_children())
    next(stream)
    (worker,) = set(multiprocessing.active_children()) - others
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid, number)
        assert len(list(islice(stream, 12))) == 12
    stream.close()
    worker.join(timeout=20)
    assert worker.exitcode == 0
