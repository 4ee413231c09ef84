"""``SlimLinear`` at a width against nn.Linear of that size and F.linear on a sliced weight; in inference also against
``onednn``, a layer of that size on oneDNN with its weight packed ahead."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Case, Problem
from benchmarks.onednn import packed
from benchmarks.shapes import Shape, reduced, shapes
from slimkernels.nn import SlimLinear


class Sliced(nn.Linear):
    """The usual slicing code."""

    def __init__(self, in_features: int, out_features: int, active: int) -> None:
        super().__init__(in_features, out_features)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[: self.active, : x.shape[-1]], self.bias[: self.active])


def full_size(shape: Shape) -> tuple[int, int]:
    """Inputs and outputs of the full-width layer; sizes that the net has at every width (classes, bands) are never cut."""
    same_net = [s for s in shapes("linear") if s.net == shape.net]
    widths = {s.width for s in same_net}
    fixed_in = {s.width for s in same_net if s.c_in == shape.c_in} == widths
    fixed_out = {s.width for s in same_net if s.c_out == shape.c_out} == widths
    # ViT-S/16 is cut by whole heads of 64: 2, 3, 4 and 6 of them.
    part = {0.25: 1 / 3, 0.75: 2 / 3}.get(shape.width, shape.width) if shape.net == "ViT-S/16" else shape.width
    return (
        shape.c_in if fixed_in else round(shape.c_in / part),
        shape.c_out if fixed_out else round(shape.c_out / part),
    )


def build(shape: Shape, batch: int, dtype: torch.dtype) -> Problem:
    full_in, full_out = full_size(shape)
    ours, plain = SlimLinear(full_in, full_out), nn.Linear(shape.c_in, shape.c_out)
    sliced = Sliced(full_in, full_out, shape.c_out)
    sliced.load_state_dict(ours.state_dict())
    ours.set_width(shape.c_out)
    with torch.no_grad():
        plain.weight.copy_(ours.weight[: shape.c_out, : shape.c_in])
        plain.bias.copy_(ours.bias[: shape.c_out])
    x = torch.randn(batch, shape.c_in, dtype=dtype, requires_grad=True)
    plain = plain.to(dtype)
    return Problem(ours.to(dtype), plain, sliced.to(dtype), (x,), inference_peers={"onednn": packed(plain)})


def cases(quick: bool) -> Iterator[Case]:
    for shape in shapes("linear", quick):
        batch, note = reduced(shape.n, shape.c_in * shape.c_out, shape.c_in + shape.c_out)
        for dtype in (torch.float32, torch.bfloat16) if shape.heaviest else (torch.float32,):
            name = f"N{batch}-I{shape.c_in}-O{shape.c_out}"
            yield Case(
                shape.net,
                shape.width,
                name,
                dtype,
                partial(build, shape, batch, dtype),
                compile=shape.heaviest and dtype == torch.float32,
                count=shape.count,
                note=note,
            )
