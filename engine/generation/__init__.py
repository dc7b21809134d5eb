"""Decoding on packed states: prompts of any lengths, one pass over them, then one token per sample and pass."""

from engine.generation.beams import beam_search
from engine.generation.decoding import Decoder, NewTokens
from engine.generation.sampling import Generated, Nucleus, generate, greedy

__all__ = ["Decoder", "Generated", "NewTokens", "Nucleus", "beam_search", "generate", "greedy"]
