"""``SlimLSTM`` at a width against nn.LSTM of that size and torch's LSTM on sliced weights: the band-split RNN's layer."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.harness import Case
from benchmarks.recurrent import Layer, build

# Bidirectional, 41 bands x 259 frames of 3 s of music: over time and over bands.
LAYERS = {"BSRNN-time": (259, 41), "BSRNN-band": (41, 259)}


def cases(quick: bool) -> Iterator[Case]:
    for net, (steps, batch) in LAYERS.items():
        for width in (0.25, 1.0) if quick else (0.25, 0.5, 0.75, 1.0):
            layer = Layer("LSTM", 128, 256, 1, True, width)
            name = f"T{steps}-B{batch}-I{layer.inputs}-H{layer.hidden}x2"
            dtypes = (torch.float32, torch.bfloat16) if width in (0.25, 1.0) else (torch.float32,)
            for dtype in dtypes:
                yield Case(net, width, name, dtype, partial(build, layer, steps, batch, dtype), ("forward", "full"))
