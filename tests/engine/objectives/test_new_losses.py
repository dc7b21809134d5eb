"""Losses worked out by hand, and what objectives prepare."""

import itertools
from math import log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vlkernels as vk
from random_batch import random_batch, small_model
from torch.nn import functional as F

from engine.batch import Batch, Patches, Sample, Text, Words
from engine.data import collate
from engine.data.plan.order import generator
from engine.models.model import VisionLanguageModel
from engine.models.transformer import Tokens
from engine.objectives import add_heads
from engine.objectives.causal_language import CausalLanguage
from engine.objectives.classification import Classification
from engine.objectives.denoising import BEGUN, READ, Denoising
from engine.objectives.document_classes import DocumentClasses
from engine.objectives.late_interaction import LateInteraction, mapped, similarities
from engine.objectives.next_sentence import NextSentence
from engine.objectives.parts.objective import Draw
from engine.objectives.sentence_order import SentenceOrder
from engine.objectives.sigmoid_contrastive import SigmoidContrastive
from engine.objectives.span_boundary import SpanBoundary
from engine.objectives.triplet import Triplet
from engine.sections import DecoderStack, ImageStack, JointStack, Model, TextStack, Tokenizer

CLS, SEP, MASK, FIRST_SENTINEL = 1, 2, 3, 30
TOKENIZER = SimpleNamespace(
    cls_id=CLS, sep_id=SEP, mask_id=MASK, ordinary_ids=np.arange(4, 30), sentinel_ids=np.arange(30, 40), vocab_size=40,
    full_stop_id=29,
)  # fmt: skip
SIZES = {"width": 16, "layers": 2, "heads": 2, "mlp_width": 24}


def text(*inner: int) -> Words:
    """[CLS] words [SEP], every token a word of its own."""
    words = np.arange(len(inner))
    return Words(np.asarray([CLS, *inner, SEP]), np.concatenate(([-1], words, [-1])))


def draw(seed: int = 0) -> Draw:
    return Draw(TOKENIZER, lambda: generator(seed, 0, 0, 1))


def prepared(objective, *samples: Sample) -> Batch:
    for number, sample in enumerate(samples):
        objective.prepare(sample, draw(number))
    return collate(list(samples), range(len(samples)))


def pooling_model(pooled: torch.Tensor, head, seen: list) -> SimpleNamespace:
    """A text role whose pooled states are these; `seen` notes the views it reads."""
    role = SimpleNamespace(pooled=lambda read: read)
    read = lambda _, view=None: seen.append(view) or pooled  # noqa: E731
    return SimpleNamespace(joint=None, text=role, image=None, text_states=read, heads=head)


@pytest.mark.parametrize("objective", [NextSentence(), SentenceOrder()])
def test_pairs_of_segments(objective):
    """Odds 3 : 1 for the second label: right for one of three."""
    batch = prepared(objective, *(Sample(text(5, 6), None, n, pair=pair) for n, pair in enumerate((0, 1, 0))))
    seen: list = []
    logits = torch.tensor([[0.0, log(3)]]).expand(3, 2)
    model = pooling_model(logits, {objective.name: lambda pooled: pooled}, seen)
    losses, report = objective(model, batch)
    torch.testing.assert_close(losses[objective.name], torch.tensor((2 * log(4) + log(4 / 3)) / 3))
    assert report[f"{objective.name}_accuracy"] == pytest.approx(1 / 3) and seen == [None]
    batch.views["masked_language"] = batch.text
    objective(model, batch)
    assert seen == [None, "masked_language"], "one text for both losses"


def test_one_segment_is_no_pair():
    with pytest.raises(ValueError, match="a text of one segment, next_sentence needs two"):
        NextSentence().prepare(Sample(text(5), None, 0), draw())


def test_classes():
    """3 classes, odds 1 : 1 : 2; smoothing of 0.3 leaves 0.8 on the target."""
    objective = Classification(classes=3, label_smoothing=0.3)
    batch = prepared(objective, *(Sample(text(5), None, n, classes=(n,)) for n in (2, 0)))
    model = pooling_model(torch.tensor([[0.0, 0.0, log(2)]]).expand(2, 3), {objective.name: lambda pooled: pooled}, [])
    losses, report = objective(model, batch)
    first, second = 0.8 * log(2) + 0.2 * log(4), 0.8 * log(4) + 0.1 * log(4) + 0.1 * log(2)
    torch.testing.assert_close(losses["classification"], torch.tensor((first + second) / 2))
    assert report["classification_accuracy"] == 0.5
    with pytest.raises(ValueError, match="class 3, objectives.classification.classes is 3"):
        objective.prepare(Sample(text(5), None, 0, classes=(3,)), draw())
    with pytest.raises(ValueError, match="2 classes, classification needs one"):
        objective.prepare(Sample(text(5), None, 0, classes=(0, 1)), draw())


def test_several_classes_of_a_page():
    """Probabilities 1/2 and 3/4 of two classes; a page shows both, the other none."""
    objective = DocumentClasses(classes=2)
    batch = prepared(objective, *(Sample(text(5), None, n, classes=classes) for n, classes in enumerate(((0, 1), ()))))
    model = pooling_model(torch.tensor([[0.0, log(3)]]).expand(2, 2), {objective.name: lambda pooled: pooled}, [])
    losses, report = objective(model, batch)
    both, none = log(2) + log(4 / 3), log(2) + log(4)
    torch.testing.assert_close(losses["document_classes"], torch.tensor((both + none) / 4))
    assert report["document_classes_accuracy"] == 0.5


# ---- writing


def test_every_word_but_the_first_is_predicted():
    """States (9, 0) and (0, 9) read a table of two words: odds 1 : 3 after the one, even after the other."""
    objective = CausalLanguage()
    batch = prepared(objective, Sample(Words(np.asarray([0, 1, 0]), np.arange(3)), None, 0))
    view = batch.views["causal_language"]
    assert view.targets.tolist() == [1, 0] and view.places.offsets.tolist() == [0, 1]
    assert batch.counts["causal_language"] == 2
    states = torch.tensor([[9.0, 0.0], [0.0, 9.0], [1000.0, 1000.0]])
    table = torch.tensor([[0.0, 0.0], [log(3) / 9, 0.0]])
    read = Tokens(states, batch.text.layout)
    options = SimpleNamespace(text=SimpleNamespace(width=2))
    model = SimpleNamespace(
        decoder=None, joint=None, text=1, text_states=lambda *_: read, words_of=lambda _: table, options=options, impl="auto"
    )
    model.heads = {"causal_language": objective.build_head(model)}
    losses, _ = objective(model, batch)
    torch.testing.assert_close(losses["causal_language"], torch.tensor((log(4 / 3) + log(2)) / 2))


def test_a_joint_stream_writes_without_looking_ahead():
    """Its own mask lets every token see all; another last word changes the loss of that word alone."""
    joint = JointStack(**SIZES, max_positions=8)
    model = VisionLanguageModel(Model(image=None, text=None, fusion=None, joint=joint), 40).double().eval()
    objective = CausalLanguage()
    add_heads(model, {"causal_language": objective})
    states = []
    for last in (7, 8):
        batch = prepared(objective, Sample(Words(np.asarray([CLS, 5, 6, last]), np.arange(4)), None, 0))
        states.append(objective.states(model, batch))
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_text_that_sees_all_cannot_write():
    config = SimpleNamespace(model=Model(image=None, text=TextStack(**SIZES), fusion=None), tokenizer=Tokenizer())
    with pytest.raises(ValueError, match="objectives.causal_language needs model.text.mask causal, got full"):
        CausalLanguage().check(config)


def parts(sample: Sample) -> tuple[list[int], list[int], list[int]]:
    """What is read, what the decoder begins with, what it writes."""
    views = sample.views
    return views[READ].ids.tolist(), views[BEGUN].ids.tolist(), views["denoising"].targets.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_spans_are_written_behind_their_sentinels(seed):
    inner = list(range(4, 24))
    sample = Sample(text(*inner), None, 0)
    Denoising(probability=0.3, mean_span=2.0).prepare(sample, draw(seed))
    read, begun, written = parts(sample)
    assert begun == [0, *written[:-1]] and read[-1] == written[-1] == SEP
    spans: dict[int, list[int]] = {}
    for token in written[:-1]:
        spans.setdefault(token, []) if token >= FIRST_SENTINEL else spans[max(spans)].append(token)
    restored = [word for token in read[:-1] for word in spans.get(token, [token])]
    assert restored == inner and sum(map(len, spans.values())) == 6 and len(spans) == 3


def test_infilling_writes_the_whole_text():
    sample = Sample(text(*range(4, 24)), None, 0)
    Denoising(noise="infilling", probability=0.3).prepare(sample, draw())
    read, begun, written = parts(sample)
    assert written == sample.text.ids.tolist() and begun == [SEP, *written[:-1]]
    assert MASK in read and 14 <= sum(token in read for token in range(4, 24)) < 20


def noisy(seed: int, *inner: int, **options) -> list[int]:
    """What is read of a text that is written whole."""
    sample = Sample(text(*inner), None, 0)
    Denoising(**options).prepare(sample, draw(seed))
    read, begun, written = parts(sample)
    assert written == [CLS, *inner, SEP] == sample.text.ids.tolist() and begun == [SEP, *written[:-1]]
    return read


STOP = 29


def test_sentences_are_read_in_any_order():
    pieces = [5, 6, STOP], [7, STOP], [STOP, 8, 9]  # a stop behind a stop begins the next
    found = {tuple(noisy(seed, 5, 6, STOP, 7, STOP, STOP, 8, 9, noise="none", permute=True)) for seed in range(40)}
    orders = {(CLS, *sum(order, []), SEP) for order in itertools.permutations(pieces)}
    assert found == orders and len(orders) == 6


def test_a_text_is_read_from_some_token_on():
    found = {tuple(noisy(seed, 5, 6, 7, noise="none", rotate=True)) for seed in range(20)}
    assert found == {(CLS, *order, SEP) for order in ((5, 6, 7), (6, 7, 5), (7, 5, 6))}


def test_tokens_become_masks_or_are_gone():
    inner = list(range(4, 28))
    read = noisy(3, *inner, noise="masking", probability=0.4)
    hidden = [place for place, token in enumerate(read) if token == MASK]
    assert 4 <= len(hidden) <= 16 and [old for old, new in zip([CLS, *inner, SEP], read, strict=True) if new != MASK] == (
        noisy(3, *inner, noise="deletion", probability=0.4)
    )


@pytest.mark.parametrize("noise", ["spans", "prefix"])
def test_what_is_not_written_whole_keeps_its_order(noise):
    with pytest.raises(ValueError, match=f"written whole, got noise {noise}"):
        Denoising(noise=noise, permute=True)


def test_the_decoder_goes_on_behind_the_prefix():
    cuts = set()
    for seed in range(20):
        sample = Sample(text(*range(4, 14)), None, 0)
        Denoising(noise="prefix").prepare(sample, draw(seed))
        read, begun, written = parts(sample)
        assert [*read, *written] == [*range(4, 14), SEP] and begun == [CLS, *written[:-1]] and read and len(written) > 1
        cuts.add(len(read))
    assert len(cuts) > 4


@pytest.mark.parametrize("image, words, reads", [(True, 1, {0}), (True, 3, {0, 1, 2}), (False, 3, {1, 2})])
def test_an_image_may_be_all_that_is_read(image, words, reads):
    """SimVLM: a prefix ends behind the image at least; without one the encoder has a word."""
    picture, found = Patches(torch.zeros(1, 12), torch.zeros(1, 2)) if image else None, set()
    for seed in range(30):
        sample = Sample(text(*range(4, 4 + words)), picture, 0)
        Denoising(noise="prefix").prepare(sample, draw(seed))
        read, begun, written = parts(sample)
        assert [*read, *written] == [*range(4, 4 + words), SEP] and begun == [CLS, *written[:-1]]
        found.add(len(read))
    assert found == reads


def test_a_document_of_one_word_has_no_prefix():
    with pytest.raises(ValueError, match="a text of 1 tokens, denoising needs 2"):
        Denoising(noise="prefix").prepare(Sample(text(4), None, 0), draw(0))


def test_an_image_before_a_prefix_must_be_read():
    """Where it goes to another role, an encoder without words would read nothing."""
    roles = {"image": ImageStack(**SIZES), "text": TextStack(**SIZES), "decoder": DecoderStack(**SIZES, source="text")}
    with pytest.raises(ValueError, match="model.decoder.source must be joint with model.joint.image, got text"):
        Denoising(noise="prefix").check(SimpleNamespace(model=Model(fusion=None, **roles)))


# ---- spans


def test_words_of_a_span_are_told_from_both_sides():
    """The loss of either head, from states looked up one by one."""
    model = VisionLanguageModel(Model(image=None, text=TextStack(**SIZES), fusion=None), 40).eval()
    objective = SpanBoundary(probability=0.4)
    add_heads(model, {"span_boundary": objective})
    model.double()
    batch = prepared(objective, *(Sample(text(*range(4, 4 + size)), None, size) for size in (12, 7)))
    spans, head = batch.views["span_boundary"], model.heads["span_boundary"]
    corrupted = Text(spans.ids, batch.text.layout)
    hidden = model.text(corrupted, batch.text.layout, model.rng).hidden
    own, boundary = [], []
    for sample, place, left, right, offset in zip(
        spans.places.samples, spans.places.offsets, spans.left.offsets, spans.right.offsets, spans.offsets, strict=True
    ):
        first = int(batch.text.layout.starts[sample, 0])
        assert place - offset == left + 1 and left < place < right
        own.append(hidden[first + place])
        around = torch.cat((hidden[first + left], hidden[first + right], head.positions[offset]))
        boundary.append(head.neighbours(around[None])[0])
    assert spans.offsets.max() > 0
    losses, _ = objective(model, batch)
    for name, part, states in (("span_words", head.own, own), ("span_boundary", head.boundary, boundary)):
        expected = F.cross_entropy(part.logits(torch.stack(states), model.words), spans.targets)
        torch.testing.assert_close(losses[name], expected)


# ---- pairs


def features(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    return model.image_features(batch) @ model.text_features(batch).T


def test_sigmoid_by_hand():
    model, batch, objective = small_model(), random_batch(range(5)), SigmoidContrastive(bias=-3.0)
    add_heads(model, {"sigmoid_contrastive": objective})
    losses, report = objective(model, batch)
    logits = model.scale() * features(model, batch) - 3
    expected = -F.logsigmoid(logits * (2 * torch.eye(5) - 1)).sum() / 5
    torch.testing.assert_close(losses["sigmoid_contrastive"], expected)
    assert report["logit_bias"] == -3


@pytest.mark.parametrize("hardest", [True, False])
def test_triplets_by_hand(hardest):
    """Pairs 0 and 5 show one image: neither is wrong beside the other."""
    model, batch = small_model(), random_batch(range(6))
    losses, _ = Triplet(margin=0.3, hardest=hardest)(model, batch)
    similar = features(model, batch)
    wrong, own = batch.labels[:, None] != batch.labels[None], similar.diagonal()
    by_image = (0.3 + similar - own[:, None]).relu() * wrong
    by_text = (0.3 + similar - own[None]).relu() * wrong
    expected = by_image.amax(1).sum() + by_text.amax(0).sum() if hardest else by_image.sum() + by_text.sum()
    torch.testing.assert_close(losses["triplet"], expected)


def test_late_interaction_by_hand():
    model, batch, objective = small_model(), random_batch(range(4)), LateInteraction()
    image, text_tokens = mapped(model, "image", model.image_states(batch)), mapped(model, "text", model.text_states(batch))
    images, texts = (
        tokens.hidden.split(tokens.layout.lengths.sum(1).tolist()) for tokens in (image, text_tokens)
    )
    by_image = torch.stack([torch.stack([(i @ t.T).amax(1).mean() for t in texts]) for i in images])
    by_text = torch.stack([torch.stack([(i @ t.T).amax(0).mean() for i in images]) for t in texts])
    torch.testing.assert_close(similarities(image, text_tokens), by_image)
    torch.testing.assert_close(similarities(text_tokens, image), by_text)
    own, scale = torch.arange(4), model.scale()
    expected = (F.cross_entropy(scale * by_image, own) + F.cross_entropy(scale * by_text, own)) / 2
    torch.testing.assert_close(objective(model, batch)[0]["late_interaction"], expected)
    assert isinstance(image.layout, vk.SegmentLayout)
