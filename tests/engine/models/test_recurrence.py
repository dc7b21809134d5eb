"""Texts that a recurrent network reads: by its equations, as one that gets sequences packed by torch; two towers of a pooled
backbone and of such texts by the definition of their loss."""

import re

import numpy as np
import pytest
import torch
import vlkernels as vk
from stack_parity import LENGTHS, TOLERANCE, layout_of, redraw
from torch import Tensor, nn
from torch.nn import functional as F

from engine.batch import Batch, Pixels, Text
from engine.models import VisionLanguageModel
from engine.models.recurrence import PackedGru
from engine.models.transformer import SelectedRows, Tokens
from engine.objectives.triplet import Triplet
from engine.recipes import table
from engine.sections import CoAttentionStack, DecoderStack, Distances, FusionStack, ImageStack, Model, Stack, TextStack
from engine.training.command_line import parse

IN, WIDTH, VOCAB = 6, 8, 30
RECURRENT = {"encoder": "gru", "width": WIDTH, "layers": 1, "heads": 1, "embedding_width": IN, "pooling": "last"}


def step(gru: nn.GRU, x: Tensor, state: Tensor) -> Tensor:
    """Cho et al., 2014, in the form of Hinton's group: the reset gate is behind the map of the state."""
    of_x, of_state = F.linear(x, gru.weight_ih_l0, gru.bias_ih_l0), F.linear(state, gru.weight_hh_l0, gru.bias_hh_l0)
    (r, z, n), (r_state, z_state, n_state) = of_x.chunk(3), of_state.chunk(3)
    reset, update = torch.sigmoid(r + r_state), torch.sigmoid(z + z_state)
    return (1 - update) * torch.tanh(n + reset * n_state) + update * state


def by_hand(gru: nn.GRU, texts: list[Tensor]) -> list[Tensor]:
    """`[n, D]` of each text."""
    read = []
    for text in texts:
        states = [text.new_zeros(WIDTH)]
        for x in text:
            states.append(step(gru, x, states[-1]))
        read.append(torch.stack(states[1:]))
    return read


def gradients(value: Tensor, of: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a sum in which every number counts otherwise."""
    weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
    return torch.autograd.grad((value * weights).sum(), of)


def test_states_are_those_of_the_equations():
    reader, layout = redraw(PackedGru(Stack(width=WIDTH, layers=1, heads=1), IN, "auto")), layout_of()
    rows = torch.randn(sum(LENGTHS), IN, dtype=torch.float64, requires_grad=True)
    ours, expected = reader(Tokens(rows, layout)).hidden, torch.cat(by_hand(reader.gru, list(rows.split(LENGTHS))))
    torch.testing.assert_close(ours, expected, **TOLERANCE)
    learned = [rows, *reader.parameters()]
    for found, wanted in zip(gradients(ours, learned), gradients(expected, learned), strict=True):
        torch.testing.assert_close(found, wanted, **TOLERANCE)


def test_two_layers_and_selected_rows():
    reader, layout = redraw(PackedGru(Stack(width=WIDTH, layers=2, heads=1), IN, "auto")), layout_of()
    rows = torch.randn(sum(LENGTHS), IN, dtype=torch.float64)
    sequences = nn.utils.rnn.pack_sequence(list(rows.split(LENGTHS)), enforce_sorted=False)
    expected = torch.cat(nn.utils.rnn.unpack_sequence(reader.gru(sequences)[0]))
    torch.testing.assert_close(reader(Tokens(rows, layout)).hidden, expected, **TOLERANCE)
    chosen = SelectedRows.of(torch.tensor([1, 6, 9]), torch.tensor([0, 2, 2]), layout)
    some = reader(Tokens(rows, layout), chosen)
    torch.testing.assert_close(some.hidden, expected[[1, 6, 9]], **TOLERANCE)
    assert some.layout.lengths[:, 0].tolist() == [1, 0, 2, 0]


def test_rows_of_nobody_are_zeros():
    """Behind the last text of a layout with a capacity."""
    reader = redraw(PackedGru(Stack(width=WIDTH, layers=1, heads=1), IN, "auto"))
    rows, wider = torch.randn(20, IN, dtype=torch.float64), vk.SegmentLayout([[n] for n in LENGTHS], capacity=20)
    states = reader(Tokens(rows, wider)).hidden
    torch.testing.assert_close(states[:18], reader(Tokens(rows[:18], layout_of())).hidden, **TOLERANCE)
    assert states.shape == (20, WIDTH) and not states[18:].any()


# ---- VSE++


def two_towers() -> VisionLanguageModel:
    image = ImageStack(
        width=WIDTH, layers=0, heads=1, norm="post", kind="grid", backbone="resnet18", backbone_norm="batch", stages=2,
        max_grid=(1, 1), unit_cells=True, positions="none", embedding_norm=False, pooling="first", projection="none",
    )  # fmt: skip
    text = TextStack(**RECURRENT, positions="none", embedding_norm=False, projection="none")
    return VisionLanguageModel(Model(image, text, fusion=None, projection_dim=WIDTH, logit_scale_init=None), VOCAB)


def pictures_and_texts() -> Batch:
    random, count = np.random.default_rng(2), len(LENGTHS)
    ids = torch.from_numpy(random.integers(0, VOCAB, sum(LENGTHS)))
    pixels = torch.from_numpy(random.standard_normal((count, 3, 16, 16)))
    image = Pixels(pixels, torch.zeros(count, 2, dtype=torch.int32))
    layout = vk.SegmentLayout([[n, 1] for n in LENGTHS])
    labels = torch.tensor([0, 1, 0, 2])
    return Batch(layout, Text(ids, layout_of()), image, labels, torch.arange(count, dtype=torch.int32), counts={"pairs": count})


def test_the_loss_and_its_gradients_by_definition():
    """Of pictures as far as their backbone's map; the first and the third are the same picture, and so no wrong pair."""
    model, batch = redraw(two_towers()).train(), pictures_and_texts()
    ours = Triplet(margin=0.2)(model, batch)[0]["triplet"]
    embedder, text = model.image.embedder, model.text
    cells = embedder.backbone(batch.image.values).mean((2, 3))
    images = F.linear(cells / cells.norm(dim=1, keepdim=True), embedder.projection.weight, embedder.projection.bias)
    rows = text.embedder.words[batch.text.ids].split(LENGTHS)
    last = torch.stack([states[-1] for states in by_hand(text.recurrence.gru, list(rows))])
    scores = (images / images.norm(dim=1, keepdim=True)) @ (last / last.norm(dim=1, keepdim=True)).T
    total = 0.0
    for pair, label in enumerate(batch.labels):
        wrong = batch.labels != label
        for others in (scores[pair, wrong], scores[wrong, pair]):
            total = total + (0.2 + others.max() - scores[pair, pair]).clamp(min=0)
    assert total > 0
    torch.testing.assert_close(ours, total, **TOLERANCE)
    names, learned = zip(*model.named_parameters(), strict=True)
    assert "logit_scale" not in names
    found, expected = torch.autograd.grad(ours, learned), torch.autograd.grad(total, learned)
    for name, gradient, wanted in zip(names, found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-9, msg=name)


def test_size_of_the_published_one():
    """Its parts: a ResNet-152 without its classes, a map of 2,048, a table of 300 and a GRU of 1,024."""
    model = table.model_of(table.recipe("vsepp"))
    backbone, text = model.image.embedder.backbone, model.text
    assert sum(p.numel() for p in backbone.parameters()) == 60_192_808 - (2048 * 1000 + 1000)
    gru = 3 * 1024 * (300 + 1024 + 2)
    assert table.num_parameters(model) == 58_143_808 + 2048 * 1024 + 1024 + 11_755 * 300 + gru
    assert sum(p.numel() for p in text.recurrence.parameters()) == gru


# ---- refusals


@pytest.mark.parametrize(
    "roles, message",
    [
        ({"fusion": FusionStack(begins_with="ids")}, "model.fusion.begins_with ids needs blocks of model.text"),
        ({"decoder": DecoderStack(shares="all_but_attention")}, "shares all_but_attention needs blocks of model.text"),
        (
            {"co_attention": CoAttentionStack(layers=1), "image": ImageStack(norm="post")},
            "model.co_attention needs blocks of model.text: model.text.encoder must be transformer, got gru",
        ),
    ],
)
def test_a_recurrent_network_has_no_blocks_to_share(roles, message):
    text = TextStack(encoder="gru", norm="post")
    with pytest.raises(ValueError, match=message):
        Model(**{"text": text, "fusion": None, **roles})


@pytest.mark.parametrize("options", [{"mask": "causal"}, {"relative_position": Distances()}])
def test_a_recurrent_network_has_no_attention(options):
    with pytest.raises(ValueError, match="model.text.mask and relative_position are of attention"):
        TextStack(**RECURRENT, **options)


@pytest.mark.parametrize(
    "recipe, options, message",
    [
        ("distilbert", ["--model.text.encoder=gru"], "objectives.distillation needs model.text.encoder transformer, got gru"),
        ("vsepp", ["--objectives.contrastive={}"], "objectives.contrastive .* model.logit_scale_init must not be null"),
    ],
)
def test_objectives_that_need_more(recipe, options, message, capsys):
    with pytest.raises(SystemExit):
        parse([f"--config=engine/recipes/{recipe}.yaml", *options])
    assert re.search(message, capsys.readouterr().err)
