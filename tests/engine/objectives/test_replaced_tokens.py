"""Guesses are drawn from the softmax, in proportion, and the texts are judged as they left them."""

from types import SimpleNamespace

import numpy as np
import torch
import vlkernels as vk

from engine.batch import Sample, Words
from engine.data.plan.order import generator
from engine.objectives.parts.objective import Draw
from engine.objectives.replaced_tokens import DRAW_BITS, ReplacedTokens, between_ends, drawn

MASK = 3
TOKENIZER = SimpleNamespace(mask_id=MASK, ordinary_ids=np.arange(4, 40))


def test_words_are_drawn_in_proportion():
    """1000 even draws of shares 0.1, 0.2, 0, 0.7, in all precisions that hold them."""
    shares = torch.tensor([0.1, 0.2, 0.0, 0.7])
    draws = torch.arange(1000) * (2**DRAW_BITS // 1000)
    found = drawn(shares.log().expand(1000, 4), draws)
    assert (torch.bincount(found, minlength=4) - torch.tensor([100, 200, 0, 700])).abs().max() <= 1
    assert found.diff().min() >= 0


def test_the_last_draw_is_a_word():
    logits = torch.randn(64, 30_000, generator=torch.Generator().manual_seed(0))
    found = drawn(logits, torch.full((64,), 2**DRAW_BITS - 1))
    assert found.max() < 30_000 and found.min() >= 0


def test_most_selected_words_are_hidden_and_no_special_token_is():
    inner = np.arange(4, 2004) % 36 + 4
    words = np.concatenate(([-1], np.arange(2000), [-1]))
    sample = Sample(Words(np.concatenate(([1], inner, [2])), words), None, 0)
    ReplacedTokens().prepare(sample, Draw(TOKENIZER, lambda: generator(0, 0, 0, 1)))
    hidden, kept = sample.views["replaced_tokens"], sample.views["replaced_tokens_all"].ids.numpy()
    places = hidden.places.offsets.numpy()
    assert 250 < len(hidden) < 350 and places.min() > 0 and places.max() < 2001
    assert (kept == sample.text.ids).all() and (hidden.targets.numpy() == kept[places]).all()
    seen = hidden.ids.numpy()
    changed = np.flatnonzero(seen != kept)
    assert (seen[changed] == MASK).all() and set(changed) <= set(places)
    assert 0.78 < len(changed) / len(hidden) < 0.92


def test_what_is_known_blindly_leaves_out_the_ends_of_every_text():
    layout = vk.SegmentLayout([[2], [5], [3]])
    assert between_ends(layout).tolist() == [False, False, False, True, True, True, False, False, True, False]
