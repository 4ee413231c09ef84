"""ConvNeXt with torchvision's keys. Source: Liu et al. (arXiv 2201.03545)."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimkernels.models._width import scaled_all


class Permute(nn.Module):
    def __init__(self, *dims: int):
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


def named(*modules: tuple[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def norm_2d(name: str, channels: int) -> list[tuple[str, nn.Module]]:
    """LayerNorm over the channels of an NCHW tensor."""
    norm = nn.LayerNorm(channels, eps=1e-6)
    return [("to_last", Permute(0, 2, 3, 1)), (name, norm), ("to_first", Permute(0, 3, 1, 2))]


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm, a two-layer MLP over the channels, and the learnt per-channel ``layer_scale``."""

    def __init__(self, channels: int, hidden: int, layer_scale: float = 1e-6):
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(channels, eps=1e-6),
            nn.Linear(channels, hidden),
            nn.GELU(),
            nn.Linear(hidden, channels),
            Permute(0, 3, 1, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * self.block(x)


class ConvNeXt(nn.Module):
    """``channels`` and ``repeats`` of the four stages; 28,589,128 parameters by default (ConvNeXt-T)."""

    def __init__(
        self,
        channels: Sequence[int] = (96, 192, 384, 768),
        repeats: Sequence[int] = (3, 3, 9, 3),
        classes: int = 1000,
        layer_scale: float = 1e-6,
    ):
        super().__init__()
        features: list[nn.Module] = []
        for i, (c, count) in enumerate(zip(channels, repeats, strict=True)):
            # The names are torchvision's; the permutations around a norm have none of its numbers.
            if i == 0:
                features.append(named(("0", nn.Conv2d(3, c, 4, stride=4)), *norm_2d("1", c)))
            else:
                down = nn.Conv2d(channels[i - 1], c, 2, stride=2)
                features.append(named(*norm_2d("0", channels[i - 1]), ("1", down)))
            features.append(nn.Sequential(*(ConvNeXtBlock(c, 4 * c, layer_scale) for _ in range(count))))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        last = channels[-1]
        self.classifier = named(*norm_2d("0", last), ("1", nn.Flatten(1)), ("2", nn.Linear(last, classes)))

    def forward(self, x: Tensor) -> Tensor:  # (b, 3, h, w), h and w multiples of 32 -> (b, classes)
        return self.classifier(self.avgpool(self.features(x)))


def convnext_tiny(width_mult: float = 1.0, classes: int = 1000) -> ConvNeXt:
    return ConvNeXt(scaled_all((96, 192, 384, 768), width_mult), classes=classes)
