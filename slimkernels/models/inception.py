"""GoogLeNet (Inception v1 with batch norm) with torchvision's keys, without the auxiliary heads.

Source: Szegedy et al., Going Deeper with Convolutions (arXiv 1409.4842).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimkernels.models._width import scaled, scaled_all

# channels of the branches: 1x1 | 1x1 -> 3x3 | 1x1 -> 3x3 (5x5 in the paper) | pool -> 1x1
BRANCHES = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}
NAMES = tuple(BRANCHES)


class ConvBNReLU(nn.Module):
    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(n_out, eps=0.001)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class Inception(nn.Module):
    """Four branches side by side, concatenated."""

    def __init__(self, n_in: int, channels: Sequence[int]):
        super().__init__()
        a, b1, b2, c1, c2, d = channels
        self.branch1 = ConvBNReLU(n_in, a, 1)
        self.branch2 = nn.Sequential(ConvBNReLU(n_in, b1, 1), ConvBNReLU(b1, b2, 3, padding=1))
        self.branch3 = nn.Sequential(ConvBNReLU(n_in, c1, 1), ConvBNReLU(c1, c2, 3, padding=1))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True), ConvBNReLU(n_in, d, 1))
        self.out_channels = a + b2 + c2 + d

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(nn.Module):
    """6,624,904 parameters at full width and 1000 classes; only the first ``blocks`` Inception blocks are built."""

    def __init__(self, width_mult: float = 1.0, classes: int = 1000, dropout: float = 0.2, blocks: int = 9):
        super().__init__()
        self.names = NAMES[:blocks]
        stem, wide = scaled(64, width_mult), scaled(192, width_mult)
        self.conv1 = ConvBNReLU(3, stem, 7, stride=2, padding=3)
        self.conv2 = ConvBNReLU(stem, stem, 1)
        self.conv3 = ConvBNReLU(stem, wide, 3, padding=1)
        n_in = wide
        for name in self.names:
            block = Inception(n_in, scaled_all(BRANCHES[name], width_mult))
            self.add_module(name, block)
            n_in = block.out_channels
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=False)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(n_in, classes)

    def forward(self, x: Tensor) -> Tensor:  # (b, 3, h, w), h and w >= 32 -> (b, classes)
        x = self.maxpool(self.conv3(self.conv2(self.maxpool(self.conv1(x)))))
        for name in self.names:
            x = self.maxpool(x) if name in ("inception4a", "inception5a") else x
            x = self.get_submodule(name)(x)
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))


def googlenet(width_mult: float = 1.0, classes: int = 1000) -> GoogLeNet:
    return GoogLeNet(width_mult, classes)
