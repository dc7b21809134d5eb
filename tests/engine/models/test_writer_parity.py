"""Systems that write, as their recipes describe them, against `transformers`: ids in, loss and all gradients out, with
every parameter redrawn and ragged texts, in float64."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from stack_parity import TOLERANCE, InDouble, copy_weights, redraw
from torch import Tensor, nn

from engine.batch import Batch, Sample, Words
from engine.build import build_model
from engine.config import Config
from engine.data import collate
from engine.data.plan.order import generator
from engine.models import VisionLanguageModel
from engine.objectives.denoising import BEGUN, READ
from engine.objectives.parts.objective import Draw
from engine.recipes import table
from engine.weights import bart, gpt2, t5
from engine.weights.pieces import Piece

transformers = pytest.importorskip("transformers")

WIDTH, LAYERS, HEADS, INNER, POSITIONS, VOCAB = 24, 2, 3, 96, 32, 50
IGNORED = -100
LOUDER = 1e3
"""Gradients behind a saturated softmax are small beside the absolute tolerance."""
LENGTHS = (14, 5, 23, 9)


@dataclasses.dataclass
class Tokens:
    """What objectives read of a tokenizer."""

    cls_id: int = 2
    sep_id: int = 3
    mask_id: int = 4
    full_stop_id: int = 5
    vocab_size: int = VOCAB
    sentinel_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.arange(40, VOCAB))


def small(name: str, *more: str) -> Config:
    """The recipe with another size and without dropout, else as it is."""
    sizes = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "mlp_width": INNER, "max_positions": POSITIONS}
    off = sizes | {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    roles = table.recipe(name).model.roles
    changes = [f"--model.{role}.{option}={value}" for role in roles for option, value in off.items()]
    return table.recipe(name, *changes, f"--data.max_caption_tokens={POSITIONS}", *more)


def batch_of(config: Config) -> Batch:
    """Random texts, as the recipe's objectives prepare them."""
    samples = []
    for number, length in enumerate(LENGTHS):
        inner = torch.randint(5, 40, (length,)).numpy()
        words = np.concatenate(([-1], np.arange(length), [-1]))
        samples.append(Sample(Words(np.concatenate(([2], inner, [3])), words), None, number))
        for objective in config.objectives.active.values():
            objective.prepare(samples[-1], Draw(Tokens(), functools.partial(generator, number, 0, 0, 1)))
    return collate(samples, range(len(samples)))


def padded(ids: Tensor, lengths: Tensor, filling: int = 0) -> Tensor:
    """`[B, L]` of a packed `[T]`."""
    return nn.utils.rnn.pad_sequence(ids.split(lengths.tolist()), batch_first=True, padding_value=filling)


def of_text(batch: Batch) -> dict[str, Tensor]:
    """As a causal model of theirs is called."""
    lengths = batch.text.layout.lengths[:, 0]
    labels = padded(batch.text.ids, lengths, IGNORED)
    return {"input_ids": labels.clamp(min=0), "attention_mask": (labels >= 0).long(), "labels": labels}


def of_encoder_and_decoder(batch: Batch) -> dict[str, Tensor]:
    """As an encoder with a decoder is called."""
    read, begun = batch.views[READ], batch.views[BEGUN]
    lengths = begun.layout.lengths[:, 0]
    ids = padded(read.ids, read.layout.lengths[:, 0], IGNORED)
    return {
        "input_ids": ids.clamp(min=0),
        "attention_mask": (ids >= 0).long(),
        "decoder_input_ids": padded(begun.ids, lengths),
        "labels": padded(batch.views["denoising"].targets, lengths, IGNORED),
    }


def gpt_pieces(pre_norm: bool) -> Iterator[Piece]:
    yield from gpt2.embedder("text.embedder", "transformer", pre_norm=pre_norm)
    yield from gpt2.stack("text.transformer", "transformer", LAYERS, pre_norm=pre_norm)


def t5_pieces(gated: bool = False) -> Iterator[Piece]:
    yield Piece("text.embedder.words", ("shared.weight",))
    for ours, theirs in (("text", "encoder"), ("decoder", "decoder")):
        yield from t5.stack(f"{ours}.transformer", theirs, LAYERS, decoder=ours == "decoder", gated=gated)


def bart_pieces() -> Iterator[Piece]:
    yield Piece("text.embedder.words", ("model.shared.weight",))
    for ours, theirs in (("text", "model.encoder"), ("decoder", "model.decoder")):
        yield from bart.embedder(f"{ours}.embedder", theirs)
        yield from bart.stack(f"{ours}.transformer", theirs, LAYERS, decoder=ours == "decoder")


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT = NO_DROPOUT | {"vocab_size": VOCAB, "n_positions": POSITIONS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
T5 = {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": INNER, "num_layers": LAYERS, "num_heads": HEADS}
BART = {"vocab_size": VOCAB, "d_model": WIDTH, "max_position_embeddings": POSITIONS, "dropout": 0.0, "use_cache": False}
BART |= {f"{part}_{name}": value for part in ("encoder", "decoder")
         for name, value in (("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", INNER))}  # fmt: skip
T5 |= {"dropout_rate": 0.0, "use_cache": False}
SYSTEMS: dict[str, tuple[str, dict, Callable, Callable]] = {
    "gpt2": ("GPT2LMHeadModel", GPT | {"n_inner": INNER}, functools.partial(gpt_pieces, pre_norm=True), of_text),
    "gpt": ("OpenAIGPTLMHeadModel", GPT, functools.partial(gpt_pieces, pre_norm=False), of_text),
    "bart_base": ("BartForConditionalGeneration", BART, bart_pieces, of_encoder_and_decoder),
    "t5_base": ("T5ForConditionalGeneration", T5, t5_pieces, of_encoder_and_decoder),
}


def compare(ours: VisionLanguageModel, theirs: nn.Module, pieces: list[Piece], config: Config, call: Callable) -> None:
    """Losses and the gradients of all parameters."""
    batch = batch_of(config)
    ((name, objective),) = config.objectives.active.items()
    losses, _ = objective(ours, batch)
    with InDouble():
        expected = theirs(**call(batch)).loss
    torch.testing.assert_close(losses[name], expected, **TOLERANCE)
    (LOUDER * losses[name]).backward()
    (LOUDER * expected).backward()
    parameters = dict(ours.named_parameters())
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for piece in pieces:
        wanted = piece.read(gradients)
        assert wanted.abs().max() > 1e-6, piece
        torch.testing.assert_close(parameters[piece.ours].grad, wanted, **TOLERANCE, msg=lambda m, p=piece: f"{p.ours}: {m}")


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_recipe_is_the_public_model(name):
    public, options, pieces, call = SYSTEMS[name]
    config = small(name)
    ours = build_model(config, VOCAB).double()
    theirs = redraw(getattr(transformers, public)(getattr(transformers, public).config_class(**options)))
    compare(ours, theirs, copy_weights(ours, theirs, pieces()), config, call)


def test_t5_1_1_has_a_table_of_its_own_to_write_with():
    """And gated networks; its states are not scaled."""
    gates = [f"--model.{role}.{option}" for role in ("text", "decoder") for option in ("gated=true", "activation=gelu_tanh")]
    config = small("t5_base", *gates, "--objectives.denoising.output=own")
    ours = build_model(config, VOCAB).double()
    published = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5 | published))
    theirs.lm_head.weight = nn.Parameter(torch.empty(VOCAB, WIDTH))  # they tie it, and let a folder undo that
    redraw(theirs)
    pieces = [*t5_pieces(gated=True), Piece("heads.denoising.words", ("lm_head.weight",))]
    compare(ours, theirs, copy_weights(ours, theirs, pieces), config, of_encoder_and_decoder)
    states = torch.randn(3, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(ours.heads["denoising"].logits(states, ours.words_of("decoder")), theirs.lm_head(states))
