"""The peers of ``bench_training_step``: the usual slicing code around a plain network, and one plain network a width."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SlicedConv2d(nn.Conv2d):
    width: int

    def forward(self, x: Tensor) -> Tensor:
        groups = x.shape[1] if self.groups > 1 else 1
        weight = self.weight[: self.width, : x.shape[1] // groups]
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, groups)


class SlicedBatchNorm2d(nn.BatchNorm2d):
    """Statistics of the batch, as slimmable training has them; running ones are updated on the slice."""

    width: int

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        c = x.shape[1]
        mean, var = self.running_mean[:c], self.running_var[:c]
        return F.batch_norm(x, mean, var, self.weight[:c], self.bias[:c], True, self.momentum or 0.0, self.eps)


class SlicedLinear(nn.Linear):
    width: int

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[: self.width, : x.shape[1]], self.bias[: self.width])


SLICED: dict[type, type] = {nn.Conv2d: SlicedConv2d, nn.BatchNorm2d: SlicedBatchNorm2d, nn.Linear: SlicedLinear}
Widths = dict[str, int]  # active outputs of every layer, by its name


def sliced(net: nn.Module) -> nn.Module:
    """A copy whose layers run on slices of their weights."""
    copied = copy.deepcopy(net)
    for module in copied.modules():
        if type(module) in SLICED:
            module.__class__ = SLICED[type(module)]
    return copied


def set_widths(net: nn.Module, widths: Widths) -> None:
    for name, module in getattr(net, "_orig_mod", net).named_modules():  # what torch.compile wraps
        if name in widths:
            module.width = widths[name]  # type: ignore[assignment]


def widths_of(model: nn.Module) -> Widths:
    """Of a slimmable model as it is set now."""
    found = {name: module.width for name, module in model.named_modules() if hasattr(module, "set_width")}
    return found | {name: m.out_features for name, m in model.named_modules() if type(m) is nn.Linear}


def at_width(net: nn.Module, widths: Widths) -> nn.Module:
    """A plain network of that width with the leading weights of ``net``."""
    copied = copy.deepcopy(net)
    inputs: dict[str, int] = {}
    handles = []

    def note(name: str) -> Callable:
        return lambda module, args: inputs.__setitem__(name, args[0].shape[1])

    peer = sliced(net)
    set_widths(peer, widths)
    for name, module in peer.named_modules():
        if type(module) in SLICED.values():
            handles.append(module.register_forward_pre_hook(note(name)))
    first = next(p for p in peer.parameters() if p.dim() == 4)
    with torch.no_grad():
        peer(torch.zeros(2, first.shape[1], 32, 32, dtype=first.dtype))
        for name, module in copied.named_modules():
            if isinstance(module, nn.Conv2d):
                groups = inputs[name] if module.groups > 1 else 1
                cut(module, "weight", widths[name], inputs[name] // groups)
                module.groups = groups
            elif isinstance(module, nn.BatchNorm2d):
                for tensor in ("weight", "bias", "running_mean", "running_var"):
                    cut(module, tensor, inputs[name])
            elif isinstance(module, nn.Linear):
                cut(module, "weight", widths[name], inputs[name])
    return copied


def cut(module: nn.Module, name: str, *sizes: int) -> None:
    full = getattr(module, name)
    part = full.detach()[tuple(slice(0, size) for size in sizes)].clone()
    if isinstance(full, nn.Parameter):
        setattr(module, name, nn.Parameter(part, requires_grad=full.requires_grad))
    else:
        setattr(module, name, part)
