"""``SlimConv1d`` / ``SlimConv2d`` at a width against the torch module of that size and F.conv on a sliced weight."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Case, Problem
from benchmarks.shapes import Shape, reduced, shapes
from slimkernels.nn import SlimConv1d, SlimConv2d

KINDS = {1: (nn.Conv1d, SlimConv1d, F.conv1d), 2: (nn.Conv2d, SlimConv2d, F.conv2d)}


class Sliced(nn.Module):
    """The usual slicing code around the parameters of ``full``."""

    def __init__(self, full: nn.Module, active: int, rank: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(full.weight.detach().clone()), nn.Parameter(full.bias.detach().clone())
        self.active, self.convolve = active, KINDS[rank][2]
        self.stride, self.padding, self.dilation = full.stride, full.padding, full.dilation
        self.depthwise = full.groups > 1

    def forward(self, x: Tensor) -> Tensor:
        groups = x.shape[1] if self.depthwise else 1
        weight = self.weight[: self.active, : x.shape[1] // groups]
        return self.convolve(x, weight, self.bias[: self.active], self.stride, self.padding, self.dilation, groups)


def full_size(channels: int, width: float) -> int:
    """Channels of the full layer; the image's own 1 or 3 are never cut."""
    return channels if channels <= 3 else round(channels / width)


def build(shape: Shape, rank: int, dilation: int, batch: int, dtype: torch.dtype) -> Problem:
    plain_kind, slim_kind, _ = KINDS[rank]
    depthwise = shape.groups > 1
    full_in, full_out = full_size(shape.c_in, shape.width), full_size(shape.c_out, shape.width)
    if depthwise:
        full_out = full_in
    geometry = {"stride": shape.stride, "padding": shape.pad, "dilation": dilation}
    plain = plain_kind(shape.c_in, shape.c_out, shape.k, groups=shape.c_in if depthwise else 1, **geometry)
    ours = slim_kind(full_in, full_out, shape.k, groups=full_in if depthwise else 1, **geometry)
    ours.set_width(shape.c_out)
    with torch.no_grad():
        plain.weight.copy_(ours.weight[: shape.c_out, : plain.weight.shape[1]])
        plain.bias.copy_(ours.bias[: shape.c_out])
    sliced = Sliced(ours, shape.c_out, rank)
    size = (shape.h, shape.w) if rank == 2 else (shape.h * shape.w,)
    x = torch.randn(batch, shape.c_in, *size, dtype=dtype)
    modules = [module.to(dtype) for module in (ours, plain, sliced)]
    if rank == 2:
        x = x.contiguous(memory_format=torch.channels_last)
        for module in modules:  # what the owner of a network for channels-last images does once
            module.to(memory_format=torch.channels_last)
    return Problem(*modules, (x.requires_grad_(),))


def cases(quick: bool) -> Iterator[Case]:
    for op, rank in (("conv2d", 2), ("dwconv2d", 2), ("conv1d", 1)):
        for shape in shapes(op, quick):
            dilation = int(shape.detail.removeprefix("dil=")) if shape.detail.startswith("dil=") else 1
            reach = dilation * (shape.k - 1) + 1
            size = [shape.h, shape.w] if rank == 2 else [shape.h * shape.w]
            out = 1
            for s in size:
                out *= max(1, (s + 2 * shape.pad - reach) // shape.stride + 1)
            macs = out * shape.c_out * shape.c_in // shape.groups * shape.k**rank
            elements = shape.c_in * shape.h * shape.w + shape.c_out * out
            batch, note = reduced(shape.n, macs, elements)
            depthwise = "-dw" if shape.groups > 1 else ""
            name = f"N{batch}-I{shape.c_in}-O{shape.c_out}-{'x'.join(map(str, size))}-k{shape.k}s{shape.stride}"
            for dtype in (torch.float32, torch.bfloat16) if shape.heaviest else (torch.float32,):
                yield Case(
                    shape.net,
                    shape.width,
                    name + (f"d{dilation}" if dilation > 1 else "") + depthwise,
                    dtype,
                    partial(build, shape, rank, dilation, batch, dtype),
                    compile=shape.heaviest,
                    count=shape.count,
                    note=note,
                )
