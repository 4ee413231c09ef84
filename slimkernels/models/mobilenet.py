"""MobileNetV2 with torchvision's keys. Source: Sandler et al. (arXiv 1801.04381)."""

from torch import Tensor, nn

from slimkernels.models._width import scaled

# (expansion, channels, repeats, stride)
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def conv_bn_relu6(n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(n_in, n_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU6())


class InvertedResidual(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int, expansion: int):
        super().__init__()
        hidden = n_in * expansion
        layers: list[nn.Module] = [conv_bn_relu6(n_in, hidden, 1)] if expansion != 1 else []
        layers.append(conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden))
        layers += [nn.Conv2d(hidden, n_out, 1, bias=False), nn.BatchNorm2d(n_out)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """3,504,872 parameters at ``width_mult`` 1 and 1000 classes; ``stem_stride`` 1 suits 32x32 images."""

    def __init__(self, width_mult: float = 1.0, classes: int = 1000, dropout: float = 0.2, stem_stride: int = 2):
        super().__init__()
        n_in, last = scaled(32, width_mult), scaled(1280, max(1.0, width_mult))
        features: list[nn.Module] = [conv_bn_relu6(3, n_in, 3, stem_stride)]
        for expansion, channels, repeats, stride in STAGES:
            n_out = scaled(channels, width_mult)
            for i in range(repeats):
                features.append(InvertedResidual(n_in, n_out, stride if i == 0 else 1, expansion))
                n_in = n_out
        features.append(conv_bn_relu6(n_in, last, 1))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:  # (b, 3, h, w) -> (b, classes)
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def mobilenet_v2(width_mult: float = 1.0, classes: int = 1000) -> MobileNetV2:
    return MobileNetV2(width_mult, classes)
