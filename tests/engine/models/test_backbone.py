"""Residual networks against `transformers` with the same weights, every parameter and statistic redrawn; the pyramid by
hand; sizes of the published networks."""

import itertools
from types import SimpleNamespace as Pixels

import pytest
import torch
import vlkernels as vk
from torch import nn
from torch.nn import functional as F

from engine.models.batch_norm import BatchNorm, FrozenBatchNorm
from engine.models.embedding import RowMaker, make_image_embedder
from engine.models.embedding.resnet import BACKBONES, Basic, Bottleneck, FinestPyramidLevel, ResNet
from engine.models.initialization import initialize
from engine.sections.inputs import ImageInput

transformers = pytest.importorskip("transformers")


def redraw(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                fan_in = tensor[0].numel() ** -0.5 if tensor.dim() == 4 else 0.3
                tensor.copy_(drawn * fan_in if tensor.dim() > 1 else 1 + 0.3 * drawn.clamp(-2, 2))


def theirs_by_our_names(resnet) -> dict[str, torch.Tensor]:
    """The network of `transformers` under torchvision's names."""
    renamed = {}
    for name, tensor in resnet.state_dict().items():
        name = name.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
        if name.startswith("encoder.stages."):
            stage, layer, rest = name.removeprefix("encoder.stages.").replace(".layers.", ".").split(".", 2)
            rest = rest.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
            if rest.startswith("layer."):
                number, kind, rest = rest.removeprefix("layer.").split(".", 2)
                rest = f"{'conv' if kind == 'convolution' else 'bn'}{int(number) + 1}.{rest}"
            name = f"layer{int(stage) + 1}.{layer}.{rest}"
        renamed[name] = tensor
    return {name: tensor for name, tensor in renamed.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("kind, block, expansion", [("basic", Basic, 1), ("bottleneck", Bottleneck, 4)])
def test_resnets_are_those_of_transformers(kind, block, expansion):
    config = transformers.ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64 * expansion, 128 * expansion],
        depths=[2, 2],
        layer_type=kind,
        downsample_in_first_stage=False,
    )
    theirs = transformers.ResNetModel(config).double().eval()
    redraw(theirs)
    ours = ResNet(block, (2, 2)).double()
    ours.load_state_dict(theirs_by_our_names(theirs))
    pixels = torch.randn(1, 3, 33, 40, dtype=torch.float64)
    one, other = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
    found, expected = ours(one), theirs(other).last_hidden_state
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(expected)
    found.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)
    gradients = theirs_by_our_names_of_gradients(theirs)
    assert all(torch.allclose(p.grad, gradients[name], rtol=1e-9, atol=1e-9) for name, p in ours.named_parameters())


def theirs_by_our_names_of_gradients(resnet) -> dict[str, torch.Tensor]:
    holder = transformers.ResNetModel(resnet.config).double()
    with torch.no_grad():
        for own, source in zip(holder.parameters(), resnet.parameters(), strict=True):
            own.copy_(source.grad)
    return theirs_by_our_names(holder)


def test_groups_see_their_own_channels_alone():
    grouped = Bottleneck(64, 64, 1, nn.BatchNorm2d, 4, 8)
    redraw(grouped)
    assert grouped.conv2.weight.shape == (32, 8, 3, 3)
    x = torch.randn(1, 32, 5, 5)
    groups = [F.conv2d(part, w, padding=1) for part, w in zip(x.chunk(4, 1), grouped.conv2.weight.chunk(4), strict=True)]
    torch.testing.assert_close(grouped.conv2(x), torch.cat(groups, 1))


@pytest.mark.parametrize(
    "backbone, parameters",
    [("resnet18", 11_689_512 - 513_000), ("resnet50", 25_557_032 - 2_049_000), ("resnet101", 44_549_160 - 2_049_000)],
)
def test_sizes_are_the_published_ones(backbone, parameters):
    """Less the classifier of a thousand classes; the affine maps of frozen norms are buffers."""
    with torch.device("meta"):
        network = BACKBONES[backbone](norm=nn.BatchNorm2d)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_size_of_the_resnext_under_the_pyramid():
    with torch.device("meta"):
        network = BACKBONES["resnext101_fpn"](norm=nn.BatchNorm2d)
    assert sum(p.numel() for p in network.bottom_up.parameters()) == 88_791_336 - 2_049_000
    assert network.channels == 256


def test_the_finest_level_by_hand():
    pyramid = FinestPyramidLevel(ResNet(Basic, (1, 1, 1)), channels=8)
    redraw(pyramid)
    pixels = torch.randn(2, 3, 64, 96)
    c2, c3, c4 = pyramid.bottom_up.stages(pixels)
    assert c2.shape[2:] == (16, 24) and c4.shape[2:] == (4, 6)
    l2, l3, l4 = (lateral(c) for lateral, c in zip(pyramid.lateral, (c2, c3, c4), strict=True))

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    torch.testing.assert_close(pyramid(pixels), pyramid.output(l2 + doubled(l3 + doubled(l4))))
    assert pyramid(torch.randn(1, 3, 70, 50)).shape == (1, 8, 18, 13), "sides need not divide"


def test_three_stages_of_a_backbone_are_its_map_at_a_sixteenth():
    options = ImageInput(kind="grid", backbone="resnet18", stages=3, max_grid=(14, 14), positions="none", embedding_norm=False)
    cut = make_image_embedder(options, 16, 1e-6, "auto").backbone
    whole = BACKBONES["resnet18"]()
    redraw(whole)
    missing, more = cut.load_state_dict(whole.state_dict(), strict=False)
    assert not missing and {name.split(".")[0] for name in more} == {"layer4"}
    pixels = torch.randn(1, 3, 224, 224)
    found = cut(pixels)
    assert found.shape == (1, 256, 14, 14) and cut.channels == 256 and options.cell_side == 16
    torch.testing.assert_close(found, whole.stages(pixels)[2])


@pytest.mark.parametrize("options", [{"stages": 0}, {"stages": 5}, {"stages": 3, "backbone": "resnet18_fpn"}])
def test_backbones_that_are_not_cut(options):
    with pytest.raises(ValueError, match="x.stages must be 1 to 4 of a backbone without a pyramid, got"):
        ImageInput(kind="grid", **options).check_input("x", 16)


def test_cells_are_rows_of_the_pooled_map():
    options = ImageInput(kind="grid", backbone="resnet18", max_grid=(2, 3), positions="none", embedding_norm=False)
    embedder = make_image_embedder(options, 16, 1e-6, "auto")
    redraw(embedder)
    image, layout = Pixels(values=torch.randn(2, 3, 64, 96)), vk.SegmentLayout([[6], [6]])
    maps = F.adaptive_avg_pool2d(embedder.backbone(image.values), (2, 3))
    expected = torch.stack([maps[b, :, r, c] for b in range(2) for r in range(2) for c in range(3)])
    expected = F.linear(expected, embedder.projection.weight, embedder.projection.bias)
    found = RowMaker(0.0, 1, itertools.count(), "auto")(lambda: embedder.rows(image, layout), layout, None)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind, norm", [("frozen", FrozenBatchNorm), ("batch", BatchNorm)])
def test_the_norm_of_a_backbone_is_an_option(kind, norm):
    options = ImageInput(kind="grid", backbone="resnet18_fpn", backbone_norm=kind, positions="none")
    with torch.device("meta"):
        backbone = make_image_embedder(options, 16, 1e-6, "auto").backbone
    norms = [part for part in backbone.modules() if isinstance(part, (FrozenBatchNorm, BatchNorm))]
    assert len(norms) == 20 and {type(part) for part in norms} == {norm}


def test_a_backbone_begins_from_nothing():
    """Two different pictures stay as different in the last map as they are."""
    torch.manual_seed(0)
    backbone = BACKBONES["resnet18"](norm=BatchNorm)
    initialize(backbone, 0.02)
    assert backbone.layer3[0].conv1.weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    last = backbone(torch.randn(4, 3, 64, 64)).flatten(1)
    assert 0.3 < (last[0] - last[1]).norm() / last[0].norm() < 3 and last.std() > 0.3
    pyramid = BACKBONES["resnet18_fpn"]()
    initialize(pyramid, 0.02)
    assert not pyramid.output.bias.any() and not pyramid.lateral[0].bias.any()


def test_one_value_per_channel_has_no_variance():
    with pytest.raises(ValueError, match="more than one value of each channel, got 1"):
        BatchNorm(3)(torch.randn(1, 3, 1, 1))
    assert BatchNorm(3).eval()(torch.ones(1, 3, 1, 1)).shape == (1, 3, 1, 1)
