"""VGG with torchvision's keys. Source: Simonyan and Zisserman (arXiv 1409.1556)."""

from collections.abc import Sequence

from torch import Tensor, nn

from slimkernels.models._width import scaled, scaled_all

CONVS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """``channels`` are the widths of the stages, ``hidden`` of the linear layers, ``pool`` the final map size."""

    def __init__(
        self,
        depth: int = 16,
        channels: Sequence[int] = (64, 128, 256, 512, 512),
        hidden: int = 4096,
        classes: int = 1000,
        norm: bool = False,
        pool: int = 7,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        n_in = 3
        for count, n_out in zip(CONVS[depth], channels, strict=True):
            for _ in range(count):
                layers.append(nn.Conv2d(n_in, n_out, 3, padding=1))
                layers += [nn.BatchNorm2d(n_out), nn.ReLU()] if norm else [nn.ReLU()]
                n_in = n_out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(pool)
        head: list[nn.Module] = [nn.Linear(n_in * pool * pool, hidden), nn.ReLU(), nn.Dropout()]
        head += [nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(), nn.Linear(hidden, classes)]
        self.classifier = nn.Sequential(*head)

    def forward(self, x: Tensor) -> Tensor:  # (b, 3, h, w), h and w >= 32 -> (b, classes)
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _vgg(depth: int, width_mult: float, classes: int, norm: bool) -> VGG:
    channels = scaled_all((64, 128, 256, 512, 512), width_mult)
    return VGG(depth, channels, scaled(4096, width_mult), classes, norm)


def vgg11(width_mult: float = 1.0, classes: int = 1000, norm: bool = False) -> VGG:
    return _vgg(11, width_mult, classes, norm)


def vgg16(width_mult: float = 1.0, classes: int = 1000, norm: bool = False) -> VGG:
    return _vgg(16, width_mult, classes, norm)
