"""Residual networks: what turns pixels into a map of features. Names of weights are torchvision's."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.batch_norm import BatchNorm, FrozenBatchNorm

MakeNorm = Callable[[int], nn.Module]
NORMS: dict[str, MakeNorm] = {"frozen": FrozenBatchNorm, "batch": BatchNorm}


class Basic(nn.Module):
    """Two 3x3 convolutions beside a short cut (ResNet-18)."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, norm: MakeNorm, groups: int, group_width: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, planes, 3, stride), norm(planes)
        self.conv2, self.bn2 = _conv(planes, planes, 3), norm(planes)
        self.downsample = _short_cut(inputs, planes, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + _shortened(self.downsample, x)).relu()


class Bottleneck(nn.Module):
    """A 3x3 convolution, of which the stride is, between two of 1x1, beside a short cut (ResNet-50, ResNeXt)."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, norm: MakeNorm, groups: int, group_width: int):
        super().__init__()
        inner, outputs = planes * group_width // 64 * groups, planes * self.expansion
        self.conv1, self.bn1 = _conv(inputs, inner, 1), norm(inner)
        self.conv2, self.bn2 = _conv(inner, inner, 3, stride, groups), norm(inner)
        self.conv3, self.bn3 = _conv(inner, outputs, 1), norm(outputs)
        self.downsample = _short_cut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + _shortened(self.downsample, x)).relu()


class Backbone(nn.Module):
    """Pixels `[B, 3, H, W]` to a map `[B, channels, h, w]`."""

    channels: int


class Stem(nn.Conv2d):
    """Reads pixels of any type. It looks at its weight itself: in another module's forward ZeRO-3 would not have it."""

    def __init__(self) -> None:
        super().__init__(3, 64, 7, 2, padding=3, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels.to(self.weight.dtype))


class ResNet(Backbone):
    """A stem at a quarter of the resolution and four stages, or the first `stages` of them, each but the first at half of
    what it reads."""

    def __init__(
        self,
        block: type[Basic] | type[Bottleneck],
        depths: tuple[int, ...],
        norm: MakeNorm = FrozenBatchNorm,
        *,
        stages: int | None = None,
        groups: int = 1,
        group_width: int = 64,
    ):
        super().__init__()
        self.conv1, self.bn1 = Stem(), norm(64)
        inputs = 64
        self.stage_channels = []
        for stage, depth in enumerate(depths[:stages]):
            planes, layers = 64 * 2**stage, []
            for number in range(depth):
                stride = 2 if number == 0 and stage > 0 else 1
                layers.append(block(inputs, planes, stride, norm, groups, group_width))
                inputs = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
            self.stage_channels.append(inputs)
        self.channels = inputs

    def stages(self, x: Tensor) -> list[Tensor]:
        """The map behind every stage."""
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, padding=1)
        maps = []
        for stage in range(len(self.stage_channels)):
            x = self.get_submodule(f"layer{stage + 1}")(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)[-1]


class FinestPyramidLevel(Backbone):
    """Level p2 of a feature pyramid: every coarser map, doubled in size, is added to the next finer one."""

    def __init__(self, bottom_up: ResNet, channels: int = 256):
        super().__init__()
        self.bottom_up, self.channels = bottom_up, channels
        self.lateral = nn.ModuleList(nn.Conv2d(inputs, channels, 1) for inputs in bottom_up.stage_channels)
        self.output = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        finer_first = [lateral(m) for lateral, m in zip(self.lateral, self.bottom_up.stages(x), strict=True)]
        level = finer_first.pop()
        for finer in reversed(finer_first):
            level = finer + F.interpolate(level, size=finer.shape[2:], mode="nearest")
        return self.output(level)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def _short_cut(inputs: int, outputs: int, stride: int, norm: MakeNorm) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), norm(outputs))


def _shortened(downsample: nn.Sequential | None, x: Tensor) -> Tensor:
    return x if downsample is None else downsample(x)


def _resnet18_fpn(norm: MakeNorm = FrozenBatchNorm) -> FinestPyramidLevel:
    return FinestPyramidLevel(ResNet(Basic, (2, 2, 2, 2), norm))


def _resnext101_fpn(norm: MakeNorm = FrozenBatchNorm) -> FinestPyramidLevel:
    return FinestPyramidLevel(ResNet(Bottleneck, (3, 4, 23, 3), norm, groups=32, group_width=8))


BACKBONES: dict[str, Callable[..., Backbone]] = {
    "resnet18": functools.partial(ResNet, Basic, (2, 2, 2, 2)),
    "resnet50": functools.partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": functools.partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "resnet18_fpn": _resnet18_fpn,
    "resnext101_fpn": _resnext101_fpn,
}
