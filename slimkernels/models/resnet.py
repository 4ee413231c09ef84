"""Residual networks: CIFAR ResNet-20 to -110 and ImageNet ResNet-18/34/50.

Source: He et al., Deep Residual Learning for Image Recognition (arXiv 1512.03385).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimkernels.models._width import scaled_all


def identity_shortcut(n_in: int, n_out: int, stride: int) -> nn.Conv2d:
    """Option A of the paper (every second pixel, zeros for the new channels) as a fixed 1x1 convolution.

    Slicing pixels and zero-padding channels in the forward would tie channel ``c`` of one stage to channel ``c + pad``
    of the next, which no leading slice can follow. The same map as a matrix can be permuted and sliced like any other
    weight, so the residual channels stay slimmable. The matrix is constant: not trained, and optional in a checkpoint.
    """
    conv = nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False)
    weight = torch.zeros(n_out, n_in, 1, 1)
    front = max(0, (n_out - n_in) // 2)
    for c in range(min(n_in, n_out)):
        weight[front + c, c] = 1
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.register_load_state_dict_pre_hook(_keep_if_missing)
    return conv


def _keep_if_missing(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    state_dict.setdefault(f"{prefix}weight", module.get_parameter("weight").detach())


class CifarBlock(nn.Module):
    """Two 3x3 convolutions; ``inner`` is the number of channels between them."""

    def __init__(self, n_in: int, inner: int, n_out: int, stride: int, option: str):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, inner, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if (stride != 1 or n_in != n_out) and option == "A":
            self.shortcut = identity_shortcut(n_in, n_out, stride)
        elif stride != 1 or n_in != n_out:
            conv = nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet for 32x32 images, depth ``6 n + 2``; keys as in akamaster/pytorch_resnet_cifar10.

    ``channels`` are the residual channels of the three stages, ``inner`` those inside their blocks (default: the same).
    ``option`` "A": shortcuts with nothing to train (269,722 parameters at depth 20); "B": 1x1 conv and norm (272,474).
    """

    def __init__(
        self,
        depth: int = 20,
        channels: Sequence[int] = (16, 32, 64),
        inner: Sequence[int] | None = None,
        classes: int = 10,
        option: str = "A",
    ):
        super().__init__()
        if depth % 6 != 2 or option not in ("A", "B"):
            raise ValueError(f"CifarResNet: expected depth 6 n + 2 and option A or B, got {depth} and {option!r}")
        inner = channels if inner is None else inner
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU()
        stages, n_in = [], channels[0]
        for stage, (mid, n_out) in enumerate(zip(inner, channels, strict=True)):
            blocks = [CifarBlock(n_in, mid, n_out, 2 if stage else 1, option)]
            blocks += [CifarBlock(n_out, mid, n_out, 1, option) for _ in range((depth - 2) // 6 - 1)]
            stages.append(nn.Sequential(*blocks))
            n_in = n_out
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(n_in, classes)

    def forward(self, x: Tensor) -> Tensor:  # (b, 3, h, w) -> (b, classes)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))


def cifar_resnet20(width_mult: float = 1.0, classes: int = 10, option: str = "A") -> CifarResNet:
    return CifarResNet(20, scaled_all((16, 32, 64), width_mult, divisor=4), classes=classes, option=option)


def cifar_resnet56(width_mult: float = 1.0, classes: int = 10, option: str = "A") -> CifarResNet:
    return CifarResNet(56, scaled_all((16, 32, 64), width_mult, divisor=4), classes=classes, option=option)


def _downsample(n_in: int, n_out: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and n_in == n_out:
        return None
    return nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False), nn.BatchNorm2d(n_out))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, n_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _downsample(n_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, n_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * 4)
        self.relu = nn.ReLU()
        self.downsample = _downsample(n_in, channels * 4, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ImageNet ResNet with torchvision's keys; ``channels`` are the block widths of the four stages."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        channels: Sequence[int] = (64, 128, 256, 512),
        classes: int = 1000,
    ):
        super().__init__()
        n_in = channels[0]
        self.conv1 = nn.Conv2d(3, n_in, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(n_in)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages = []
        for stage, (count, c) in enumerate(zip(layers, channels, strict=True)):
            blocks = []
            for i in range(count):
                blocks.append(block(n_in, c, 2 if stage and i == 0 else 1))
                n_in = c * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(n_in, classes)

    def forward(self, x: Tensor) -> Tensor:  # (b, 3, h, w) -> (b, classes)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def resnet18(width_mult: float = 1.0, classes: int = 1000) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), scaled_all((64, 128, 256, 512), width_mult), classes)


def resnet34(width_mult: float = 1.0, classes: int = 1000) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), scaled_all((64, 128, 256, 512), width_mult), classes)


def resnet50(width_mult: float = 1.0, classes: int = 1000) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), scaled_all((64, 128, 256, 512), width_mult), classes)
