"""Decoding gives what `transformers.generate` gives with the same weights, token for token."""

from dataclasses import replace

import pytest
import torch
import vlkernels as vk

pytest.importorskip("transformers")

from public_models import END, PAD, START, VOCAB, bart_model, bart_rows, encoded, gpt2_model, t5_model  # noqa: E402

from engine.generation import Generated, NewTokens, Nucleus, beam_search, generate  # noqa: E402
from engine.generation.decoding import Decoding  # noqa: E402
from engine.models.transformer import Source, Tokens  # noqa: E402

PROMPTS = [5, 1, 9, 3, 2, 7]
MOST = 12


def words(lengths, seed=0):
    """Packed ids without special ones, and their layout."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (sum(lengths),), generator=generator)
    return ids, vk.SegmentLayout([[n] for n in lengths])


def padded(ids, lengths, left):
    """ids [B, L] and their mask."""
    longest = max(lengths)
    seen = torch.arange(longest) < torch.tensor(lengths)[:, None]
    seen = seen.flip(1) if left else seen
    return torch.full(seen.shape, PAD).masked_scatter(seen, ids), seen.long()


def sequences(generated: Generated):
    return [row[:length].tolist() for row, length in zip(generated.ids, generated.lengths.tolist(), strict=True)]


def their_sequences(found, begin):
    rows = []
    for row in found[:, begin:].tolist():
        rows.append(row[: row.index(END) + 1] if END in row else row)
    return rows


BEAMS = [
    {},
    {"beams": 4},
    {"beams": 3, "length_penalty": 2.0},
    {"beams": 3, "length_penalty": 0.0, "early_stopping": True},
    {"beams": 2, "length_penalty": -1.0},
]


def decode(decoder, prompt, beams=None, source=None, **options):
    run = {"end": END, "pad": PAD, "max_new_tokens": MOST, "source": source, **options}
    return generate(decoder, prompt, **run) if beams is None else beam_search(decoder, prompt, beams=beams, **run)


def their_generate(model, beams=1, **options):
    options = {"length_penalty": 1.0, "early_stopping": False, **options} if beams > 1 else options
    return model.generate(max_new_tokens=MOST, num_beams=beams, do_sample=False, **options)


def assert_varied(found):
    """A run in which all end together would show little."""
    assert len({len(row) for row in found}) > 1


@pytest.mark.parametrize("options", BEAMS)
def test_gpt2_from_ragged_prompts(options):
    theirs, decoder = gpt2_model()
    ids, layout = words(PROMPTS)
    found = sequences(decode(decoder, decoder.prompt(ids, layout), **options))
    prompts, seen = padded(ids, PROMPTS, left=True)
    expected = their_sequences(their_generate(theirs, input_ids=prompts, attention_mask=seen, **options), max(PROMPTS))
    assert found == expected
    assert_varied(found)


@pytest.mark.parametrize("options", BEAMS)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_decoders_that_read_a_source(family, options):
    theirs, decoder, encoder = t5_model() if family == "t5" else bart_model()
    ids, layout = words(PROMPTS)
    if family == "t5":
        rows = theirs.shared(ids)
    else:
        rows = bart_rows(theirs.model.encoder, ids, layout.token_position())
    source = encoded(encoder, decoder, rows, layout)
    first, starts = torch.full((len(PROMPTS),), PAD if family == "t5" else START), vk.SegmentLayout([[1]] * len(PROMPTS))
    found = sequences(decode(decoder, decoder.prompt(first, starts), source=source, **options))
    prompts, seen = padded(ids, PROMPTS, left=False)
    expected = their_sequences(their_generate(theirs, input_ids=prompts, attention_mask=seen, **options), 1)
    assert found == expected
    assert_varied(found)


def ids_only(decoder, lengths=PROMPTS):
    return decoder.prompt(*words(lengths))


def test_samples_do_not_depend_on_each_other():
    """Alone and together; the passes compute no sample that has ended."""
    _, decoder = gpt2_model()
    together, rows = ids_only(decoder), []
    decoder.stack.blocks[0].register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    found = sequences(decode(decoder, together))
    lengths = [len(row) for row in found]
    assert rows == [sum(PROMPTS)] + [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    ids, _ = words(PROMPTS)
    for number, own in enumerate(ids.split(PROMPTS)):
        prompt = decoder.prompt(own, vk.SegmentLayout([[len(own)]]))
        assert sequences(decode(decoder, prompt)) == [found[number]]


@pytest.mark.parametrize("beams", [None, 3])
def test_a_prefix_that_sees_itself(beams):
    """Two segments, the first without a causal line: as reading the whole again for every token."""
    _, decoder = gpt2_model()
    decoder = replace(decoder, mask=vk.SegmentMask.prefix_lm())
    layout = vk.SegmentLayout([[3, 2], [0, 1], [5, 4]])
    hidden = torch.randn(layout.num_tokens, decoder.stack.final_norm.normalized_shape[0])
    found = decode(decoder, Tokens(hidden, layout), beams=beams)
    for sample, (prefix, text) in enumerate(layout.lengths.tolist()):
        start = int(layout.starts[sample, 0])
        own, written = hidden[start : start + prefix + text], sequences(found)[sample]
        scores = whole_pass(decoder, own, prefix, written)
        if beams is None:
            assert scores.argmax(-1).tolist() == written
        else:
            total = scores.log_softmax(-1)[torch.arange(len(written)), written].sum() / len(written)
            torch.testing.assert_close(found.scores[sample], total, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def whole_pass(decoder, hidden, prefix, written):
    """`[L, V]`: logits before every written token, from one pass without a cache."""
    ids, length = torch.tensor(written[:-1], dtype=torch.long), len(hidden) - prefix
    positions = torch.arange(len(hidden), len(hidden) + len(ids))
    rows = torch.cat([hidden, decoder.embed(NewTokens(ids, positions - prefix, positions))])
    layout = vk.SegmentLayout([[prefix, length + len(ids)]])
    states = decoder.stack(Tokens(rows, layout), mask=decoder.mask).hidden
    return decoder.logits(states[len(hidden) - 1 :])


def test_min_new_tokens():
    _, decoder = gpt2_model()
    assert min(generate(decoder, ids_only(decoder), end=END, pad=PAD, max_new_tokens=MOST).lengths) == 1
    assert min(decode(decoder, ids_only(decoder), min_new_tokens=4).lengths) >= 4


def nucleus(seed=0, **options):
    return Nucleus(torch.Generator().manual_seed(seed), **options)


def test_nucleus_draws_by_the_kept_probabilities():
    """Of 0.4, 0.3, 0.2, 0.1 a share of 0.75 keeps three; two tokens of 0.4 and 0.3 do not reach it."""
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    count = 40_000
    drawn = nucleus(share=0.75)(probabilities.log().expand(count, -1), torch.arange(count), count)
    found = drawn.bincount(minlength=4) / count
    expected = torch.tensor([0.0, 0.4, 0.2, 0.3]) / 0.9
    assert found[0] == 0
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * (0.25 / count) ** 0.5)
    cooler = nucleus(temperature=0.5, share=1.0)(probabilities.log().expand(count, -1), torch.arange(count), count)
    squared = probabilities.square() / probabilities.square().sum()
    torch.testing.assert_close(cooler.bincount(minlength=4) / count, squared, rtol=0, atol=4 * (0.25 / count) ** 0.5)


def test_a_nucleus_of_one_token_is_greedy():
    _, decoder = gpt2_model()
    greedy_ids = decode(decoder, ids_only(decoder)).ids
    assert torch.equal(decode(decoder, ids_only(decoder), choose=nucleus(share=1e-6)).ids, greedy_ids)


def test_nucleus_repeats_by_its_seed_whoever_ends_when():
    _, decoder = gpt2_model()
    drawn = [sequences(decode(decoder, ids_only(decoder), choose=nucleus(seed))) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]

    def ended_early(logits, samples, of):
        return torch.where(samples == 2, END, draw(logits, samples, of))

    draw = nucleus(1)
    others = sequences(decode(decoder, ids_only(decoder), choose=ended_early))
    assert others.pop(2) == [END] != drawn[0].pop(2)
    assert others == drawn[0]


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.5}, {"temperature": 0.0}])
def test_mistakes_get_one_clear_line(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        nucleus(**options)


def test_passes_hide_no_sync():
    """On meta tensors every look at a value raises."""
    theirs, decoder, _ = t5_model()
    theirs.to("meta"), decoder.stack.to("meta")
    layout = vk.SegmentLayout([[n] for n in PROMPTS]).to("meta")
    source = Source(decoder.stack.project_source(torch.empty(layout.num_tokens, 32, device="meta")), layout)
    with torch.no_grad():
        decoding = Decoding(decoder, decoder.prompt(torch.zeros(layout.num_tokens, dtype=torch.long, device="meta"), layout),
                            source, MOST, copies=2)  # fmt: skip
        assert decoding.start().shape == (len(PROMPTS), VOCAB)
        slots = torch.zeros(4, dtype=torch.long, device="meta")
        decoding.cache.copy(slots, slots)
        logits = decoding.step(slots, slots)
        assert logits.shape == (4, VOCAB)
        choose = Nucleus(torch.Generator(), share=0.5)
        assert choose(logits, slots, 6).shape == (4,)
