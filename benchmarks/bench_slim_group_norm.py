"""``SlimGroupNorm`` at a width against nn.GroupNorm of that size and F.group_norm on sliced parameters."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Case, Problem
from benchmarks.shapes import reduced, shapes
from slimkernels.nn import SlimGroupNorm

GROUP_SIZE = 16


class Sliced(nn.GroupNorm):
    """The usual slicing code."""

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        return F.group_norm(x, c // GROUP_SIZE, self.weight[:c], self.bias[:c], self.eps)


def build(n: int, c: int, length: int, full: int, dtype: torch.dtype) -> Problem:
    ours, sliced = (kind(full // GROUP_SIZE, full) for kind in (SlimGroupNorm, Sliced))
    plain = nn.GroupNorm(c // GROUP_SIZE, c)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    sliced.load_state_dict(ours.state_dict())
    plain.load_state_dict({key: value[:c] for key, value in ours.state_dict().items()})
    ours.set_width(c)
    x = torch.randn(n, c, length, dtype=dtype, requires_grad=True)
    return Problem(ours.to(dtype), plain.to(dtype), sliced.to(dtype), (x,))


def cases(quick: bool) -> Iterator[Case]:
    for shape in shapes("groupnorm", quick):
        c = shape.c_in
        batch, note = reduced(shape.n, 0, 2 * c * shape.h * shape.w)
        for dtype in (torch.float32, torch.bfloat16):
            yield Case(
                shape.net,
                shape.width,
                f"N{batch}-C{c}-L{shape.h * shape.w}",
                dtype,
                partial(build, batch, c, shape.h * shape.w, round(c / shape.width), dtype),
                compile=shape.heaviest,
                count=shape.count,
                note=note,
            )
