"""The packed transformer: pre- or post-norm, any mask table, relative bias, cross-attention, shared layers, feed-forward
networks per segment.

Tokens are one packed `[num_tokens, D]` tensor without padding. Every sub-layer leaves its output bias, the dropout, the
residual sum and the norm that follows to one fused call.
"""

from engine.models.transformer.attention import CrossAttention, SelfAttention
from engine.models.transformer.block import Block, ReadingBlock
from engine.models.transformer.cache import Extension, KeyValueCache
from engine.models.transformer.feed_forward import ACTIVATIONS, FeedForward
from engine.models.transformer.maps import Linear, norm_of
from engine.models.transformer.stack import Blocks, PackedTransformer
from engine.models.transformer.tokens import Context, SelectedRows, Source, Tokens

__all__ = [
    "ACTIVATIONS",
    "Block",
    "Blocks",
    "Context",
    "CrossAttention",
    "Extension",
    "FeedForward",
    "KeyValueCache",
    "Linear",
    "PackedTransformer",
    "ReadingBlock",
    "SelectedRows",
    "SelfAttention",
    "Source",
    "Tokens",
    "norm_of",
]
