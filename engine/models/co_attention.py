"""Two towers that read each other while they advance."""

from __future__ import annotations

from collections.abc import Iterator

import vlkernels as vk
from torch import nn

from engine.models.transformer import Blocks, Context, PackedTransformer, ReadingBlock, Source, Tokens
from engine.sections import CoAttentionStack, Stack


class CoAttention(Blocks):
    """A block in either tower before each of its last layers, in which it reads the other tower (ViLBERT)."""

    def __init__(self, stack: CoAttentionStack, image: Stack, text: Stack, streams: Iterator[int], impl: str):
        super().__init__()

        def blocks(reader: Stack, read: Stack) -> nn.ModuleList:
            sizes = {"inner_width": stack.width, "heads": stack.heads}
            return nn.ModuleList(ReadingBlock(reader, read.width, streams, impl, **sizes) for _ in range(stack.layers))

        self.image, self.text = blocks(image, text), blocks(text, image)

    def forward(
        self, image: Tokens, text: Tokens, towers: tuple[PackedTransformer, PackedTransformer], rng: vk.Rng
    ) -> tuple[Tokens, Tokens]:
        """Both streams before the last layer of their towers, which is for those who read the one or the other."""
        count = len(self.image)
        streams = [tower(tokens, rng=rng, layers=slice(tower.layers - count)) for tower, tokens in zip(towers, (image, text))]
        for left, of_image, of_text in zip(range(count, 0, -1), self.image, self.text, strict=True):
            image, text = streams
            streams = [self._read(of_image, image, text, rng), self._read(of_text, text, image, rng)]
            if left > 1:
                here = slice(-left, 1 - left)
                streams = [tower(tokens, rng=rng, layers=here) for tower, tokens in zip(towers, streams, strict=True)]
        return streams[0], streams[1]

    def _read(self, block: ReadingBlock, reader: Tokens, read: Tokens, rng: vk.Rng) -> Tokens:
        keys_values = block.cross_attention.project(read.hidden)
        source = Source([keys_values], read.layout)
        return Tokens(self._run(block, reader.hidden, Context(reader.layout, rng), (source, keys_values)), reader.layout)
