"""Embedders by hand: what is summed, normed and joined; what a picture takes from the text; dropout."""

import itertools

import pytest
import torch
import vlkernels as vk
from torch import nn
from torch.nn import functional as F

from engine.batch import Patches, Regions
from engine.models.embedding import LearnedEmbedder, RowMaker, Rows, TextEmbedder, make_image_embedder
from engine.models.embedding.sinusoids import grid_sinusoids, sinusoids
from engine.sections.inputs import ImageInput, TextInput

WIDTH, VOCAB, EPS = 24, 30, 1e-6
TEXT_LENGTHS, IMAGE_LENGTHS = [4, 1, 6], [6, 2, 3]
TEXT, IMAGE = (vk.SegmentLayout([[n] for n in lengths]) for lengths in (TEXT_LENGTHS, IMAGE_LENGTHS))


def redrawn(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.double()


def text_embedder(**options) -> TextEmbedder:
    return redrawn(TextEmbedder(TextInput(max_positions=8, **options), WIDTH, EPS, VOCAB, "auto"))


def image_embedder(**options):
    options = {"patch_size": 2, "max_grid": (2, 3)} | options
    return redrawn(make_image_embedder(ImageInput(**options), WIDTH, EPS, "auto", feature_values=10))


def made(parts: list[Rows], layout: vk.SegmentLayout) -> torch.Tensor:
    return RowMaker(0.0, len(parts), itertools.count(), "auto")(lambda: parts, layout, None)


def norm(x: torch.Tensor, module: nn.LayerNorm) -> torch.Tensor:
    return F.layer_norm(x, (WIDTH,), module.weight, module.bias, module.eps)


def patches() -> Patches:
    positions = torch.cat([torch.cartesian_prod(torch.arange(2), torch.arange(3))[:n] for n in IMAGE_LENGTHS])
    return Patches(torch.randn(len(positions), 12), positions.int())


def regions() -> Regions:
    return Regions(torch.randn(IMAGE.num_tokens, 10), torch.rand(IMAGE.num_tokens, 7))


IDS = torch.randint(VOCAB, (TEXT.num_tokens,))
TYPES = torch.randint(2, (TEXT.num_tokens,))
BOXES = torch.randint(500, (TEXT.num_tokens, 4)) + torch.tensor([0, 0, 500, 500])
POSITION = TEXT.token_position().long()


# ---- text


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("normed", [True, False])
def test_words_positions_and_types(offset, normed):
    embedder = text_embedder(position_offset=offset, types=2, embedding_norm=normed)
    expected = embedder.words[IDS] + embedder.positions[POSITION + offset] + embedder.types[TYPES]
    if normed:
        expected = norm(expected, embedder.norm)
    torch.testing.assert_close(made([embedder.rows(IDS, TEXT, TYPES)], TEXT), expected)
    assert embedder.positions.shape[0] == 8 + offset
    zeros = made([embedder.rows(IDS, TEXT, torch.zeros_like(TYPES))], TEXT)
    torch.testing.assert_close(made([embedder.rows(IDS, TEXT)], TEXT), zeros)


def test_positions_of_sines_are_not_learned():
    embedder = text_embedder(positions="sinusoidal", embedding_norm=False)
    assert {name for name, _ in embedder.named_parameters()} == {"words"} and not embedder.state_dict().keys() ^ {"words"}
    torch.testing.assert_close(made([embedder.rows(IDS, TEXT)], TEXT), embedder.words[IDS] + embedder.positions[POSITION])
    assert embedder.positions[5, 0] == pytest.approx(torch.tensor(5.0).sin().item(), abs=1e-6)
    assert embedder.positions[5, 3] == pytest.approx(torch.tensor(5 * 10_000 ** (-2 / WIDTH)).cos().item(), abs=1e-6)


def test_no_positions():
    embedder = text_embedder(positions="none", embedding_norm=False)
    torch.testing.assert_close(made([embedder.rows(IDS, TEXT)], TEXT), embedder.words[IDS])


def test_summed_page():
    embedder, (x0, y0, x1, y1) = text_embedder(page="sum"), BOXES.unbind(1)
    page = embedder.page
    expected = embedder.words[IDS] + embedder.positions[POSITION] + page.x[x0] + page.x[x1] + page.y[y0] + page.y[y1]
    expected = norm(expected + page.heights[y1 - y0] + page.widths[x1 - x0], embedder.norm)
    torch.testing.assert_close(made([embedder.rows(IDS, TEXT, boxes=BOXES.int())], TEXT), expected)


def test_concatenated_page():
    embedder, (x0, y0, x1, y1) = text_embedder(page="concat"), BOXES.unbind(1)
    page = embedder.page
    sides = [page.x[x0], page.y[y0], page.x[x1], page.y[y1], page.heights[y1 - y0], page.widths[x1 - x0]]
    expected = norm(embedder.words[IDS] + embedder.positions[POSITION] + torch.cat(sides, 1), embedder.norm)
    torch.testing.assert_close(made([embedder.rows(IDS, TEXT, boxes=BOXES.int())], TEXT), expected)


def test_tables_of_another_width():
    embedder = text_embedder(embedding_width=6)
    assert embedder.words.shape == (VOCAB, 6) and made([embedder.rows(IDS, TEXT)], TEXT).shape == (TEXT.num_tokens, 6)


# ---- pictures


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("positions", ["factored", "learned", "sinusoidal", "none"])
def test_patches(positions, normed):
    embedder, image = image_embedder(positions=positions, embedding_norm=normed), patches()
    expected = F.linear(image.values.double(), embedder.projection.weight, embedder.projection.bias)
    row, column = image.positions.long().unbind(1)
    if positions == "factored":
        expected = expected + embedder.places.rows[row] + embedder.places.columns[column]
    elif positions != "none":
        expected = expected + embedder.places.table[row * 3 + column]
    if normed:
        expected = norm(expected, embedder.norm)
    torch.testing.assert_close(made(embedder.rows(image, IMAGE), IMAGE), expected)
    assert ("places.table" in dict(embedder.named_parameters())) == (positions == "learned")


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "none"])
def test_class_token_comes_first(positions, normed):
    embedder, image = image_embedder(positions=positions, class_token=True, embedding_norm=normed), patches()
    layout = embedder.layout(IMAGE)
    assert layout.lengths.tolist() == [[1, n] for n in IMAGE_LENGTHS] and embedder.segments == 2
    own = F.linear(image.values.double(), embedder.projection.weight, embedder.projection.bias)
    token = embedder.class_token
    if positions != "none":
        places = embedder.places.table
        row, column = image.positions.long().unbind(1)
        own, token = own + places[row * 3 + column + 1], token + places[:1]
    expected = torch.cat([torch.cat((token, rows)) for rows in own.split(IMAGE_LENGTHS)])
    if normed:
        expected = norm(expected, embedder.norm)
    torch.testing.assert_close(made(embedder.rows(image, IMAGE), layout), expected)


def test_two_dimensional_sines_tell_columns_then_rows():
    waves = grid_sinusoids(2, 3, 8)
    torch.testing.assert_close(waves[5, :4], sinusoids(torch.tensor([2]), 4, interleaved=False)[0])
    torch.testing.assert_close(waves[5, 4:], sinusoids(torch.tensor([1]), 4, interleaved=False)[0])
    assert waves[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("hidden", [None, torch.tensor([1, 4, 9])])
def test_uniters_regions(hidden):
    embedder, text, image = image_embedder(kind="regions", type_of_text=1), text_embedder(types=2), regions()
    features = image.features.double()
    if hidden is not None:
        features[hidden] = embedder.mask_row
    features = norm(embedder.feature_projection(features), embedder.feature_norm)
    boxes = norm(embedder.box_projection(image.boxes.double()), embedder.box_norm)
    expected = norm(features + boxes + text.types[1], embedder.norm)
    torch.testing.assert_close(made(embedder.rows(image, IMAGE, text, hidden), IMAGE), expected)


def test_vilberts_regions():
    embedder, image = image_embedder(kind="regions", box_values=5), regions()
    boxes = embedder.box_projection(image.boxes[:, [0, 1, 2, 3, 6]].double())
    expected = norm(embedder.feature_projection(image.features.double()) + boxes, embedder.norm)
    torch.testing.assert_close(made(embedder.rows(image, IMAGE), IMAGE), expected)


# ---- several segments


@pytest.mark.parametrize("page", [None, "concat"])
def test_cells_have_the_texts_positions(page):
    """LayoutLMv2's picture: the text's position table, and its page tables for an even grid of boxes."""
    embedder, text = image_embedder(positions="text"), text_embedder(page=page)
    image = Patches(torch.randn(12, 12), torch.cartesian_prod(torch.arange(2), torch.arange(3)).repeat(2, 1).int())
    layout = vk.SegmentLayout([[6], [6]])
    expected = embedder.projection(image.values.double()) + text.positions[torch.arange(6).repeat(2)]
    if page is not None:
        x, y = (0, 333, 666, 1000), (0, 500, 1000)
        boxes = torch.tensor([[x[c], y[r], x[c + 1], y[r + 1]] for r in range(2) for c in range(3)] * 2)
        expected = expected + text.page(boxes.int())
    torch.testing.assert_close(made(embedder.rows(image, layout, text), layout), norm(expected, embedder.norm))


@pytest.mark.parametrize("normed", [(True, True), (True, False), (False, False)])
def test_segments_are_embedded_side_by_side(normed):
    """Alone or together, with norms or without: the same rows; queries come first here."""
    text, image = text_embedder(embedding_norm=normed[0]), image_embedder(embedding_norm=normed[1])
    queries, batch = redrawn(LearnedEmbedder(3, WIDTH)), patches()
    parts = [queries.rows(TEXT, text.norm), text.rows(IDS, TEXT), *image.rows(batch, IMAGE)]
    layout = vk.SegmentLayout.joined((3, TEXT, IMAGE))
    alone = made([queries.rows(TEXT, text.norm)], layout.select((0,))), made(parts[1:2], TEXT), made(parts[2:], IMAGE)
    expected = vk.put_segments(alone, layout, ((0,), (1,), (2,)))
    torch.testing.assert_close(made(parts, layout), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made(parts, layout)[:3], alone[0][:3], rtol=1e-12, atol=1e-12)


def test_an_offset_is_added_behind_the_norm():
    text = text_embedder()
    part, kind = text.rows(IDS, TEXT), torch.randn(WIDTH, dtype=torch.float64)
    shifted = Rows(part.tables, part.ids, part.dense, part.norm, kind)
    torch.testing.assert_close(made([shifted], TEXT), made([part], TEXT) + kind)
    layout = vk.SegmentLayout.joined((TEXT, TEXT))
    expected = vk.put_segments((made([shifted], TEXT), made([part], TEXT)), layout, ((0,), (1,)))
    torch.testing.assert_close(made([shifted, part], layout), expected)


# ---- dropout


@pytest.mark.parametrize("normed", [True, False])
def test_dropout_belongs_to_the_sample_and_to_the_segment(normed):
    text = text_embedder(embedding_norm=normed).float()
    maker = RowMaker(0.5, 2, itertools.count(), "auto")
    rng, layout = vk.Rng(1), vk.SegmentLayout.joined((TEXT, TEXT))

    def rows(layout: vk.SegmentLayout) -> torch.Tensor:
        part = text.rows(IDS, TEXT)
        return maker(lambda: [part, part], layout, rng)

    first = rows(layout)
    assert torch.equal(first, rows(layout))
    ours, theirs = vk.take_segments(first, layout, ((0,), (1,)))
    assert 0.3 < (ours == 0).float().mean() < 0.7 and ((ours == 0) != (theirs == 0)).any()
    other = vk.SegmentLayout.joined((TEXT.with_sample_ids(TEXT.sample_ids + 7), TEXT))
    assert ((rows(other) == 0) != (first == 0)).any()
    maker.eval()
    kept = first != 0
    torch.testing.assert_close(first[kept], 2 * rows(layout)[kept])


# ---- mistakes


@pytest.mark.parametrize(
    "options, message",
    [
        (TextInput(max_positions=0), "model.text.max_positions must be positive, got 0"),
        (TextInput(page="concat", embedding_width=9), "heights and widths: the width must be even, got 9"),
        (TextInput(positions="sinusoidal", embedding_width=9), "the width must be even, got 9"),
        (ImageInput(max_grid=(0, 3)), r"model.text.max_grid must be positive, got \[0, 3\]"),
        (ImageInput(class_token=True), "positions must be learned, sinusoidal or none, got factored"),
        (ImageInput(positions="sinusoidal"), "a multiple of 4, got 18"),
    ],
)
def test_mistakes_get_one_clear_line(options, message):
    with pytest.raises(ValueError, match=message):
        options.check_input("model.text", 18)

