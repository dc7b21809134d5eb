"""SOHO's grid: pooling and map of the cells, codes, the gated sum, and what stands where a code is hidden."""

import itertools

import pytest
import torch
import vlkernels as vk
from stack_parity import redraw
from torch import nn
from torch.nn import functional as F

from engine.batch import Pixels
from engine.models.embedding import Cells, RowMaker, cells_of_one_code, make_image_embedder
from engine.models.embedding.dictionary import VisualDictionary
from engine.sections import ImageInput, ImageStack

WIDTH, CODES = 8, 5


def test_a_cell_is_mixed_with_its_code_by_a_gate():
    """Against plain PyTorch, gradients too; the codes themselves have none."""
    torch.manual_seed(0)
    ours = VisualDictionary(CODES, WIDTH, "auto").double()
    redraw(ours)
    rows = torch.randn(12, WIDTH, dtype=torch.float64, requires_grad=True)
    again = rows.detach().clone().requires_grad_()

    def normalised(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)

    cells, codes = normalised(again, ours.norm), ours.codebook.codes
    index = torch.cdist(cells, codes).argmin(1)
    mapped = F.linear(cells + (codes[index] - cells).detach(), ours.code_map.weight, ours.code_map.bias)
    shares = normalised(F.linear(torch.cat((mapped, cells), 1), ours.gate.weight), ours.gate_norm).softmax(1)
    expected = shares[:, :1] * mapped + shares[:, 1:] * cells
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    wanted = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()

    found, chosen = ours(rows)
    found.backward(upstream)
    assert chosen.equal(index) and 1 < len(chosen.unique())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(rows.grad, again.grad)
    torch.testing.assert_close([p.grad for p in ours.parameters()], wanted)
    assert "codebook.codes" not in dict(ours.named_parameters())


def test_a_gate_that_is_open_to_one_side_alone():
    ours = VisualDictionary(CODES, WIDTH, "auto").eval()
    with torch.no_grad():
        ours.gate.weight.zero_()
        ours.code_map.weight.copy_(torch.eye(WIDTH))
        ours.code_map.bias.zero_()
    rows = torch.randn(7, WIDTH)
    cells = rows / (1 + 1e-5) ** 0.5
    for side, bias in enumerate(([50.0, -50.0], [-50.0, 50.0])):
        ours.gate_norm.bias.data.copy_(torch.tensor(bias))
        found, index = ours(rows)
        torch.testing.assert_close(found, ours.codebook.codes[index] if side == 0 else cells)


def test_all_cells_of_the_drawn_code_and_of_no_other_picture():
    layout = vk.SegmentLayout([[5], [2], [3]])
    codes = torch.tensor([7, 3, 7, 7, 9, 7, 1, 4, 4, 4])
    drawn = torch.tensor([2, 6, 8])
    assert cells_of_one_code(codes, drawn, layout).int().tolist() == [1, 0, 1, 1, 0, 0, 1, 1, 1, 1]


def embedder_of(**options) -> tuple[nn.Module, Pixels]:
    torch.manual_seed(0)
    options = {"backbone": "resnet18", "stages": 1, "max_grid": (2, 2), "positions": "sinusoidal", **options}
    embedder = make_image_embedder(ImageInput(kind="grid", **options), WIDTH, 1e-6, "auto")
    redraw(embedder)
    return embedder, Pixels(torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.zeros(8, 2, dtype=torch.int32))


def test_the_grid_is_that_of_a_max_pool_and_a_convolution():
    embedder, image = embedder_of(grid_pooling="max")
    pooled = F.max_pool2d(embedder.backbone(image.values), 2, stride=2)
    weight, bias = embedder.projection.weight, embedder.projection.bias
    maps = F.conv2d(pooled, weight[:, :, None, None], bias)
    torch.testing.assert_close(embedder.cells(image).values, maps.permute(0, 2, 3, 1).reshape(8, WIDTH))
    averaged, _ = embedder_of()
    assert not torch.allclose(averaged.cells(image).values, embedder.cells(image).values)


def test_a_hidden_cell_shows_the_mask_at_its_place():
    embedder, image = embedder_of(codes=CODES, backbone_norm="batch")
    cells, layout = embedder.cells(image), vk.SegmentLayout([[4], [4]])
    hidden = torch.tensor([0, 1, 1, 0, 0, 0, 0, 1], dtype=torch.bool)

    def made(of: Cells) -> torch.Tensor:
        maker = RowMaker(0.0, 1, itertools.count(), "auto")
        return maker(lambda: embedder.rows(of, layout, masked=hidden), layout, None)

    rows = made(cells)
    shown = torch.where(hidden[:, None], embedder.mask_row, cells.values) + embedder.places.table.repeat(2, 1)
    torch.testing.assert_close(rows, F.layer_norm(shown, (WIDTH,), embedder.norm.weight, embedder.norm.bias, 1e-6))
    noise = torch.where(hidden[:, None], torch.randn_like(cells.values), cells.values)
    assert torch.equal(made(Cells(noise, cells.positions, cells.codes)), rows), "nothing of a hidden cell is read"
    assert embedder.cells(cells) is cells and embedder.places_of(cells).equal(embedder.places_of(image))


def test_what_has_no_dictionary():
    with pytest.raises(ValueError, match="codes are chosen by the cells of a backbone: .*kind must be grid, got patches"):
        ImageInput(codes=4).check_input("model.joint.image", WIDTH)
    with pytest.raises(ValueError, match="model.image.codes are hidden in the joint stream alone"):
        ImageStack(kind="grid", codes=4)
