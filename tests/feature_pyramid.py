"""A ResNet under a feature pyramid as detectron2's source describes it and names its tensors, for tests alone; and what
`transformers` makes of it in LayoutLMv2, where the library itself is not installed."""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

DEPTHS = {18: (2, 2, 2, 2), 101: (3, 4, 23, 3)}
WIDTH, MEAN = 256, [103.53, 116.28, 123.675]


class Shape(NamedTuple):
    """What MODEL.RESNETS says."""

    depths: tuple[int, ...]
    first_channels: int = 256
    groups: int = 1
    group_width: int = 64
    bottleneck: bool = True


class StillNorm(nn.Module):
    """A batch norm of four vectors that do not learn."""

    eps = 1e-5

    def __init__(self, channels: int):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class NormedConvolution(nn.Conv2d):
    """The norm is a part of the convolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.norm = StillNorm(outputs)

    def forward(self, x):
        return self.norm(super().forward(x))


class Block(nn.Module):
    """Two convolutions of 3x3, or a grouped one, of which the stride is, between two of 1x1."""

    def __init__(self, inputs: int, outputs: int, inner: int, stride: int, shape: Shape):
        super().__init__()
        self.shortcut = NormedConvolution(inputs, outputs, 1, stride) if inputs != outputs else None
        if shape.bottleneck:
            self.conv1 = NormedConvolution(inputs, inner, 1)
            self.conv2 = NormedConvolution(inner, inner, 3, stride, shape.groups)
            self.conv3 = NormedConvolution(inner, outputs, 1)
        else:
            self.conv1 = NormedConvolution(inputs, outputs, 3, stride)
            self.conv2 = NormedConvolution(outputs, outputs, 3)
            self.conv3 = None

    def forward(self, x):
        out = self.conv2(F.relu(self.conv1(x)))
        if self.conv3 is not None:
            out = self.conv3(F.relu(out))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class BottomUp(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = NormedConvolution(3, 64, 7, 2)
        inputs, outputs, inner = 64, shape.first_channels, shape.groups * shape.group_width
        for stage, depth in enumerate(shape.depths, start=2):
            blocks = []
            for number in range(depth):
                blocks.append(Block(inputs, outputs, inner, 2 if number == 0 and stage > 2 else 1, shape))
                inputs = outputs
            self.add_module(f"res{stage}", nn.Sequential(*blocks))
            outputs, inner = 2 * outputs, 2 * inner
        self.channels = [shape.first_channels * 2**stage for stage in range(len(shape.depths))]

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem.conv1(x)), 3, 2, padding=1)
        maps = []
        for stage in range(2, 2 + len(self.channels)):
            x = getattr(self, f"res{stage}")(x)
            maps.append(x)
        return maps


class FeaturePyramid(nn.Module):
    """Every level has an output; LayoutLMv2 reads that of p2."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.bottom_up = BottomUp(shape)
        for stage, channels in enumerate(self.bottom_up.channels, start=2):
            self.add_module(f"fpn_lateral{stage}", nn.Conv2d(channels, WIDTH, 1))
            self.add_module(f"fpn_output{stage}", nn.Conv2d(WIDTH, WIDTH, 3, padding=1))

    def forward(self, x):
        level, found = None, {}
        for stage, features in reversed(list(enumerate(self.bottom_up(x), start=2))):
            lateral = getattr(self, f"fpn_lateral{stage}")(features)
            level = lateral if level is None else lateral + F.interpolate(level, scale_factor=2, mode="nearest")
            found[f"p{stage}"] = getattr(self, f"fpn_output{stage}")(level)
        return found


def shape_of(settings: dict) -> Shape:
    """By `detectron2_config_args`; what they leave out is 256, 1 and 64 there."""
    told = {name.removeprefix("MODEL.RESNETS."): value for name, value in settings.items()}
    shape = [told.get(name, value) for name, value in (("RES2_OUT_CHANNELS", 256), ("NUM_GROUPS", 1), ("WIDTH_PER_GROUP", 64))]
    return Shape(DEPTHS[told["DEPTH"]], *shape, bottleneck=told["DEPTH"] > 34)


class StandIn(nn.Module):
    """In the place of `LayoutLMv2VisualBackbone`: what `transformers` looks for in it."""

    def __init__(self, config):
        super().__init__()
        self.grid = config.image_feature_pool_shape[:2]
        told = {f"PIXEL_{name}": config.detectron2_config_args.get(f"MODEL.PIXEL_{name}", MEAN) for name in ("MEAN", "STD")}
        self.cfg = SimpleNamespace(MODEL=SimpleNamespace(**told))
        for name, values in told.items():
            self.register_buffer(name.lower(), torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, image):
        return F.adaptive_avg_pool2d(self.features(image), self.grid).flatten(2).transpose(1, 2)

    def features(self, image):
        raise NotImplementedError


class MapAsItIs(StandIn):
    """The picture is the map."""

    def features(self, image):
        return image


class VisualBackbone(StandIn):
    """Bytes, blue first, to p2."""

    def __init__(self, config):
        super().__init__(config)
        self.backbone = FeaturePyramid(shape_of(config.detectron2_config_args))

    def features(self, image):
        return self.backbone((image - self.pixel_mean) / self.pixel_std)["p2"]


@torch.no_grad()
def redraw_norms(module: nn.Module, seed: int = 11) -> nn.Module:
    """Every norm's vectors; convolutions smaller, so that four stages of them stay within reach of float64."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor.dim() == 4:
            tensor.copy_(drawn * tensor[0].numel() ** -0.5)
        elif tensor.dim() == 1:
            tensor.copy_(0.5 + drawn.abs() if name.endswith(("var", "norm.weight")) else 0.5 * drawn)
    return module


def layoutlmv2_without_detectron2(monkeypatch, backbone: type[nn.Module] = VisualBackbone):
    """The module of LayoutLMv2 in `transformers`, with this backbone in the place of theirs."""
    from transformers.models.layoutlmv2 import modeling_layoutlmv2

    monkeypatch.setattr(modeling_layoutlmv2, "requires_backends", lambda *_: None)
    monkeypatch.setattr(modeling_layoutlmv2, "LayoutLMv2VisualBackbone", backbone)
    library = SimpleNamespace(layers=SimpleNamespace(FrozenBatchNorm2d=StillNorm))
    monkeypatch.setattr(modeling_layoutlmv2, "detectron2", library, raising=False)
    return modeling_layoutlmv2
