"""Networks that every function of the package has to take, as small as they can be without losing what is special."""

from collections.abc import Callable

import torch
from torch import nn

from slimkernels import models

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (lambda: models.CifarResNet(20, (16, 24, 32)), (2, 3, 16, 16)),
    "resnet50": (
        lambda: models.ResNet(models.resnet.Bottleneck, (3, 4, 6, 3), (8, 16, 16, 24), classes=10),
        (1, 3, 64, 64),
    ),
    "mobilenet_v2": (lambda: models.MobileNetV2(0.5, classes=10), (1, 3, 64, 64)),
    "vgg11": (lambda: models.VGG(11, (16, 16, 24, 24, 24), hidden=32, classes=10, pool=2), (1, 3, 64, 64)),
    "vgg11_bn": (
        lambda: models.VGG(11, (16, 16, 24, 24, 24), hidden=32, classes=10, pool=2, norm=True),
        (1, 3, 64, 64),
    ),
    "densenet": (lambda: models.DenseNet((2, 3, 2), growth=16, stem=16, classes=10), (1, 3, 32, 32)),
    "googlenet": (lambda: models.GoogLeNet(classes=10), (1, 3, 64, 64)),
    "shufflenet_v2": (lambda: models.ShuffleNetV2((24, 32, 48, 64, 64), classes=10), (1, 3, 64, 64)),
    "unet": (lambda: models.UNet((16, 24, 32)), (1, 3, 16, 16)),
    "convnext": (lambda: models.ConvNeXt((16, 24, 32, 48), (1, 1, 2, 1), classes=10), (1, 3, 64, 64)),
    "vit": (lambda: models.VisionTransformer(32, 8, 32, 2, 2, 16, 64, classes=10), (2, 3, 32, 32)),
}


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network with noise on all that starts as a constant, in eval mode, and an example input."""
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make().eval()
    with torch.no_grad():
        for key, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.is_floating_point() and bool((tensor == tensor.flatten()[0]).all()):
                noise = 0.2 * torch.randn(tensor.shape)
                tensor.add_(noise.abs() if key.endswith("running_var") else noise)
    return net, torch.randn(shape)


def perturbed(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, torch.Tensor]:
    """A network with noise on every parameter, in eval mode, and an example input."""
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net, torch.randn(shape)
