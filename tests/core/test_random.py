import pytest
import torch

import vlkernels as vk
from vlkernels.core import random


def words(*values):
    return tuple(torch.tensor(v, dtype=torch.int64) for v in values)


PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))


@pytest.mark.parametrize(
    "rounds, counter, key, expected",
    [  # Random123's known answers for philox4x32
        (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (7, (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (10, *PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_known_answers(monkeypatch, rounds, counter, key, expected):
    monkeypatch.setattr(random, "ROUNDS", rounds)
    assert tuple(int(w) for w in random.philox(words(*counter), words(*key))) == expected


def mask(seed=1, stream=2, sample=3, position=4, head=5, step=0, p=0.5, columns=64):
    rng = vk.Rng(seed)
    rng.advance(step)
    return random.keep_mask(rng.state, stream, sample, position, torch.arange(columns), p, head)


@pytest.mark.parametrize("name", ["seed", "stream", "sample", "position", "head", "step"])
def test_every_coordinate_changes_the_draw(name):
    assert not torch.equal(mask(), mask(**{name: 1000}))


def test_draws_do_not_depend_on_how_many_are_asked_for():
    assert torch.equal(mask(columns=100)[:33], mask(columns=33))


def test_rate_is_the_rounded_one():
    for p in (0.1, 0.5, 0.9):
        kept = mask(p=p, columns=200_000).double().mean().item()
        exact = 1 - random.dropout_threshold(p) / 256
        assert abs(kept - exact) < 5 * (exact * (1 - exact) / 200_000) ** 0.5
        assert random.dropout_scale(p) == pytest.approx(1 / exact, rel=1e-15)


def test_thresholds():
    assert random.dropout_threshold(0.0) == 0 and random.dropout_scale(0.0) == 1.0
    assert random.dropout_threshold(1e-6) == 1 and random.dropout_threshold(0.9999) == 255


def test_uniform_is_uniform_and_apart_from_dropout():
    draws = random.uniform(vk.Rng(3).state, 0, torch.arange(100_000))
    assert 0 <= draws.min() and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.005 and abs(draws.var() - 1 / 12) < 0.002


def test_state_round_trip():
    rng = vk.Rng(9)
    rng.advance(5)
    other = vk.Rng(0)
    other.load_state_dict(rng.state_dict())
    assert torch.equal(rng.state, other.state) and rng.state.tolist() == [9, 5]


@pytest.mark.parametrize("stream", [-1, 65536])
def test_streams_that_would_draw_like_others_are_refused(stream):
    x, layout, options = torch.randn(2, 16), vk.SegmentLayout([[2]]), {"rng": vk.Rng(0), "stream": stream}
    calls = (
        lambda: vk.layer_norm(x, None, None, dropout_p=0.5, **options),
        lambda: vk.embed_layer_norm(None, [], None, dense=x, dropout_p=0.5, **options),
        lambda: vk.attention(*x.view(2, 1, 16).expand(3, 2, 1, 16), layout=layout, dropout_p=0.5, **options),
        lambda: vk.hard_negatives(x, x, 1.0, **options),
    )
    for call in calls:
        with pytest.raises(ValueError, match=rf"stream must be in \[0, 65536\), got {stream}"):
            call()
