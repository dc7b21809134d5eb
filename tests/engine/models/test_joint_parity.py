"""The joint stream against `transformers`: ViLT, and BLIP-2's Q-Former. Every parameter redrawn, ragged texts, outputs
and gradients in float64."""

import itertools

import pytest
import torch
import vlkernels as vk
from stack_parity import LENGTHS, InDouble, compare, copy_weights, layout_of, redraw, visible
from torch import nn

from engine.batch import Patches, Text
from engine.models.embedding.places import even_grid
from engine.models.roles import Joint
from engine.models.transformer import Tokens
from engine.sections import ImageInput, JointStack
from engine.weights import q_former, vilt
from engine.weights.pieces import Piece, linear

transformers = pytest.importorskip("transformers")

VOCAB, POSITIONS, PATCH, SIDE, QUERIES, SOURCE_WIDTH = 50, 16, 4, 3, 4, 20
SIZES = {"width": 24, "heads": 3, "mlp_width": 40, "eps": 1e-6, "activation": "gelu", "max_positions": POSITIONS}
THEIRS = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
COUNT, LAYOUT = len(LENGTHS), layout_of()


def joint(stack: JointStack, **widths) -> Joint:
    return Joint(stack, VOCAB, itertools.count(), "auto", **widths).double()


def random_ids() -> torch.Tensor:
    return torch.randint(1, VOCAB, (COUNT, max(LENGTHS)))  # BERT gives id 0 no gradient


def test_words_and_patches_are_vilts():
    theirs = transformers.ViltModel(
        transformers.ViltConfig(**THEIRS, num_hidden_layers=2, image_size=SIDE * PATCH, patch_size=PATCH, max_image_length=-1)
    )
    image = ImageInput(
        patch_size=PATCH, max_grid=(SIDE, SIDE), positions="learned", class_token=True, embedding_norm=False
    )
    with InDouble():
        theirs = redraw(theirs)
        ours = joint(JointStack(**SIZES, layers=2, types=2, kinds=True, image=image))
        pieces = copy_weights(ours, theirs, vilt.joint(2))
        ids, types = random_ids(), torch.randint(2, (COUNT, max(LENGTHS)))
        pixels = torch.randn(COUNT, 3, SIDE * PATCH, SIDE * PATCH, dtype=torch.float64)
        read = theirs(ids, visible().long(), types, pixels)
        # Their patches are shuffled, each with its position: class token and words are where they were.
        text, states = max(LENGTHS), read.last_hidden_state
        expected = torch.cat((states[:, :text][visible()], states[:, text], read.pooler_output))

        images = vk.SegmentLayout([[SIDE**2]] * COUNT)
        patches = Patches(vk.patchify(pixels, images, PATCH), even_grid(COUNT, (SIDE, SIDE), pixels.device))
        layout = ours.layout_of(LAYOUT, LAYOUT, images)
        words = Text(ids[visible()], LAYOUT, types[visible()])
        tokens = ours(words, patches, layout, None, image_layout=images)
        own, token = vk.take_segments(tokens.hidden, tokens.layout, ((0,), (1,)))
        compare(ours, theirs, pieces, torch.cat((own, token, ours.pooled(tokens))), expected)


class QFormer(nn.Module):
    """Theirs, with the tables that its user has to bring."""

    def __init__(self):
        super().__init__()
        config = transformers.Blip2QFormerConfig(
            **THEIRS, num_hidden_layers=3, encoder_hidden_size=SOURCE_WIDTH, cross_attention_frequency=2, use_qformer_text_input=True
        )
        self.model = transformers.Blip2QFormerModel(config)
        self.words, self.positions = nn.Embedding(VOCAB, 24), nn.Embedding(POSITIONS, 24)
        self.queries = nn.Embedding(QUERIES, 24)

    def forward(self, ids: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        text = self.words(ids) + self.positions.weight[: ids.shape[1]]
        queries = self.queries.weight.expand(COUNT, -1, -1)
        seen = torch.cat((torch.ones(COUNT, QUERIES, dtype=torch.bool), visible()), dim=1)
        read = self.model(
            torch.cat((queries, text), dim=1), query_length=QUERIES, attention_mask=seen.long(), encoder_hidden_states=source
        )
        return read.last_hidden_state[seen]

    @staticmethod
    def names():
        yield Piece("queries.learned", ("queries.weight",))
        yield Piece("text.words", ("words.weight",))
        yield Piece("text.positions", ("positions.weight",))
        yield from linear("text.norm", "model.layernorm")
        yield from q_former.stack("transformer", "model.encoder", 3, cross_every=2)


def test_queries_and_words_are_the_q_formers():
    options = {"queries": QUERIES, "source": "image", "cross_every": 2, "own_feed_forward": True, "pooling": "first"}
    with InDouble():
        theirs = redraw(QFormer())
        ours = joint(JointStack(**SIZES, layers=3, norm="post", **options), source_width=SOURCE_WIDTH)
        pieces = copy_weights(ours, theirs, QFormer.names())
        ids, source = random_ids(), torch.randn(COUNT, 5, SOURCE_WIDTH, dtype=torch.float64)
        expected = theirs(ids, source)
        read = ours.source_of(Tokens(source.flatten(0, 1), vk.SegmentLayout([[5]] * COUNT)))
        layout = ours.layout_of(LAYOUT, LAYOUT, None)
        tokens = ours(Text(ids[visible()], LAYOUT), None, layout, None, source=read)
        compare(ours, theirs, pieces, tokens.hidden, expected)
