"""impl "triton" of the transport distance where there is no card: who is chosen for a card's tensors, tiles, one graph."""

import pytest
import torch

import vlkernels as vk
from vlkernels.core import dispatch, triton_runtime
from vlkernels.ops.optimal_transport.gpu import tile_sizes
from vlkernels.testing.arguments import map_tensors


@pytest.fixture
def card(monkeypatch):
    """Dispatch believes that Triton has a card; meta tensors stand for the card's."""
    monkeypatch.setattr(triton_runtime, "_missing_on_a_card", lambda: None)


def call(images=9, texts=4, dtype=torch.float32, **options):
    layouts = {"image_layout": vk.SegmentLayout([[images]]), "text_layout": vk.SegmentLayout([[texts]])}
    tokens = {"image_tokens": torch.empty(images, 8, dtype=dtype), "text_tokens": torch.empty(texts, 8, dtype=dtype)}
    arguments = map_tensors(tokens | layouts, lambda t: torch.empty_like(t, device="meta"))
    return vk.optimal_transport(**arguments, **options)


@pytest.mark.parametrize(
    "change, expected",
    [({}, "triton"), ({"dtype": torch.float16}, "triton"), ({"images": 1024, "texts": 3000}, "triton"),
     ({"dtype": torch.float64}, "reference"), ({"images": 1025}, "reference")],
)  # fmt: skip
def test_auto_takes_triton_on_a_card_where_it_serves(card, change, expected):
    with dispatch.recorded() as served:
        call(**change)
    assert served == [("optimal_transport", expected)]


def test_what_is_not_served_is_said(card):
    with pytest.raises(ValueError, match="serves samples of up to 1024 image tokens, the longest may have 1025"):
        call(images=1025, impl="triton")
    with pytest.raises(ValueError, match="it computes in float32, the tokens are float64"):
        call(dtype=torch.float64, impl="triton")


def test_tiles_hold_the_longest_samples():
    """A resident tile holds a sample; a streamed one all its images. Lengths between powers of two compile nothing new."""
    for architecture in (80, 86, 90, 100):
        tiles = set()
        for texts in range(1, 257, 5):
            for images in range(1, 1025, 9):
                tile = tile_sizes.plan_tile(texts, images, torch.bfloat16, architecture)
                tiles.add(tile)
                assert tile.images >= images and tile.texts * tile.images <= max(tile_sizes.MOST_RESIDENT, 16 * tile.images)
                assert tile.texts >= texts or not tile_sizes.is_resident(texts, images)
                assert tile.warps * 32 * 32 >= tile.texts * tile.images
        assert len(tiles) < 30
