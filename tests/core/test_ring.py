"""The order of a ring's hops: what is under way while a block is in use, and what is waited for when."""

import pytest
import torch

from vlkernels.core import exchange
from vlkernels.core.collectives import Rows
from vlkernels.core.exchange import Block, Travelling, make_side, meetings


@pytest.fixture
def journal(monkeypatch):
    """Of a rank among three whose neighbours send zeros: (event, shapes sent, shapes received) and what was done between."""
    written = []

    class Flight:
        def wait(self):
            written.append("arrived")

    def send_around(sent, received, rows):
        written.append(("under way", [list(t.shape) for t in sent], [list(t.shape) for t in received]))
        for tensor in received:
            tensor.zero_()
        return [Flight()]

    monkeypatch.setattr(exchange, "send_around", send_around)
    return written


ROWS = Rows((2, 3, 4), rank=1, group="a group")


def test_the_next_block_is_under_way_while_one_is_in_use(journal):
    for block in Travelling(torch.ones(3, 5), ROWS).blocks():
        journal.append((block.ranks.start, block.start))
    assert journal == [
        ("under way", [[3, 5]], [[2, 5]]), (1, 2), "arrived",
        ("under way", [[2, 5]], [[4, 5]]), (0, 0), "arrived",
        ("under way", [], []), (2, 5), "arrived",
    ]  # fmt: skip


def test_gradients_follow_one_hop_behind_and_come_home(journal):
    home = torch.zeros(3, 5)
    for block, toward in Travelling(torch.ones(3, 5), ROWS).travel(home):
        journal.append(block.ranks.start)
        toward += 1
    assert journal == [
        ("under way", [[3, 5]], [[2, 5]]), 1, "arrived",
        ("under way", [[2, 5]], [[4, 5]]), 0, "arrived",
        ("under way", [[2, 5]], [[4, 5]]), 2, "arrived",
        ("under way", [[4, 5]], [[3, 5]]), "arrived",
    ]  # fmt: skip
    assert torch.equal(home, torch.ones(3, 5))


def test_gradients_are_wide_and_blocks_are_not(journal):
    home = torch.zeros(3, 5)
    for block, toward in Travelling(torch.ones(3, 5, dtype=torch.bfloat16), ROWS).travel(home):
        assert block.features.dtype == torch.bfloat16 and toward.dtype == torch.float32


@pytest.mark.parametrize("way", exchange.EXCHANGES)
def test_one_process_meets_itself_once(way):
    images, texts = (make_side(way, torch.randn(4, 3), Rows((4,))) for _ in range(2))
    ((image_block, text_block),) = meetings(images, texts)
    assert image_block is images.own and text_block.span == slice(0, 4)


def test_parts_of_a_block_know_their_place():
    block = Block(torch.arange(10.0).view(5, 2), 7)
    parts = block.cut(2)
    assert [part.span for part in parts] == [slice(7, 9), slice(9, 11), slice(11, 12)]
    assert all(torch.equal(block.features[block.within(part)], part.features) for part in parts)
