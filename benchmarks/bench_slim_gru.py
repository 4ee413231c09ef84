"""``SlimGRU`` at a width against nn.GRU of that size and torch's GRU on sliced weights: NSNet2, in batches and streaming."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.harness import Case
from benchmarks.recurrent import Layer, build


def cases(quick: bool) -> Iterator[Case]:
    for width in (0.25, 1.0) if quick else (0.25, 0.5, 0.75, 1.0):
        layer = Layer("GRU", 400, 400, 2, False, width)
        size = f"I{layer.inputs}-H{layer.hidden}-L2"
        for dtype in (torch.float32, torch.bfloat16) if width in (0.25, 1.0) else (torch.float32,):
            batch = partial(build, layer, 200, 8, dtype)
            yield Case("NSNet2", width, f"T200-B8-{size}", dtype, batch, ("forward", "full"))
            stream = partial(build, layer, 1, 1, dtype, state=True)
            yield Case("NSNet2-stream", width, f"T1-B1-{size}", dtype, stream, ("forward",))
