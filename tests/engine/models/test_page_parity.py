"""Models of pages against `transformers`: LayoutLM with its head and loss, LayoutLMv2 and LayoutXLM on the map of a
backbone. Every parameter redrawn, ragged texts, outputs and gradients in float64."""

import itertools

import pytest
import torch
import vlkernels as vk
from feature_pyramid import MapAsItIs, layoutlmv2_without_detectron2
from stack_parity import (
    LENGTHS,
    TOLERANCE,
    InDouble,
    compare,
    copy_weights,
    gradients_everywhere,
    layout_of,
    redraw,
    visible,
)
from torch import nn

from engine.batch import Batch, MaskedWords, Pixels, Places, Text
from engine.models.embedding.places import even_grid
from engine.models.model import VisionLanguageModel
from engine.models.roles import Joint
from engine.objectives import add_heads
from engine.objectives.masked_language import MaskedLanguage
from engine.sections import Distances, ImageInput, JointStack, Model
from engine.weights import bert, layoutlmv2
from engine.weights.pieces import Piece, linear

transformers = pytest.importorskip("transformers")

VOCAB, POSITIONS, LAYERS, CHANNELS, GRID = 50, 60, 2, 256, (7, 7)
SIZES = {"width": 24, "heads": 3, "mlp_width": 40, "eps": 1e-6, "activation": "gelu", "max_positions": POSITIONS}
THEIRS = {
    "hidden_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
COUNT, LONGEST, LAYOUT = len(LENGTHS), max(LENGTHS), layout_of()


def words() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, types and boxes, padded; BERT gives id 0 no gradient."""
    boxes = torch.randint(500, (COUNT, LONGEST, 4)) + torch.tensor([0, 0, 500, 500])
    return torch.randint(1, VOCAB, (COUNT, LONGEST)), torch.randint(2, (COUNT, LONGEST)), boxes


def packed(ids: torch.Tensor, types: torch.Tensor, boxes: torch.Tensor) -> Text:
    shown = visible()
    return Text(ids[shown], LAYOUT, types[shown], boxes[shown].int())


def test_masked_words_of_layoutlm():
    """Ids are corrupted, boxes are not; the mean over masked words is the loss, and its gradients are theirs."""
    with InDouble():
        theirs = redraw(transformers.LayoutLMForMaskedLM(transformers.LayoutLMConfig(**THEIRS)))
        joint = JointStack(**SIZES, layers=LAYERS, norm="post", types=2, page="sum", pooling="first")
        ours = VisionLanguageModel(Model(image=None, text=None, fusion=None, joint=joint), VOCAB)
        objective = MaskedLanguage()
        add_heads(ours, {"masked_language": objective})
        ours.double()
        del theirs.layoutlm.pooler.dense
        pieces = copy_weights(ours, theirs, names_of_masked_layoutlm())
        theirs.layoutlm.pooler.dense = nn.Identity()

        ids, types, boxes = words()
        hidden = visible() & (torch.rand(COUNT, LONGEST) < 0.4)
        hidden[0, 2] = True
        corrupted = ids.where(~hidden, torch.full_like(ids, 3))
        labels = ids.where(hidden, torch.full_like(ids, -100))
        expected = theirs(
            corrupted, bbox=boxes, attention_mask=visible().long(), token_type_ids=types, labels=labels
        ).loss
        text = packed(ids, types, boxes)
        samples, offsets = hidden.nonzero().unbind(1)
        view = MaskedWords(corrupted[visible()], Places(samples, offsets), ids[hidden])
        batch = Batch(
            layout=vk.SegmentLayout([[n, 0] for n in LENGTHS]),
            text=text,
            image=None,
            labels=torch.arange(COUNT),
            sample_ids=torch.arange(COUNT, dtype=torch.int32),
            views={"masked_language": view},
            counts={"pairs": COUNT, "masked_language": len(view)},
        )
        loss = objective(ours, batch)[0]["masked_language"]
        torch.testing.assert_close(loss, expected, **TOLERANCE)
        loss.backward()
        expected.backward()
    wanted, own = ({n: p.grad for n, p in model.named_parameters()} for model in (theirs, ours))
    for piece in pieces:
        found = piece.read(wanted)
        assert found.abs().max() > 1e-8, piece
        torch.testing.assert_close(own[piece.ours], found, **TOLERANCE)


def names_of_masked_layoutlm():
    parts = itertools.chain(bert.embedder("joint.text", page=True), bert.stack("joint.transformer", LAYERS))
    for piece in parts:
        yield piece._replace(theirs=tuple(f"layoutlm.{name}" for name in piece.theirs))
    yield from linear("heads.masked_language.transform", "cls.predictions.transform.dense")
    yield from linear("heads.masked_language.norm", "cls.predictions.transform.LayerNorm")
    yield Piece("heads.masked_language.bias", ("cls.predictions.bias",))


@pytest.fixture
def public(monkeypatch):
    """Their module, without the backbone."""
    return layoutlmv2_without_detectron2(monkeypatch, MapAsItIs)


def layoutlmv2_config(picture_type: bool = False) -> transformers.LayoutLMv2Config:
    return transformers.LayoutLMv2Config(
        **THEIRS,
        image_feature_pool_shape=[*GRID, CHANNELS],
        coordinate_size=4,
        shape_size=4,
        has_visual_segment_embedding=picture_type,
        rel_pos_bins=8,
        max_rel_pos=20,
        rel_2d_pos_bins=16,
        max_rel_2d_pos=256,
    )


@pytest.mark.parametrize("picture_type", [False, True], ids=["LayoutLMv2", "LayoutXLM"])
def test_words_and_cells_are_layoutlmv2s(picture_type, public):
    config = layoutlmv2_config(picture_type)
    image = ImageInput(
        kind="grid", backbone="resnet18_fpn", max_grid=GRID, positions="text", type_of_text=2 if picture_type else None
    )
    stack = JointStack(
        **SIZES, layers=LAYERS, norm="post", biases="no_key", types=2 + picture_type, page="concat", image=image,
        relative_position=Distances(8, 20), relative_box=Distances(16, 256),
    )  # fmt: skip
    with InDouble():
        theirs = public.LayoutLMv2Model(config)
        if picture_type:
            theirs.visual_segment_embedding = nn.Parameter(torch.empty(24))
        redraw(theirs)
        ours = Joint(stack, VOCAB, itertools.count(), "auto").double()
        ours.image.backbone = nn.Identity()
        pieces = copy_weights(ours, theirs, layoutlmv2.joint(LAYERS, picture_type=picture_type))
        ids, types, boxes = words()
        pixels = torch.randn(COUNT, CHANNELS, 14, 14, dtype=torch.float64)
        with gradients_everywhere():
            read = theirs(ids, boxes, pixels, attention_mask=visible().long(), token_type_ids=types)
        states = read.last_hidden_state
        expected = torch.cat((states[:, :LONGEST][visible()], states[:, LONGEST:].flatten(0, 1), read.pooler_output))

        images = vk.SegmentLayout([[GRID[0] * GRID[1]]] * COUNT)
        cells = Pixels(pixels, even_grid(COUNT, GRID, pixels.device))
        layout = ours.layout_of(LAYOUT, LAYOUT, images)
        tokens = ours(packed(ids, types, boxes), cells, layout, None, image_layout=images)
        parts = [vk.take_segments(tokens.hidden, tokens.layout, (segment,)) for segment in (0, 1)]
        compare(ours, theirs, pieces, torch.cat((*parts, ours.pooled(tokens))), expected)
