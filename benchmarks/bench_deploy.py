"""Whole networks for inference: ``elastic.deploy`` at a width against the same network in PyTorch.

Peers: ``plain`` the extracted network, channels-last; ``slice`` the usual slicing code around the full weights; ``compile``
the extracted network by torch.compile, frozen; ``modelopt`` (where nvidia-modelopt is installed, networks without groups) its
dynamic layers set to the width; ``onednn`` (the FFN) the extracted network with oneDNN's packed linear layers; ``float32``
(rows of bfloat16) our own float32.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Case, Frozen, Problem
from benchmarks.onednn import packed
from slimkernels import elastic, models
from slimkernels.models.vit import Mlp

WIDTHS = (0.25, 0.5, 0.75, 1.0)


class Sliced(nn.Module):
    """A layer with full weights of which the first ``out`` outputs run, on as many inputs as come."""

    def __init__(self, full: Any, out: int) -> None:
        super().__init__()
        self.full, self.out = full, out

    def forward(self, x: Tensor) -> Tensor:
        layer, n = self.full, self.out
        bias = None if layer.bias is None else layer.bias[:n]
        if isinstance(layer, nn.Linear):
            return F.linear(x, layer.weight[:n, : x.shape[-1]], bias)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            mean, var = layer.running_mean[:n], layer.running_var[:n]
            return F.batch_norm(x, mean, var, layer.weight[:n], bias, False, 0.0, layer.eps)
        groups = x.shape[1] if layer.groups > 1 else 1
        weight = layer.weight[:n, : x.shape[1] // groups]
        run = F.conv2d if weight.dim() == 4 else F.conv1d
        return run(x, weight, bias, layer.stride, layer.padding, layer.dilation, groups)


def sliced_network(full: nn.Module, plain: nn.Module) -> nn.Module:
    """``full`` whose layers run the slices that ``plain`` is made of."""
    narrow = dict(plain.named_modules())
    for name, module in list(full.named_modules()):
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)):
            parent, _, child = name.rpartition(".")
            weight = narrow[name].weight
            assert isinstance(weight, Tensor)
            full.get_submodule(parent)._modules[child] = Sliced(module, weight.shape[0])
    return full


def modelopt_network(full: nn.Module, plain: nn.Module) -> nn.Module | None:
    """``full`` with nvidia-modelopt's dynamic layers at the sizes of ``plain``; None where that is not installed."""
    grouped = any(isinstance(m, nn.modules.conv._ConvNd) and m.groups > 1 for m in plain.modules())
    if grouped or importlib.util.find_spec("modelopt") is None:
        return None
    from modelopt.torch.nas.registry import DMRegistry

    narrow = dict(plain.named_modules())
    sizes = {
        nn.Conv2d: ("in_channels", "out_channels"),
        nn.BatchNorm2d: ("num_features",),
        nn.Linear: ("in_features", "out_features"),
    }
    for name, module in list(full.named_modules()):
        if type(module) not in sizes:
            continue
        dynamic = DMRegistry.convert(module)
        for size in sizes[type(narrow[name])]:
            value = getattr(narrow[name], size)
            if getattr(dynamic, size) != value:
                setattr(dynamic, size, value)
    return full


class Streamed(nn.Module):
    """``stream`` of a network, for a harness that gives tensors one by one."""

    def __init__(self, net: nn.Module, run: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.net, self.run = net, run

    def forward(self, x: Tensor, *past: Tensor) -> Any:
        return (self.net.stream if self.run is None else self.run)(x, list(past))  # type: ignore[operator]


def build(
    make: Callable[[], nn.Module], shape: tuple[int, ...], divisor: int, width: float, dtype: torch.dtype
) -> Problem:
    torch.manual_seed(0)
    x = torch.randn(shape)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    model = elastic.convert(make().eval(), x, divisor=divisor)
    stream = isinstance(model, models.WaveNet)
    ours = elastic.deploy(model, widths=[width], dtype=dtype, method="stream" if stream else "forward")
    plain = elastic.extract(model, width).eval()
    oracle, sliced = elastic.extract(model, width).eval(), sliced_network(elastic.extract(model, 1.0).eval(), plain)
    plain, sliced = plain.to(dtype), sliced.to(dtype)
    if x.dim() == 4:
        plain = plain.to(memory_format=torch.channels_last)
    if stream:
        past = [torch.randn_like(t) for t in plain.silence(x)]
        inputs = (x, *past)
        modules = (Streamed(ours, ours), Streamed(plain), Streamed(sliced))
        return Problem(*modules, inputs, peers={"compile": Frozen(Streamed(plain))}, oracle=Streamed(oracle))
    if dtype == torch.float32:
        peers: dict[str, nn.Module] = {"compile": Frozen(plain)}
        dynamic = modelopt_network(elastic.extract(model, 1.0).eval(), oracle)
        if dynamic is not None:
            peers["modelopt"] = dynamic.to(memory_format=torch.channels_last) if x.dim() == 4 else dynamic
        if x.dim() == 3:  # a network of linear layers
            peers["onednn"] = packed(elastic.extract(model, width).eval())
        return Problem(ours, plain, sliced, (x,), peers=peers, oracle=oracle)
    own = elastic.deploy(model, widths=[width])
    return Problem(ours, plain, None, (x.to(dtype),), peers={"float32": own}, oracle=oracle)


def cases(quick: bool) -> Iterator[Case]:
    def case(net, make, shape, divisor, width, dtype=torch.float32) -> Case:
        size = "x".join(str(n) for n in shape)
        return Case(net, width, size, dtype, partial(build, make, shape, divisor, width, dtype), ("forward",))

    ffn = partial(Mlp, 384, 1536)
    for batch in (1, 8):
        for width in WIDTHS:
            yield case("ResNet-50", models.resnet50, (batch, 3, 224, 224), 8, width)
    for width in (0.35, *WIDTHS[1:]):
        yield case("MobileNetV2", models.mobilenet_v2, (1, 3, 224, 224), 8, width)
    for batch in (1, 64):
        for width in WIDTHS:
            yield case("ResNet-20", models.cifar_resnet20, (batch, 3, 32, 32), 4, width)
    for block in (64, 512) if quick else (64, 128, 256, 512):
        for width in (0.5, 1.0) if quick else WIDTHS:
            yield case("WaveNet", models.wavenet, (1, 1, block), 4, width)
    for batch in (1,) if quick else (1, 8):
        for width in WIDTHS:
            yield case("ViT-S FFN", ffn, (batch, 197, 384), 8, width)
    for width in WIDTHS:
        yield case("ResNet-50", models.resnet50, (1, 3, 224, 224), 8, width, torch.bfloat16)
    for width in (0.25, 1.0):
        yield case("MobileNetV2", models.mobilenet_v2, (1, 3, 224, 224), 8, max(width, 0.35), torch.bfloat16)
        yield case("ViT-S FFN", ffn, (1, 197, 384), 8, width, torch.bfloat16)
