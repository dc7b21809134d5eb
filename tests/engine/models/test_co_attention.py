"""Two towers that read each other, against plain PyTorch that computes them padded, from the same weights: all three
losses and every gradient; what is hidden, what is not computed, what is refused."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from random_pairs import SIZES, redraw, region_batch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from engine.batch import Batch, Places, Regions, Sample
from engine.models import VisionLanguageModel
from engine.objectives import Objectives, PretrainingModule, add_heads
from engine.objectives.masked_language import MaskedLanguage
from engine.objectives.masked_region_classes import MaskedRegionClasses
from engine.objectives.parts.objective import Draw
from engine.objectives.random_matching import RandomMatching, matching_logits
from engine.sections import CoAttentionStack, ImageStack, Model, TextStack
from engine.sections import Regions as RegionOptions
from engine.training.command_line import parse

ROWS = {"norm": "post", "eps": 1e-12, "activation": "gelu", "pooling": "first"}
IMAGE = {"width": 24, "layers": 2, "heads": 3, "mlp_width": 20, "kind": "regions", "box_values": 5, "mean_token": True}
TEXTS = {"width": 16, "layers": 3, "heads": 2, "mlp_width": 32, "max_positions": 24, "types": 2}
BETWEEN = {"width": 20, "layers": 2, "heads": 5}
THREE = Objectives(
    masked_language=MaskedLanguage(),
    masked_region_classes=MaskedRegionClasses(weight=9.0),
    random_matching=RandomMatching(alignment=0.0),
)


def co_attending(dropout: float = 0.0, **between: int) -> VisionLanguageModel:
    dropped = {"dropout": dropout, "attention_dropout": dropout}
    towers = {"image": ImageStack(**IMAGE, **ROWS, **dropped), "text": TextStack(**TEXTS, **ROWS, **dropped)}
    options = Model(**towers, co_attention=CoAttentionStack(**BETWEEN | between), fusion=None)
    model = VisionLanguageModel(options, SIZES.vocab_size, RegionOptions(SIZES.feature_values, SIZES.classes))
    add_heads(model, THREE.active)
    redraw(model)
    return model.double().train(dropout > 0)


def pairs(numbers: Sequence[int] = range(4)) -> Batch:
    """Of the masked regions the first is seen all the same."""
    batch = region_batch(numbers)
    masked = batch.views["masked_region_classes"]
    hidden = Places(masked.places.samples[1:], masked.places.offsets[1:])
    views = {**batch.views, "masked_region_classes": dataclasses.replace(masked, hidden=hidden)}
    features, boxes = batch.image.features.double(), batch.image.boxes.double()
    return dataclasses.replace(batch, views=views, image=Regions(features, boxes))


class Plain:
    """ViLBERT, padded, of tensors by the names of ours."""

    def __init__(self, model: VisionLanguageModel, batch: Batch):
        self.weights, self.batch = dict(model.named_parameters()), batch
        self.words, self.regions = batch.layout.lengths.T.tolist()

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self[f"{name}.weight"], self[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], 1e-12)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, heads: int, counts: list[int]) -> Tensor:
        query, key, value = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
        unseen = torch.arange(key.shape[2]) >= torch.tensor(counts)[:, None]
        scores = scores.masked_fill(unseen[:, None, None], -torch.inf)
        return (scores.softmax(3) @ value).transpose(1, 2).flatten(2)

    def finish(self, x: Tensor, attended: Tensor, block: str, attention: str) -> Tensor:
        x = self.norm(x + self.linear(attended, f"{block}.{attention}.output"), f"{block}.{attention}.norm")
        inner = F.gelu(self.linear(x, f"{block}.feed_forward.inner"))
        return self.norm(x + self.linear(inner, f"{block}.feed_forward.output"), f"{block}.feed_forward.norm")

    def layer(self, x: Tensor, role: str, number: int, heads: int, counts: list[int]) -> Tensor:
        block = f"{role}.transformer.blocks.{number}"
        projected = self.linear(x, f"{block}.self_attention.query_key_value").chunk(3, dim=2)
        return self.finish(x, self.attend(*projected, heads, counts), block, "self_attention")

    def reading(self, x: Tensor, read: Tensor, role: str, number: int, counts: list[int]) -> Tensor:
        block = f"co_attention.{role}.{number}"
        query = self.linear(x, f"{block}.cross_attention.query")
        key, value = self.linear(read, f"{block}.cross_attention.key_value").chunk(2, dim=2)
        return self.finish(x, self.attend(query, key, value, BETWEEN["heads"], counts), block, "cross_attention")

    def embedded_regions(self, hidden: Tensor | None) -> Tensor:
        """With the mean of what is seen, in the box of the whole picture, before them."""
        features = self.batch.image.features.clone()
        if hidden is not None:
            features[hidden] = 0
        boxes = self.batch.image.boxes[:, [0, 1, 2, 3, 6]]
        whole = boxes.new_tensor([[0, 0, 1, 1, 1]])
        rows = [
            (torch.cat((own.mean(0, keepdim=True), own)), torch.cat((whole, places)))
            for own, places in zip(features.split(self.regions), boxes.split(self.regions), strict=True)
        ]
        features, boxes = (pad_sequence(list(column), batch_first=True) for column in zip(*rows, strict=True))
        maps = self.linear(features, "image.embedder.feature_projection"), self.linear(boxes, "image.embedder.box_projection")
        return self.norm(maps[0] + maps[1], "image.embedder.norm")

    def embedded_words(self, ids: Tensor) -> Tensor:
        ids = pad_sequence(list(ids.split(self.words)), batch_first=True)
        tables = [self[f"text.embedder.{name}"] for name in ("words", "positions", "types")]
        rows = tables[0][ids] + tables[1][: ids.shape[1]] + tables[2][0]
        return self.norm(rows, "text.embedder.norm")

    def states(self, ids: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        image, text = self.embedded_regions(hidden), self.embedded_words(ids)
        tokens = [1 + count for count in self.regions]
        text = self.layer(text, "text", 0, TEXTS["heads"], self.words)
        for number in range(2):
            image, text = (
                self.reading(image, text, "image", number, self.words),
                self.reading(text, image, "text", number, tokens),
            )
            image = self.layer(image, "image", number, IMAGE["heads"], tokens)
            text = self.layer(text, "text", 1 + number, TEXTS["heads"], self.words)
        return image, text

    def transformed(self, rows: Tensor, head: str) -> Tensor:
        return self.norm(F.gelu(self.linear(rows, f"heads.{head}.transform")), f"heads.{head}.norm")

    def masked_language(self) -> Tensor:
        view = self.batch.views["masked_language"]
        _, text = self.states(view.ids, None)
        rows = self.transformed(text[view.places.samples, view.places.offsets], "masked_language")
        return F.cross_entropy(F.linear(rows, self["text.embedder.words"], self["heads.masked_language.bias"]), view.targets)

    def masked_region_classes(self) -> Tensor:
        view = self.batch.views["masked_region_classes"]
        first = np.cumsum([0, *self.regions[:-1]])
        hidden = torch.from_numpy(first)[view.hidden.samples] + view.hidden.offsets
        image, _ = self.states(self.batch.text.ids, hidden)
        rows = self.transformed(image[view.places.samples, 1 + view.places.offsets], "masked_region_classes")
        logits = self.linear(rows, "heads.masked_region_classes.classifier")
        labels = view.soft_labels.double()
        return (labels * (labels.log() - logits.log_softmax(1))).nansum() / len(labels) / labels.shape[1]

    def random_matching(self) -> Tensor:
        image, text = self.states(self.batch.text.ids, None)
        of_image = self.linear(image[:, 0], "heads.random_matching.image_map").clamp(min=0)
        product = of_image * self.linear(text[:, 0], "heads.random_matching.text_map").clamp(min=0)
        return F.cross_entropy(self.linear(product, "heads.random_matching.classifier"), self.batch.views["random_matching"])


def gradients(loss: Tensor, model: VisionLanguageModel) -> dict[str, Tensor | None]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


@pytest.mark.parametrize("name", list(THREE.active))
def test_losses_and_gradients_are_those_of_plain_streams(name):
    model, batch = co_attending(), pairs()
    ours = THREE.active[name](model, batch)[0][name]
    theirs = getattr(Plain(model, batch), name)()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    found, expected = gradients(ours, model), gradients(theirs, model)
    read = {parameter for parameter, gradient in expected.items() if gradient is not None and gradient.any()}
    for parameter in read:
        torch.testing.assert_close(found[parameter], expected[parameter], rtol=1e-8, atol=1e-9)
    assert {parameter for parameter, gradient in found.items() if gradient is not None and gradient.any()} == read


@pytest.mark.parametrize("name, unread", [("masked_language", "image"), ("masked_region_classes", "text")])
def test_what_nobody_reads_is_not_computed(name, unread):
    """The last layer of the other tower, behind which nobody looks."""
    model, batch = co_attending(), pairs()
    met = []
    for role in ("image", "text"):
        for number, block in enumerate(getattr(model, role).transformer.blocks):
            block.register_forward_hook(lambda *_, where=(role, number): met.append(where))
    with model.passes_shared():
        THREE.active[name](model, batch)
    layers = {"image": IMAGE["layers"], "text": TEXTS["layers"]}
    every = {(role, number) for role, count in layers.items() for number in range(count)}
    assert len(met) == len(set(met)) and every - set(met) == {(unread, layers[unread] - 1)}


def test_hidden_regions_tell_nothing():
    """Neither where they stood, nor by the mean of all, nor by way of the text; the shown one does."""
    model, batch = co_attending(), pairs()
    view = batch.views["masked_region_classes"]

    def states(changed: Places) -> list[Tensor]:
        features = batch.image.features.clone()
        features[changed.rows(batch.image_layout)] += 1
        one = dataclasses.replace(batch, image=Regions(features, batch.image.boxes))
        return [model.image_states(one, "masked_region_classes").hidden, model.text_states(one, "masked_region_classes").hidden]

    before, none = states(view.hidden), Places(*torch.zeros(2, 0, dtype=torch.int64))
    for hidden, unchanged in zip(before, states(none), strict=True):
        assert torch.equal(hidden, unchanged)
    shown = Places(view.places.samples[:1], view.places.offsets[:1])
    assert all((a != b).any() for a, b in zip(before, states(shown), strict=True))


def test_recomputing_blocks_changes_nothing():
    """Dropout of either pass is that of the other; every block between the towers is recomputed."""
    model, found = co_attending(dropout=0.2), []
    between = (*model.co_attention.image, *model.co_attention.text)
    module = PretrainingModule(model, {"random_matching": THREE.random_matching})
    for again in (False, True):
        model.checkpoint_activations(again)
        runs = []
        hooks = [block.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1)) for block in between]
        found.append(gradients(module(pairs())[0], model))
        for hook in hooks:
            hook.remove()
        assert len(runs) == len(between) * (1 + again)
    for name, gradient in found[0].items():
        assert gradient is found[1][name] is None or torch.equal(gradient, found[1][name]), name


def test_dropout_of_one_pair_is_its_own():
    """Whichever batch the pair is in."""
    model = co_attending(dropout=0.3)
    together, alone = matching_logits(model, pairs()), matching_logits(model, pairs([2]))
    torch.testing.assert_close(together[2:3], alone, rtol=1e-10, atol=1e-10)
    assert (alone - matching_logits(model.eval(), pairs([2]))).abs().max() > 1e-3


@pytest.mark.parametrize(
    "given, message",
    [
        ({"co_attention": CoAttentionStack(layers=3)}, r"co_attention.layers must not exceed model.image.layers = 2, got 3"),
        ({"image": ImageStack(**IMAGE, **ROWS | {"norm": "pre"})}, "needs model.image.norm post, got pre"),
        ({"text": TextStack(**TEXTS, **ROWS, mask="causal")}, "needs model.text.mask full, got causal"),
        ({"text": None}, "model.co_attention needs model.text, which is null"),
    ],
)  # fmt: skip
def test_towers_that_cannot_read_each_other_are_refused(given, message):
    towers = {"image": ImageStack(**IMAGE, **ROWS), "text": TextStack(**TEXTS, **ROWS)}
    with pytest.raises(ValueError, match=message):
        Model(**{**towers, "fusion": None, "co_attention": CoAttentionStack(**BETWEEN)} | given)
    with pytest.raises(ValueError, match="heads must divide model.co_attention.width = 20, got 3"):
        CoAttentionStack(width=20, heads=3)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--objectives.contrastive={}"], "objectives.contrastive compares features of towers"),
        (["--objectives.random_matching.alignment=0.1"], "random_matching.alignment moves words .* must be 0, got 0.1"),
        (["--model.image.class_token=true"], "model.image.mean_token stands before regions, and no class_token"),
        (["--evaluation.zero_shot=builtin"], "zero_shot compares features of two towers"),
    ],
)
def test_what_towers_that_read_each_other_cannot_do(options, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        parse(["--config=engine/recipes/vilbert_base.yaml", *options])
    said = str(error.value) + capsys.readouterr().err
    assert re.search(message, said), said


def test_a_share_of_masked_regions_is_shown():
    objective, hidden, masked = MaskedRegionClasses(shown=0.1), 0, 0
    for number in range(200):
        sample = Sample(None, Regions(torch.zeros(40, 3), torch.zeros(40, 7)), 0, soft_labels=np.ones((40, 5), np.float32))
        objective.prepare(sample, Draw(None, lambda number=number: np.random.default_rng(number)))
        view = sample.views[objective.name]
        assert set(view.hidden.offsets.tolist()) <= set(view.places.offsets.tolist())
        hidden, masked = hidden + len(view.hidden), masked + len(view)
    assert masked / 8000 == pytest.approx(0.15, abs=0.015)
    assert hidden / masked == pytest.approx(0.9, abs=0.03)
