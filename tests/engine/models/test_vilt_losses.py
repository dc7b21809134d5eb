"""ViLT's two heads and their losses against `transformers`, every parameter redrawn; float64."""

import dataclasses

import pytest
import torch
import vlkernels as vk
from stack_parity import LENGTHS, InDouble, compare, copy_weights, layout_of, redraw, visible
from torch import nn
from torch.nn import functional as F

from engine.batch import Batch, MaskedWords, Patches, Places, Text
from engine.models.embedding.places import even_grid
from engine.models.model import VisionLanguageModel
from engine.objectives import add_heads
from engine.objectives.masked_language import MaskedLanguage
from engine.objectives.random_matching import WORDS, RandomMatching, transport_distance
from engine.sections import ImageInput, JointStack, Model
from engine.weights import vilt
from engine.weights.pieces import Piece, linear

transformers = pytest.importorskip("transformers")

VOCAB, PATCH, SIDE, WIDTH = 50, 4, 3, 24
THEIRS = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
          "layer_norm_eps": 1e-6, "vocab_size": VOCAB, "max_position_embeddings": 16, "image_size": SIDE * PATCH,
          "patch_size": PATCH, "max_image_length": -1, "hidden_dropout_prob": 0.0,
          "attention_probs_dropout_prob": 0.0}  # fmt: skip
IMAGE = ImageInput(patch_size=PATCH, max_grid=(SIDE, SIDE), positions="learned", class_token=True, embedding_norm=False)
JOINT = JointStack(width=WIDTH, layers=2, heads=3, mlp_width=40, eps=1e-6, activation="gelu", max_positions=16, types=2,
                   kinds=True, image=IMAGE)  # fmt: skip
COUNT = len(LENGTHS)


class Theirs(nn.Module):
    """Their model for masked words, and the two-way map that the release has beside it."""

    def __init__(self):
        super().__init__()
        self.words = transformers.ViltForMaskedLM(transformers.ViltConfig(**THEIRS))
        self.pair = nn.Linear(WIDTH, 2)


def names():
    """Of every parameter."""
    for piece in vilt.joint(2):
        yield piece._replace(ours=f"joint.{piece.ours}", theirs=tuple(f"words.vilt.{name}" for name in piece.theirs))
    yield from linear("heads.masked_language.transform", "words.mlm_score.transform.dense")
    yield from linear("heads.masked_language.norm", "words.mlm_score.transform.LayerNorm")
    yield Piece("heads.masked_language.bias", ("words.mlm_score.decoder.bias",))
    yield from linear("heads.random_matching", "pair")


def batch_and_theirs() -> tuple[Batch, dict]:
    """Random texts of ragged lengths and square pictures; what theirs is called with."""
    ids, types = torch.randint(1, VOCAB, (COUNT, max(LENGTHS))), torch.randint(2, (COUNT, max(LENGTHS)))
    pixels = torch.randn(COUNT, 3, SIDE * PATCH, SIDE * PATCH, dtype=torch.float64)
    images = vk.SegmentLayout([[SIDE**2]] * COUNT)
    patches = Patches(vk.patchify(pixels, images, PATCH), even_grid(COUNT, (SIDE, SIDE), pixels.device))
    layout = vk.SegmentLayout([[length, SIDE**2] for length in LENGTHS])
    text = Text(ids[visible()], layout_of(), types[visible()])
    batch = Batch(layout, text, patches, torch.arange(COUNT), layout.sample_ids, counts={"pairs": COUNT})
    arguments = {"input_ids": ids, "attention_mask": visible().long(), "token_type_ids": types, "pixel_values": pixels}
    return batch, arguments


def built() -> tuple[VisionLanguageModel, dict]:
    objectives = {"masked_language": MaskedLanguage(), "random_matching": RandomMatching(alignment=0.1, aligned="words")}
    model = VisionLanguageModel(Model(image=None, text=None, fusion=None, joint=JOINT), VOCAB).eval()
    add_heads(model, objectives)
    return model.double(), objectives


def test_masked_words_and_pairs_are_told_as_theirs():
    with InDouble():
        theirs, (ours, objectives) = redraw(Theirs()), built()
        pieces = copy_weights(ours, theirs, names())
        batch, arguments = batch_and_theirs()
        samples, offsets = torch.tensor([0, 0, 2, 3]), torch.tensor([1, 3, 7, 2])
        targets, own = torch.tensor([3, 9, 27, 4]), torch.tensor([1, 0, 0, 1])
        batch.views = {"masked_language": MaskedWords(batch.text.ids, Places(samples, offsets), targets), "random_matching": own}
        batch.counts["masked_language"] = 4
        losses = [objectives["masked_language"](ours, batch)[0]["masked_language"]]
        losses.append(dataclasses.replace(objectives["random_matching"], alignment=0.0)(ours, batch)[0]["random_matching"])

        logits = theirs.words(**arguments).logits[samples, offsets]
        pooled = theirs.words.vilt(**arguments).pooler_output
        expected = torch.stack((F.cross_entropy(logits, targets), F.cross_entropy(theirs.pair(pooled), own)))
        compare(ours, theirs, pieces, torch.stack(losses), expected)


def test_words_alone_are_moved_to_patches():
    """[CLS], [SEP] and the picture's class token take no part: as where each sample's rows are cut out by hand."""
    ours, objectives = built()
    batch, _ = batch_and_theirs()
    inner = torch.tensor([place for length in LENGTHS for place in range(1, length - 1)])
    counts = torch.tensor([max(length - 2, 0) for length in LENGTHS])
    batch.views = {"random_matching": torch.tensor([1, 0, 1, 1]), WORDS: Places(torch.repeat_interleave(counts), inner)}
    read = ours.joint_states(batch)
    found = transport_distance(ours, read, batch.views[WORDS])
    for sample, (text, _, image) in enumerate(read.layout.starts.tolist()):
        words = read.hidden[text + 1 : text + 1 + counts[sample]]
        patches = read.hidden[image : image + SIDE**2]
        one = {"image_layout": vk.SegmentLayout([[SIDE**2]]), "text_layout": vk.SegmentLayout([[len(words)]])}
        torch.testing.assert_close(found[sample : sample + 1], vk.optimal_transport(patches, words, **one))
    assert not torch.allclose(found, transport_distance(ours, read, None))
    losses, _ = objectives["random_matching"](ours, batch)
    signed = (found * torch.tensor([1, -1, 1, 1])).sum() / 4
    torch.testing.assert_close(losses["word_region_alignment"], 0.1 * signed)
