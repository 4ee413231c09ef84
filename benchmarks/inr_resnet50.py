"""Every tensor of ResNet-50 generated in one call, forward and backward once: ``python -m benchmarks.inr_resnet50 [--tile N]``
writes ``results/hyper/inr-resnet50.csv``.

1x1 convolutions and the classifier emit an N x N tile of channel pairs a coordinate: 3 makes 2.9 million coordinates, 1 (the
published way, which would save over 100 GiB for backward) 15.5 million. A row of another tile that is there already is kept.
"""

import argparse
import csv
import resource
import time

import torch
from torch import Tensor

from benchmarks import inr_scaling
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


def target(side: int = 3) -> tuple[list[InrTensor], list[tuple[int, int]]]:
    shapes = convolutions()
    tensors: list[InrTensor] = []
    active: list[tuple[int, int]] = []
    for layer, (c_out, c_in, kernel) in enumerate(shapes):
        mlp = len(tensors)
        tile = (side, side) if kernel == 1 else (1, 1)
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


def others(side: int) -> list[dict[str, str]]:
    """The committed rows of other tiles."""
    path = inr_scaling.FOLDER / "inr-resnet50.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["tile"] != str(side)]


def main(side: int = 3, dtype: torch.dtype = torch.bfloat16) -> None:
    torch.set_num_threads(1)
    tensors, active = target(side)
    p = parameters(len(tensors), 49, dtype)  # the first convolution is 7 x 7
    small = [(t, a) for t, a in zip(tensors, active, strict=True) if t.layout == "bias"][:1]
    inr_weights(p, *zip(*small, strict=True), norm=2048.0)  # the libraries' own memory
    before, start = peak(), time.process_time()
    weights = inr_weights(p, tensors, active, norm=2048.0, save="recompute", dtype=torch.float32)
    middle = time.process_time()
    torch.autograd.grad(weights, p, [torch.ones_like(w) for w in weights])
    end = time.process_time()
    row = {"tile": side, "tensors": len(tensors), "coordinates": coordinates(tensors, active)}
    row |= {"weights": sum(w.numel() for w in weights), "parameters": sum(x.numel() for x in p)}
    seconds = {"forward_cpu_s": f"{middle - start:.1f}", "backward_cpu_s": f"{end - middle:.1f}"}
    extra = {"extra_gib": f"{(peak() - before) / 2**30:.2f}"}
    inr_scaling.write("resnet50", [{**row, "dtype": str(dtype)[6:], **seconds, **extra}, *others(side)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tile", type=int, default=3, choices=(1, 2, 3, 4, 5, 6, 7), help="N")  # 7 x 7 outputs at most
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    arguments = parser.parse_args()
    main(arguments.tile, getattr(torch, arguments.dtype))
