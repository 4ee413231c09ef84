"""``SlimLayerNorm`` at a width against nn.LayerNorm of that size and F.layer_norm on sliced parameters."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Case, Problem
from benchmarks.shapes import reduced, shapes
from slimkernels.nn import SlimLayerNorm


class Sliced(nn.LayerNorm):
    """The usual slicing code."""

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[-1]
        return F.layer_norm(x, (c,), self.weight[:c], self.bias[:c], self.eps)


def build(rows: int, c: int, full: int, dtype: torch.dtype) -> Problem:
    ours, sliced, plain = SlimLayerNorm(full), Sliced(full), nn.LayerNorm(c)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    sliced.load_state_dict(ours.state_dict())
    plain.load_state_dict({key: value[:c] for key, value in ours.state_dict().items()})
    ours.set_width(c)
    x = torch.randn(rows, c, dtype=dtype, requires_grad=True)
    return Problem(ours.to(dtype), plain.to(dtype), sliced.to(dtype), (x,))


def cases(quick: bool) -> Iterator[Case]:
    for shape in shapes("layernorm", quick):
        c = shape.c_in
        batch, note = reduced(shape.n, 0, 2 * c * shape.h * shape.w)
        rows = batch * shape.h * shape.w
        for dtype in (torch.float32, torch.bfloat16):
            yield Case(
                shape.net,
                shape.width,
                f"N{rows}-C{c}",
                dtype,
                partial(build, rows, c, round(c / shape.width), dtype),
                compile=shape.heaviest,
                count=shape.count,
                note=note,
            )
