"""Small random models of `transformers` that generate, and ours with their weights."""

import itertools

import torch
import transformers
import vlkernels as vk
from torch import nn

from engine.generation import Decoder
from engine.models.transformer import PackedTransformer, Source, Tokens
from engine.sections import Distances, Stack
from engine.weights import bart, gpt2, t5

WIDTH, LAYERS, HEADS, INNER, VOCAB = 32, 2, 4, 48, 14
PAD, END, START = 0, 1, 2
SIZES = {"width": WIDTH, "layers": LAYERS, "heads": HEADS, "mlp_width": INNER, "eps": 1e-6}
TOKENS = {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": START}


def redrawn(model: nn.Module, seed: int) -> nn.Module:
    """Every parameter drawn, so that what is read decides what comes next, and the end token often does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(drawn * 0.1 + name.endswith("weight"))
            else:
                parameter.copy_(drawn * (1.0 if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding) else 0.3))
        model.lm_head.weight[END] *= 1.5
    return model.eval()


def filled(ours: PackedTransformer, theirs: nn.Module, pieces) -> PackedTransformer:
    parameters = {f"ours.{name}": parameter for name, parameter in ours.named_parameters()}
    saved = {f"theirs.{name}": parameter for name, parameter in theirs.named_parameters()}
    pieces = list(pieces)
    assert {piece.ours for piece in pieces} == set(parameters)
    with torch.no_grad():
        for piece in pieces:
            parameters[piece.ours].copy_(piece.read(saved))
    return ours.eval()


def gpt2_model(seed: int = 0) -> tuple[nn.Module, Decoder]:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=INNER,
        layer_norm_epsilon=1e-6, tie_word_embeddings=False, **TOKENS,
    )  # fmt: skip
    theirs = redrawn(transformers.GPT2LMHeadModel(config), seed)
    stack = PackedTransformer(Stack(**SIZES, norm="pre", activation="gelu_tanh"), itertools.count())
    body = theirs.transformer
    return theirs, Decoder(
        filled(stack, body, gpt2.stack("ours", "theirs", LAYERS)),
        embed=lambda new: body.wte(new.ids) + body.wpe(new.in_sample.long()),
        logits=theirs.lm_head,
    )


def t5_model(seed: int = 32) -> tuple[nn.Module, Decoder, PackedTransformer]:
    """Theirs, our decoder and our encoder."""
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=INNER, num_layers=LAYERS, num_heads=HEADS,
        relative_attention_num_buckets=8, relative_attention_max_distance=6, decoder_start_token_id=PAD,
        pad_token_id=PAD, eos_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = redrawn(transformers.T5ForConditionalGeneration(config), seed)
    options = {"norm": "pre", "norm_kind": "rms", "biases": "none", "activation": "relu", "softmax_scale": 1.0}
    built = []
    for decoder in (False, True):
        stack = Stack(**SIZES, **options, relative_position=Distances(8, 6, bidirectional=not decoder))
        made = PackedTransformer(stack, itertools.count(), source_width=WIDTH if decoder else None)
        part = theirs.decoder if decoder else theirs.encoder
        built.append(filled(made, part, t5.stack("ours", "theirs", LAYERS, decoder=decoder, gated=False)))
    scale = WIDTH**-0.5 if theirs.config.scale_decoder_outputs else 1.0
    decoder = Decoder(built[1], lambda new: theirs.shared(new.ids), lambda hidden: theirs.lm_head(hidden * scale))
    return theirs, decoder, built[0]


def bart_model(seed: int = 9) -> tuple[nn.Module, Decoder, PackedTransformer]:
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, max_position_embeddings=64,
        decoder_start_token_id=START, forced_eos_token_id=None, tie_word_embeddings=False, **TOKENS,
    )  # fmt: skip
    theirs = redrawn(transformers.BartForConditionalGeneration(config), seed)
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    built = []
    for part, source_width in ((theirs.model.encoder, None), (theirs.model.decoder, WIDTH)):
        stack = PackedTransformer(
            Stack(**SIZES, norm="post", activation="gelu"), itertools.count(), source_width=source_width
        )
        names = bart.stack("ours", "theirs", LAYERS, decoder=source_width is not None)
        built.append(filled(stack, part, names))
    head = nn.Linear(WIDTH, VOCAB)
    head.weight, head.bias = theirs.lm_head.weight, nn.Parameter(theirs.final_logits_bias[0])
    return theirs, Decoder(built[1], lambda new: bart_rows(theirs.model.decoder, new.ids, new.in_sample), head), built[0]


def bart_rows(part: nn.Module, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """BART's embeddings, whose positions begin in row 2 of their table."""
    position = nn.functional.embedding(positions.long() + 2, part.embed_positions.weight)
    return part.layernorm_embedding(part.embed_tokens(ids) + position)


def encoded(encoder: PackedTransformer, decoder: Decoder, hidden: torch.Tensor, layout: vk.SegmentLayout) -> Source:
    with torch.no_grad():
        states = encoder(Tokens(hidden, layout)).hidden
        return Source(decoder.stack.project_source(states), layout)
