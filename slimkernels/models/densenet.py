"""DenseNet with torchvision's keys. Source: Huang et al. (arXiv 1608.06993)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimkernels.models._width import scaled


class DenseLayer(nn.Module):
    def __init__(self, n_in: int, growth: int, bottleneck: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(n_in)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(n_in, bottleneck, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(bottleneck, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))
        return torch.cat([x, new], 1)


class Transition(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(n_in)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(n_in, n_out, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(self.relu(self.norm(x))))


class DenseNet(nn.Module):
    """Each layer adds ``growth`` channels to the ``stem`` first ones; its bottleneck is ``4 * growth`` wide."""

    def __init__(self, blocks: Sequence[int] = (6, 12, 24, 16), growth: int = 32, stem: int = 64, classes: int = 1000):
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(stem))
        self.features.add_module("relu0", nn.ReLU())
        self.features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
        n = stem
        for i, count in enumerate(blocks, start=1):
            block = nn.Sequential()
            for j in range(1, count + 1):
                block.add_module(f"denselayer{j}", DenseLayer(n, growth, 4 * growth))
                n += growth
            self.features.add_module(f"denseblock{i}", block)
            if i < len(blocks):
                self.features.add_module(f"transition{i}", Transition(n, n // 2))
                n //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(n))
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(n, classes)

    def forward(self, x: Tensor) -> Tensor:  # (b, 3, h, w), h and w >= 32 -> (b, classes)
        return self.classifier(self.avgpool(self.relu(self.features(x))).flatten(1))


def densenet121(width_mult: float = 1.0, classes: int = 1000) -> DenseNet:
    return DenseNet((6, 12, 24, 16), scaled(32, width_mult), scaled(64, width_mult), classes)
