"""``SlimBatchNorm2d`` with residual add and activation, against batch norm, add and activation one after the other."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Case, Problem
from benchmarks.shapes import Shape, reduced, shapes
from slimkernels.nn import SlimBatchNorm2d

ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6}
NETS = ("ResNet-20-CIFAR", "ResNet-50", "MobileNetV2")


class Plain(nn.BatchNorm2d):
    """What a plain network does after a convolution."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__(channels)
        self.act = ACTIVATIONS[activation]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return self.act(y if residual is None else y + residual)


class Sliced(Plain):
    """The usual slicing code."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        c = x.shape[1]
        y = F.batch_norm(
            x,
            self.running_mean[:c],
            self.running_var[:c],
            self.weight[:c],
            self.bias[:c],
            self.training,
            self.momentum,
            self.eps,
        )
        return self.act(y if residual is None else y + residual)


def build(shape: tuple[int, ...], full: int, dtype: torch.dtype, last: bool, activation: str, add: bool) -> Problem:
    c = shape[1]
    ours, sliced, plain = SlimBatchNorm2d(full, activation=activation), Sliced(full, activation), Plain(c, activation)
    with torch.no_grad():
        ours.weight.normal_()
        ours.bias.normal_()
        ours.running_mean.normal_()
        ours.running_var.uniform_(0.5, 2)
    sliced.load_state_dict(ours.state_dict())
    plain.load_state_dict({key: value[:c] if value.dim() else value for key, value in ours.state_dict().items()})
    ours.set_width(c)
    layout = torch.channels_last if last else torch.contiguous_format
    inputs = tuple(
        torch.randn(shape).to(dtype).to(memory_format=layout).requires_grad_() for _ in range(2 if add else 1)
    )
    return Problem(ours.to(dtype), plain.to(dtype), sliced.to(dtype), inputs)


def cases(quick: bool) -> Iterator[Case]:
    seen = set()
    for shape in shapes("conv2d", quick):
        if shape.net not in NETS:
            continue
        h, w = ((size + 2 * shape.pad - shape.k) // shape.stride + 1 for size in (shape.h, shape.w))
        if (key := (shape.net, shape.width, shape.c_out, h)) in seen:
            continue
        seen.add(key)
        yield from of_layer(shape, h, w)


def of_layer(shape: Shape, h: int, w: int) -> Iterator[Case]:
    c, full = shape.c_out, round(shape.c_out / shape.width)
    batch, note = reduced(shape.n, 0, 3 * c * h * w)
    activation = "relu6" if shape.net == "MobileNetV2" else "relu"
    for last in (False, True):
        for add in (False, True):
            for dtype in (torch.float32, torch.bfloat16) if shape.heaviest else (torch.float32,):
                layout, form = "NHWC" if last else "NCHW", f"add-{activation}" if add else activation
                yield Case(
                    shape.net,
                    shape.width,
                    f"N{batch}-C{c}-H{h}-W{w}-{layout}-{form}",
                    dtype,
                    partial(build, (batch, c, h, w), full, dtype, last, activation, add),
                    compile=shape.heaviest and last and add,
                    count=shape.count,
                    note=note,
                )
