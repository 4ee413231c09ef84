"""Every tensor of ResNet-50 generated in one call, forward and backward once: ``python -m benchmarks.inr_resnet50``.

1x1 convolutions and the classifier emit a 3 x 3 tile of channel pairs a coordinate, which keeps the coordinates in the millions.
The published way would save over 100 GiB for backward.
"""

import resource
import sys
import time

import torch
from torch import Tensor

from slimkernels.ops import InrParameters, InrTensor, inr_weights
from slimkernels.ops.inr_weights import coordinates


def convolutions() -> list[tuple[int, int, int]]:  # output channels, input channels, kernel size
    found, into = [(64, 3, 7)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            found += [(width, into, 1), (width, width, 3), (4 * width, width, 1)]
            if block == 0:
                found.append((4 * width, into, 1))
            into = 4 * width
    return [*found, (1000, 2048, 1)]


def target() -> tuple[list[InrTensor], list[tuple[int, int]]]:
    shapes = convolutions()
    tensors: list[InrTensor] = []
    active: list[tuple[int, int]] = []
    for layer, (c_out, c_in, kernel) in enumerate(shapes):
        mlp = len(tensors)
        tile = (3, 3) if kernel == 1 else (1, 1)
        size = (kernel, kernel) if layer + 1 < len(shapes) else ()
        tensors += [
            InrTensor(layer, len(shapes), size, mlp, tile=tile),
            InrTensor(layer, len(shapes), (), mlp + 1, "bias"),
        ]
        active += [(c_out, c_in), (c_out, 1)]
    return tensors, active


def parameters(count: int, outputs: int, dtype: torch.dtype, hidden: int = 256, depth: int = 3) -> InrParameters:
    def make(*shape: int) -> Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    return InrParameters(
        make(count, hidden, 6 + 12 * 16),
        make(count, hidden),
        make(count, depth, hidden, hidden),
        make(count, depth, hidden),
        torch.full((count, depth), 0.1, dtype=dtype, requires_grad=True),
        make(count, outputs, hidden),
        make(count, outputs),
    )


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(dtype: torch.dtype = torch.bfloat16) -> None:
    torch.set_num_threads(1)
    tensors, active = target()
    p = parameters(len(tensors), 49, dtype)  # the first convolution is 7 x 7
    before, start = peak(), time.perf_counter()
    weights = inr_weights(p, tensors, active, norm=2048.0, save="recompute", dtype=torch.float32)
    middle = time.perf_counter()
    torch.autograd.grad(weights, p, [torch.ones_like(w) for w in weights])
    end = time.perf_counter()
    print(
        f"{len(tensors)} tensors, {coordinates(tensors, active)} coordinates, {sum(w.numel() for w in weights)} weights,"
        f" {dtype}: forward {middle - start:.1f} s, backward {end - middle:.1f} s,"
        f" extra memory {(peak() - before) / 2**30:.2f} GiB, 1 thread"
    )


if __name__ == "__main__":
    main(torch.float32 if "float32" in sys.argv else torch.bfloat16)
