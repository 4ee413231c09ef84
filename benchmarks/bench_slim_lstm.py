"""``SlimLSTM`` at a width against nn.LSTM of that size and torch's LSTM on sliced weights: the band-split RNN's layer, over whole
pieces, and over time in one direction and one step a call: of one sequence and of all bands."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.harness import Case
from benchmarks.recurrent import Layer, build

# Bidirectional, 41 bands x 259 frames of 3 s of music: over time and over bands.
LAYERS = {"BSRNN-time": (259, 41), "BSRNN-band": (41, 259)}
STREAMS = {"LSTM-stream": 1, "BSRNN-stream": 41}


def cases(quick: bool) -> Iterator[Case]:
    for net, (steps, batch) in LAYERS.items():
        for width in (0.25, 1.0) if quick else (0.25, 0.5, 0.75, 1.0):
            layer = Layer("LSTM", 128, 256, 1, True, width)
            name = f"T{steps}-B{batch}-I{layer.inputs}-H{layer.hidden}x2"
            dtypes = (torch.float32, torch.bfloat16) if width in (0.25, 1.0) else (torch.float32,)
            for dtype in dtypes:
                yield Case(net, width, name, dtype, partial(build, layer, steps, batch, dtype), ("forward", "full"))
    for net, batch in STREAMS.items():
        for width in (0.25, 1.0) if quick else (0.25, 0.5, 0.75, 1.0):
            layer = Layer("LSTM", 128, 256, 1, False, width)
            name = f"T1-B{batch}-I{layer.inputs}-H{layer.hidden}"
            for dtype in (torch.float32, torch.bfloat16) if width in (0.25, 1.0) else (torch.float32,):
                yield Case(net, width, name, dtype, partial(build, layer, 1, batch, dtype), ("forward",))
