"""``inr_weights`` against the published way, eager and compiled: the weights of a net's tensors from one MLP a tensor.

``shape`` names the workload; the coordinates, hidden size, layers and bands follow. ``plain`` is the published way as whole
tensors (``published_inr``) in the dtype of the row; ``compile`` is torch.compile of it; ``eager-float32``, in rows of
bfloat16, is it in float32; ``recompute`` is ours without saved activations.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Problem
from benchmarks.published_inr import generate
from slimkernels.ops import InrParameters, InrTensor, inr_weights
from slimkernels.ops.inr_weights import coordinates

NORM = 128.0
Convolutions = list[tuple[int, int, int]]  # output channels, input channels, kernel size; 0: a matrix without bias


def residual_stage(channels: int, blocks: int, first_in: int | None = None) -> Convolutions:
    found = []
    for block in range(blocks):
        into = first_in if block == 0 and first_in else channels
        found += [(channels, into, 3), (channels, channels, 3)]
    return found


def resnet20() -> Convolutions:
    stages = [*residual_stage(16, 3), *residual_stage(32, 3, 16), *residual_stage(64, 3, 32)]
    return [(16, 3, 3), *stages, (32, 16, 1), (64, 32, 1), (10, 64, 0)]


WORKLOADS: dict[str, Convolutions] = {
    "resnet20-last-block": residual_stage(64, 1),
    "resnet20-all": resnet20(),
    "resnet56-7-blocks": residual_stage(64, 7),
    "resnet56-23-blocks": [*residual_stage(16, 8), *residual_stage(32, 8), *residual_stage(64, 7)],
    "resnet18-layer3.1": residual_stage(256, 1),
}


class Generator(nn.Module):
    """One network a tensor; a convolution and its bias are two tensors."""

    def __init__(self, shapes: Convolutions, hidden: int, layers: int, bands: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.tensors: list[InrTensor] = []
        self.active: list[tuple[int, int]] = []
        for layer, (c_out, c_in, kernel) in enumerate(shapes):
            self.tensors.append(InrTensor(layer, len(shapes), (kernel, kernel) if kernel else (), len(self.tensors)))
            self.active.append((c_out, c_in))
            if kernel:
                self.tensors.append(InrTensor(layer, len(shapes), (), len(self.tensors), "bias"))
                self.active.append((c_out, 1))
        count, inputs, depth = len(self.tensors), 6 + 12 * bands, layers - 1

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape) / shape[-1] ** 0.5).to(dtype))

        self.w_in, self.b_in = parameter(count, hidden, inputs), parameter(count, hidden)
        self.w_hidden, self.b_hidden = parameter(count, depth, hidden, hidden), parameter(count, depth, hidden)
        self.skip = nn.Parameter(torch.full((count, depth), 0.1, dtype=dtype))
        self.w_out, self.b_out = parameter(count, 9, hidden), parameter(count, 9)

    def mlps(self) -> InrParameters:
        return InrParameters(*self.parameters())


class Ours(Generator):
    save = "full"

    def forward(self, scale: Tensor) -> list[Tensor]:
        return inr_weights(self.mlps(), self.tensors, self.active, norm=NORM, scale=scale, save=self.save)


class Recomputing(Ours):
    save = "recompute"


class Published(Generator):
    def forward(self, scale: Tensor) -> list[Tensor]:
        return generate(self.mlps(), self.tensors, self.active, norm=NORM, scale=scale)


class Wide(Published):
    """In float32 whatever the inputs are."""

    def forward(self, scale: Tensor) -> list[Tensor]:
        return super().forward(scale.float())


def build(shapes: Convolutions, hidden: int, layers: int, bands: int, dtype: torch.dtype, compiled: bool) -> Problem:
    options = (shapes, hidden, layers, bands, dtype)
    ours, recomputing, published = Ours(*options), Recomputing(*options), Published(*options)
    sliced = Published(*options) if compiled else None
    for other in filter(None, (recomputing, published, sliced)):
        other.load_state_dict(ours.state_dict())
    peers: dict[str, nn.Module] = {"recompute": recomputing}
    if dtype != torch.float32:
        peers["eager-float32"] = Wide(*options[:4], torch.float32)
        peers["eager-float32"].load_state_dict(ours.state_dict())
    scale = torch.ones(len(ours.tensors), dtype=dtype, requires_grad=True)
    return Problem(ours, published, sliced, (scale,), peers=peers)


def cases(quick: bool) -> Iterator[Case]:
    for name, shapes in WORKLOADS.items():
        smallest = name == "resnet20-last-block"
        if quick and not (smallest or name == "resnet20-all"):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            yield case(name, shapes, 256, 4, 16, dtype, smallest)
    if not quick:
        yield case("resnet56-7-blocks", WORKLOADS["resnet56-7-blocks"], 512, 8, 32, torch.float32, False)


def case(
    name: str, shapes: Convolutions, hidden: int, layers: int, bands: int, dtype: torch.dtype, compiled: bool
) -> Case:
    with torch.device("meta"):
        module = Generator(shapes, hidden, layers, bands, dtype)
    points = coordinates(module.tensors, module.active)
    return Case(
        name,
        1.0,
        f"N{points}-T{len(module.tensors)}-H{hidden}-L{layers}-F{bands}",
        dtype,
        partial(build, shapes, hidden, layers, bands, dtype, compiled),
        modes=("forward", "full"),
        compile=compiled,
    )
