"""U-Net with batch norm and transposed convolutions. Source: Ronneberger et al. (arXiv 1505.04597)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from slimkernels.models._width import scaled_all


class DoubleConv(nn.Sequential):
    def __init__(self, n_in: int, n_out: int):
        layers: list[nn.Module] = []
        for n in (n_in, n_out):
            layers += [nn.Conv2d(n, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
        super().__init__(*layers)


class Up(nn.Module):
    """Doubles the resolution and joins the skip connection: [skip | upsampled]."""

    def __init__(self, n_in: int, n_skip: int, n_out: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(n_in, n_in // 2, 2, stride=2)
        self.conv = DoubleConv(n_skip + n_in // 2, n_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([skip, self.up(x)], 1))


class UNet(nn.Module):
    """``channels`` from the highest to the lowest resolution; 31,037,698 parameters by default."""

    def __init__(self, channels: Sequence[int] = (64, 128, 256, 512, 1024), in_channels: int = 3, classes: int = 2):
        super().__init__()
        self.stem = DoubleConv(in_channels, channels[0])
        pairs = list(pairwise(channels))
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList(DoubleConv(high, low) for high, low in pairs)
        self.up = nn.ModuleList(Up(low, high, high) for high, low in reversed(pairs))
        self.head = nn.Conv2d(channels[0], classes, 1)

    def forward(
        self, x: Tensor
    ) -> Tensor:  # (b, in_channels, h, w) -> (b, classes, h, w); h, w multiples of 2 ** (levels - 1)
        skips = [self.stem(x)]
        for block in self.down:
            skips.append(block(self.pool(skips[-1])))
        x = skips.pop()
        for block in self.up:
            x = block(x, skips.pop())
        return self.head(x)


def unet(width_mult: float = 1.0, in_channels: int = 3, classes: int = 2) -> UNet:
    return UNet(scaled_all((64, 128, 256, 512, 1024), width_mult), in_channels, classes)
