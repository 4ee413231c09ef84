"""ShuffleNetV2 with torchvision's keys. Source: Ma et al. (arXiv 1807.11164)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimkernels.models._width import scaled


def channel_shuffle(x: Tensor, groups: int = 2) -> Tensor:
    """Interleaves ``groups`` equal parts of the channels; the number of channels is read from ``x``."""
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def _depthwise(n: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(n, n, 3, stride=stride, padding=1, groups=n, bias=False), nn.BatchNorm2d(n)]


def _pointwise(n_in: int, n_out: int) -> list[nn.Module]:
    return [nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]


class ShuffleBlock(nn.Module):
    """One half of the channels passes (stride 1) or is reduced (stride 2), the other is convolved; then interleaved."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        half = n_out // 2
        self.stride = stride
        self.branch1 = (
            nn.Sequential(*_depthwise(n_in, stride), *_pointwise(n_in, half)) if stride > 1 else nn.Sequential()
        )
        first = n_in if stride > 1 else half
        self.branch2 = nn.Sequential(*_pointwise(first, half), *_depthwise(half, stride), *_pointwise(half, half))

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            left, right = x.chunk(2, dim=1)
            return channel_shuffle(torch.cat([left, self.branch2(right)], 1))
        return channel_shuffle(torch.cat([self.branch1(x), self.branch2(x)], 1))


class ShuffleNetV2(nn.Module):
    """``channels``: stem, the three stages (even numbers), the last convolution. 2,278,604 parameters at x1.0."""

    def __init__(
        self,
        channels: Sequence[int] = (24, 116, 232, 464, 1024),
        repeats: Sequence[int] = (4, 8, 4),
        classes: int = 1000,
    ):
        super().__init__()
        stem, *stages, last = channels
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()
        )
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        n_in, built = stem, []
        for count, n_out in zip(repeats, stages, strict=True):
            blocks = [ShuffleBlock(n_in if i == 0 else n_out, n_out, 2 if i == 0 else 1) for i in range(count)]
            built.append(nn.Sequential(*blocks))
            n_in = n_out
        self.stage2, self.stage3, self.stage4 = built
        self.conv5 = nn.Sequential(*_pointwise(n_in, last))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:  # (b, 3, h, w) -> (b, classes)
        x = self.maxpool(self.conv1(x))
        x = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        return self.fc(self.avgpool(x).flatten(1))


def shufflenet_v2(width_mult: float = 1.0, classes: int = 1000) -> ShuffleNetV2:
    channels = [scaled(c, width_mult, divisor=4) for c in (24, 116, 232, 464, 1024)]
    return ShuffleNetV2(channels, classes=classes)
