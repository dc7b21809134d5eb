"""BLIP-2's three losses against Q-Former of `transformers`, called for one sample after another with masks written out;
every parameter redrawn, float64."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stack_parity import InDouble, compare, copy_weights, redraw
from torch import nn
from torch.nn import functional as F

from engine.batch import Patches, Sample, Words
from engine.data import collate
from engine.models.model import VisionLanguageModel
from engine.objectives import add_heads
from engine.objectives.causal_language import CausalLanguage
from engine.objectives.parts.objective import Draw
from engine.objectives.query_contrastive import QueryContrastive, compared, similarities
from engine.objectives.query_matching import QueryMatching, draw_negatives
from engine.sections import ImageStack, JointStack, Model
from engine.weights import q_former
from engine.weights.pieces import Piece, linear

transformers = pytest.importorskip("transformers")

VOCAB, WIDTH, QUERIES, SOURCE, FEATURES, DEC = 40, 24, 3, 16, 8, 39
JOINT = JointStack(
    width=WIDTH, layers=3, heads=3, mlp_width=40, norm="post", eps=1e-6, activation="gelu", max_positions=16,
    queries=QUERIES, source="image", cross_every=2, own_feed_forward=True, pooling="first",
)  # fmt: skip
IMAGE = ImageStack(width=SOURCE, layers=1, heads=2, mlp_width=24, patch_size=2, max_grid=(3, 3), pooling="first")
TEXTS = [[1, 5, 6, 7, 2], [1, 8, 2], [1, 9, 10, 11, 12, 13, 2], [1, 14, 2]]
OBJECTIVES = {
    "query_contrastive": QueryContrastive(label_smoothing=0.1),
    "query_matching": QueryMatching(),
    "causal_language": CausalLanguage(opening="sentinel", output="transform", label_smoothing=0.1),
}


class Plain(nn.Module):
    """Their encoder, the tables and heads that stand around it, and what each loss is by definition."""

    def __init__(self):
        super().__init__()
        config = transformers.Blip2QFormerConfig(
            hidden_size=WIDTH, num_attention_heads=3, intermediate_size=40, layer_norm_eps=1e-6, num_hidden_layers=3,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, cross_attention_frequency=2,
            encoder_hidden_size=SOURCE, use_qformer_text_input=True, attn_implementation="eager",
        )  # fmt: skip
        self.encoder = transformers.models.blip_2.modeling_blip_2.Blip2QFormerEncoder(config)
        self.words, self.positions, self.queries = nn.Embedding(VOCAB, WIDTH), nn.Embedding(16, WIDTH), nn.Embedding(QUERIES, WIDTH)
        self.norm, self.transform = nn.LayerNorm(WIDTH, 1e-6), nn.Linear(WIDTH, WIDTH)
        self.transform_norm, self.word_bias = nn.LayerNorm(WIDTH, 1e-6), nn.Parameter(torch.zeros(VOCAB))
        self.image, self.text, self.pair = nn.Linear(WIDTH, FEATURES), nn.Linear(WIDTH, FEATURES), nn.Linear(WIDTH, 2)
        self.log_scale = nn.Parameter(torch.zeros(1))

    def read(self, ids: list[int], source: torch.Tensor, kind: str) -> torch.Tensor:
        text = torch.tensor(ids)
        rows = self.norm(torch.cat((self.queries.weight, self.words(text) + self.positions.weight[: len(text)])))
        query = torch.arange(len(rows)) < QUERIES
        seen = {
            "separate": query[:, None] == query,
            "full": torch.ones(len(rows), len(rows), dtype=torch.bool),
            "prefix": query | (torch.ones(len(rows), len(rows)).tril().bool() & ~query[:, None]),
        }[kind]
        mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[None, None]
        everything = torch.zeros(1, 1, 1, len(source), dtype=torch.float64)
        more = {"encoder_hidden_states": source[None], "encoder_attention_mask": everything, "query_length": QUERIES}
        return self.encoder(rows[None], attention_mask=mask, **more).last_hidden_state[0]

    def contrast(self, texts, sources) -> torch.Tensor:
        states = [self.read(*one, "separate") for one in zip(texts, sources, strict=True)]
        queries = [F.normalize(self.image(one[:QUERIES]), dim=1) for one in states]
        firsts = [F.normalize(self.text(one[QUERIES]), dim=0) for one in states]
        logits = self.log_scale.exp() * torch.stack([torch.stack([(q @ t).max() for t in firsts]) for q in queries])
        own = torch.arange(len(texts))
        return sum(F.cross_entropy(one, own, label_smoothing=0.1) for one in (logits, logits.T)) / 2

    def match(self, texts, sources, hard_texts, hard_images) -> torch.Tensor:
        losses = []
        for sample, (text, image) in enumerate(zip(hard_texts, hard_images, strict=True)):
            for ids, source, label in ((sample, sample, 1), (text, sample, 0), (sample, image, 0)):
                logits = self.pair(self.read(texts[ids], sources[source], "full")[:QUERIES]).mean(0)
                losses.append(F.cross_entropy(logits, torch.tensor(label)))
        return torch.stack(losses).mean()

    def write(self, texts, sources) -> torch.Tensor:
        losses = []
        for ids, source in zip(texts, sources, strict=True):
            states = self.read([DEC, *ids[1:]], source, "prefix")[QUERIES:-1]
            logits = self.transform_norm(F.gelu(self.transform(states))) @ self.words.weight.T + self.word_bias
            losses.append(F.cross_entropy(logits, torch.tensor(ids[1:]), label_smoothing=0.1, reduction="none"))
        return torch.cat(losses).mean()


def names():
    """Of every parameter."""
    yield Piece("joint.queries.learned", ("queries.weight",))
    yield Piece("joint.text.words", ("words.weight",))
    yield Piece("joint.text.positions", ("positions.weight",))
    yield from linear("joint.text.norm", "norm")
    yield from q_former.stack("joint.transformer", "encoder", 3, cross_every=2)
    yield from linear("heads.query_contrastive.image", "image")
    yield from linear("heads.query_contrastive.text", "text")
    yield Piece("heads.query_contrastive.logit_scale", ("log_scale",))
    yield from linear("heads.query_matching", "pair")
    yield from linear("heads.causal_language.transform", "transform")
    yield from linear("heads.causal_language.norm", "transform_norm")
    yield Piece("heads.causal_language.bias", ("word_bias",))


def batch_of(count: int = len(TEXTS)):
    """Texts of ragged lengths and pictures of as many sizes, prepared for the three losses."""
    draw = Draw(SimpleNamespace(sentinel_ids=np.asarray([DEC])), lambda: None)
    samples = []
    for number, ids in enumerate(TEXTS[:count]):
        places = torch.tensor([(row, column) for row in range(2) for column in range(1 + number % 3)], dtype=torch.int32)
        text = Words(np.asarray(ids), np.asarray([-1, *range(len(ids) - 2), -1]))
        samples.append(Sample(text, Patches(torch.randn(len(places), 12), places), number))
        for objective in OBJECTIVES.values():
            objective.prepare(samples[-1], draw)
    return collate(samples, range(count))


def built() -> VisionLanguageModel:
    torch.manual_seed(3)
    model = VisionLanguageModel(Model(image=IMAGE, text=None, fusion=None, joint=JOINT, projection_dim=FEATURES), VOCAB).eval()
    add_heads(model, OBJECTIVES)
    return redraw(model)


def test_three_losses_and_their_gradients_are_the_definitions():
    with InDouble():
        model, theirs = built(), redraw(Plain(), seed=8)
        ours, batch = nn.ModuleDict({"joint": model.joint, "heads": model.heads}), batch_of()
        pieces = copy_weights(ours, theirs, names())
        losses = torch.stack([objective(model, batch)[0][name] for name, objective in OBJECTIVES.items()])
        hard = [drawn.tolist() for drawn in draw_negatives(model, batch, None, 1.0)]
        image = model.image_states(batch)
        sources = image.hidden.detach().split(image.layout.lengths.sum(1).tolist())
        expected = (theirs.contrast(TEXTS, sources), theirs.match(TEXTS, sources, *hard), theirs.write(TEXTS, sources))
        compare(ours, theirs, pieces, losses, torch.stack(expected))


def test_negatives_are_what_the_best_query_confuses():
    """At a large scale the most similar other sample is drawn, both ways; equal pictures are no negatives."""
    model, batch = built(), batch_of()
    with torch.no_grad():
        model.heads["query_contrastive"].logit_scale.fill_(10.0)
        model.heads["query_contrastive"].limits = 1.0, math.exp(10.0)
        queries, texts, _ = compared(model, batch)
    scores = similarities(queries, texts)
    others = scores.masked_fill(torch.eye(len(TEXTS), dtype=torch.bool), -torch.inf)
    hard_texts, hard_images = draw_negatives(model, batch, None, 1.0)
    assert torch.equal(hard_texts, others.argmax(1)) and torch.equal(hard_images, others.argmax(0))
    batch = dataclasses.replace(batch, labels=torch.tensor([0, 0, 0, 1]))
    assert [drawn.tolist()[:3] for drawn in draw_negatives(model, batch, None, 1.0)] == [[3, 3, 3]] * 2


def test_negatives_of_no_hardness_are_drawn_alike():
    """Whatever queries confuse."""
    model, batch, drawn = built(), batch_of(), []
    model.heads["query_contrastive"].limits = 1.0, math.exp(10.0)
    torch.nn.init.constant_(model.heads["query_contrastive"].logit_scale, 10.0)
    for _ in range(300):
        model.rng.advance()
        drawn.append(torch.stack(draw_negatives(model, batch, None, 0.0)))
    counts = F.one_hot(torch.stack(drawn), len(TEXTS)).sum(0)
    others = ~torch.eye(len(TEXTS), dtype=torch.bool).expand_as(counts)
    assert not counts[~others].any() and (counts[others] - 100).abs().max() < 40


def test_words_behind_the_sentinel_see_queries_and_their_own_past():
    """The first token is the sentinel, all else the text; without one in the vocabulary a run is refused."""
    batch = batch_of()
    opened = batch.views["causal_language text"]
    assert opened.ids[opened.layout.starts[:, 0].long()].tolist() == [DEC] * len(TEXTS)
    assert batch.views["causal_language"].targets.tolist() == [word for ids in TEXTS for word in ids[1:]]
    tokenizer = SimpleNamespace(sentinels=0, path=None)
    config = SimpleNamespace(model=SimpleNamespace(decoder=None, joint=JOINT), tokenizer=tokenizer)
    config.model.text = None
    with pytest.raises(ValueError, match="opening sentinel needs tokenizer.sentinels of at least 1, got 0"):
        OBJECTIVES["causal_language"].check(config)
