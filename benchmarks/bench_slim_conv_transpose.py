"""``SlimConvTranspose2d`` at a width against the torch module of that size and F.conv_transpose2d on a sliced weight.

The shapes are a U-Net's four 2 x 2, stride 2 upsamplings of a 64 x 64 image and a GAN decoder's 4 x 4 ones.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Case, Problem
from slimkernels.nn import SlimConvTranspose2d

# Net, full inputs and outputs, input size, kernel, padding; stride 2.
LAYERS = [
    *(("U-Net", 2 * n, n, size, 2, 0) for n, size in ((256, 4), (128, 8), (64, 16), (32, 32))),
    *(("DCGAN", 2 * n, n, size, 4, 1) for n, size in ((128, 4), (64, 8))),
]
BATCH = 8


class Sliced(nn.ConvTranspose2d):
    """The usual slicing code."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        weight, bias = self.weight[: x.shape[1], : self.active], self.bias[: self.active]
        return F.conv_transpose2d(x, weight, bias, self.stride, self.padding)


def build(width: float, c_in: int, c_out: int, size: int, kernel: int, padding: int, dtype: torch.dtype) -> Problem:
    active_in, active_out = round(c_in * width), round(c_out * width)
    geometry = (kernel, 2, padding)
    ours, sliced = SlimConvTranspose2d(c_in, c_out, *geometry), Sliced(c_in, c_out, *geometry)
    plain = nn.ConvTranspose2d(active_in, active_out, *geometry)
    sliced.load_state_dict(ours.state_dict())
    sliced.active = active_out
    ours.set_width(active_out)
    with torch.no_grad():
        plain.weight.copy_(ours.weight[:active_in, :active_out])
        plain.bias.copy_(ours.bias[:active_out])
    x = torch.randn(BATCH, active_in, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    modules = [module.to(dtype) for module in (ours, plain, sliced)]
    for module in modules:  # what the owner of a network for channels-last images does once
        module.to(memory_format=torch.channels_last)
    return Problem(*modules, (x.requires_grad_(),))


def cases(quick: bool) -> Iterator[Case]:
    for net, c_in, c_out, size, kernel, padding in LAYERS:
        for width in (0.25, 1.0) if quick else (0.25, 0.5, 0.75, 1.0):
            heaviest = (net, size) in (("U-Net", 32), ("DCGAN", 8))
            if quick and not heaviest:
                continue
            for dtype in (torch.float32, torch.bfloat16) if heaviest else (torch.float32,):
                yield Case(
                    net,
                    width,
                    f"N{BATCH}-I{round(c_in * width)}-O{round(c_out * width)}-{size}x{size}-k{kernel}s2",
                    dtype,
                    partial(build, width, c_in, c_out, size, kernel, padding, dtype),
                    compile=heaviest,
                )
