"""Cases of the norms over rows, as ``bench_slim_layer_norm`` and ``bench_slim_rms_norm`` share them."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from benchmarks.harness import Case, Problem
from benchmarks.shapes import reduced, shapes
from slimkernels.nn._base import SlimModule

Make = Callable[[int], nn.Module]
MakeSlim = Callable[[int], SlimModule]


def build(ours: MakeSlim, sliced: Make, plain: Make, rows: int, c: int, full: int, dtype: torch.dtype) -> Problem:
    slim, slices, narrow = ours(full), sliced(full), plain(c)
    for parameter in slim.parameters():
        nn.init.normal_(parameter)
    slices.load_state_dict(slim.state_dict())
    narrow.load_state_dict({key: value[:c] for key, value in slim.state_dict().items()})
    slim.set_width(c)
    x = torch.randn(rows, c, dtype=dtype, requires_grad=True)
    return Problem(slim.to(dtype), narrow.to(dtype), slices.to(dtype), (x,))


def cases(ours: MakeSlim, sliced: Make, plain: Make, quick: bool) -> Iterator[Case]:
    """Rows of every layer norm of the list of shapes, with the three layers at its width."""
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
                partial(build, ours, sliced, plain, rows, c, round(c / shape.width), dtype),
                compile=shape.heaviest,
                count=shape.count,
                note=note,
            )
