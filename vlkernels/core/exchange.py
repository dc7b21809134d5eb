"""How the rows of two sides meet over ranks: all gathered, or texts in blocks that travel around a ring of ranks.

Every rank meets its own images with all texts. Gathered, it also meets all images with its own texts, so that it forms the
whole gradient of its rows. In the ring a block of texts is on its way to the next rank while it is in use, and what the
ranks add to its gradient follows one hop behind: a rank holds no more than a few blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlkernels.core.collectives import Rows, gather_rows, send_around

EXCHANGES = ("gather", "ring")


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive rows of one side of the batch of all ranks.

    Args:
        features: [n, D].
        start: the number of the first row in that batch.
        ranks: whose rows they are.
    """

    features: Tensor
    start: int
    ranks: range = range(1)

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + len(self.features))

    def cut(self, size: int) -> list[Block]:
        parts = self.features.split(size)
        return [Block(part, self.start + k * size, self.ranks) for k, part in enumerate(parts)]

    def within(self, part: Block) -> slice:
        """Where the rows of a part lie in this block."""
        return slice(part.start - self.start, part.span.stop - self.start)

    def new_gradient(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros_like(self.features, dtype=dtype, memory_format=torch.contiguous_format)


Meeting = Callable[[Block, Block, Tensor | None, Tensor | None], None]  # images, texts, what to add their gradients to


def check_exchange(exchange: str) -> None:
    if exchange not in EXCHANGES:
        raise ValueError(f'exchange must be "gather" or "ring", got "{exchange}"')


def make_side(exchange: str, own: Tensor, rows: Rows) -> Gathered | Travelling:
    """The images or the texts of all ranks, of which this one holds ``own``."""
    own = own.detach().contiguous()
    return Travelling(own, rows) if exchange == "ring" else Gathered(own, rows)


class Gathered:
    """Rows of all ranks, held by every one."""

    def __init__(self, own: Tensor, rows: Rows):
        everyone = gather_rows(own, rows)

        def block(ranks: range) -> Block:
            span = rows.of(ranks)
            return Block(everyone[span], span.start, ranks)

        rank = rows.rank
        self.own = block(range(rank, rank + 1))
        self.others = [block(range(rank)), block(range(rank + 1, rows.world_size))]

    def blocks(self) -> Iterator[Block]:
        return iter((self.own, *self.others))


class Travelling:
    """Rows that each rank holds its own of, and blocks of the others' as they pass."""

    def __init__(self, own: Tensor, rows: Rows):
        self._rows, self._rank = rows, rows.rank
        self.own = self._block(self._rank, own)

    def blocks(self) -> Iterator[Block]:
        return (block for block, _ in self.travel(None))

    def travel(self, home: Tensor | None) -> Iterator[tuple[Block, Tensor | None]]:
        """This rank's block with ``home``, then those of the ranks before it, each with zeros to add its gradient to.

        In the end ``home`` holds what all ranks added. Without ``home`` no gradients travel.
        """
        world = self._rows.world_size
        held, toward, added = self.own, home, None
        for hop in range(world):
            coming = self._empty(self._rank - hop - 1) if hop + 1 < world else None
            following = None if added is None else torch.empty_like(toward)
            sent = [held.features if coming else None, added]
            flights = self._start(sent, [coming.features if coming else None, following])
            yield held, toward
            _wait(flights)
            if following is not None:
                toward += following
            if home is not None and hop > 0:
                added = toward
            if coming is not None:
                held, toward = coming, None if home is None else coming.new_gradient(home.dtype)
        if added is not None:
            returned = torch.empty_like(home)
            _wait(self._start([added], [returned]))
            home += returned

    def _start(self, sent: list[Tensor | None], received: list[Tensor | None]) -> list[Any]:
        if self._rows.group is None:
            return []
        return send_around(*([t for t in each if t is not None] for each in (sent, received)), self._rows)

    def _block(self, rank: int, features: Tensor) -> Block:
        ranks = range(rank, rank + 1)
        return Block(features, self._rows.of(ranks).start, ranks)

    def _empty(self, rank: int) -> Block:
        rank %= self._rows.world_size
        return self._block(rank, self.own.features.new_empty(self._rows.counts[rank], *self.own.features.shape[1:]))


Side = Gathered | Travelling


def meetings(images: Side, texts: Side) -> Iterator[tuple[Block, Block]]:
    """This rank's images with all texts."""
    return ((images.own, block) for block in texts.blocks() if _both(images.own, block))


def form_gradients(images: Side, texts: Side, dtype: torch.dtype, meet: Meeting) -> tuple[Tensor, Tensor]:
    """Gradients of this rank's images and texts, to which ``meet`` adds what two blocks give; ``None`` is not wanted."""
    toward_image, toward_text = (side.own.new_gradient(dtype) for side in (images, texts))
    for image_block, text_block, of_images, of_texts in _meetings_with_gradients(images, texts, toward_image, toward_text):
        if _both(image_block, text_block):
            meet(image_block, text_block, of_images, of_texts)
    return toward_image, toward_text


def _meetings_with_gradients(
    images: Side, texts: Side, toward_image: Tensor, toward_text: Tensor
) -> Iterator[tuple[Block, Block, Tensor | None, Tensor | None]]:
    if isinstance(texts, Travelling):
        for block, toward_block in texts.travel(toward_text):
            yield images.own, block, toward_image, toward_block
        return
    yield images.own, texts.own, toward_image, toward_text
    for block in texts.others:
        yield images.own, block, toward_image, None
    for block in images.others:
        yield block, texts.own, None, toward_text


def _both(first: Block, second: Block) -> bool:
    return len(first.features) > 0 and len(second.features) > 0


def _wait(flights: list[Any]) -> None:
    for flight in flights:
        flight.wait()
