"""What the benchmarks of slim_lstm and slim_gru share: the three providers of a recurrent layer."""

from dataclasses import dataclass

import torch
from torch import _VF, Tensor, nn

from benchmarks.harness import Problem
from slimkernels.nn import SlimGRU, SlimLSTM


@dataclass(frozen=True)
class Layer:
    kind: str  # LSTM or GRU
    full_inputs: int
    full_hidden: int
    layers: int
    bidirectional: bool
    width: float

    @property
    def inputs(self) -> int:
        return round(self.full_inputs * self.width)

    @property
    def hidden(self) -> int:
        return round(self.full_hidden * self.width)

    @property
    def gates(self) -> int:
        return 4 if self.kind == "LSTM" else 3

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


def active(layer: Layer, full: Tensor, rows: int, columns: int | None, blocks: int = 1) -> Tensor:
    """The gate-block slice of a weight (or bias), as a plain layer holds it."""
    part = full.unflatten(0, (layer.gates, -1))[:, : rows // layer.gates].flatten(0, 1)
    return part if columns is None else part.unflatten(1, (blocks, -1))[:, :, : columns // blocks].flatten(1)


class Sliced(nn.Module):
    """The usual slicing code around torch's own kernels."""

    def __init__(self, layer: Layer, full: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        for name, parameter in full.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))

    def forward(self, x: Tensor, state: Tensor | None = None):
        layer, h = self.layer, self.layer.hidden
        weights = []
        for name, parameter in self.named_parameters():
            if name.startswith("bias"):
                weights.append(active(layer, parameter, layer.gates * h, None))
            elif name.startswith("weight_hh"):
                weights.append(active(layer, parameter, layer.gates * h, h))
            else:
                first = "_l0" in name
                columns, blocks = (layer.inputs, 1) if first else (layer.directions * h, layer.directions)
                weights.append(active(layer, parameter, layer.gates * h, columns, blocks))
        if state is None:
            state = x.new_zeros(layer.layers * layer.directions, x.shape[1], h)
        if layer.kind == "LSTM":
            y, *final = _VF.lstm(
                x, (state, state), weights, True, layer.layers, 0.0, self.training, layer.bidirectional, False
            )
            return y, tuple(final)
        return _VF.gru(x, state, weights, True, layer.layers, 0.0, self.training, layer.bidirectional, False)


def build(layer: Layer, steps: int, batch: int, dtype: torch.dtype = torch.float32, state: bool = False) -> Problem:
    make = {"bidirectional": layer.bidirectional}
    slim, torchs = (SlimLSTM, nn.LSTM) if layer.kind == "LSTM" else (SlimGRU, nn.GRU)
    ours = slim(layer.full_inputs, layer.full_hidden, layer.layers, **make)
    ours.set_width(layer.hidden)
    plain = torchs(layer.inputs, layer.hidden, layer.layers, **make)
    full = dict(ours.named_parameters())

    def cut(weight: Tensor, like: Tensor) -> Tensor:
        blocks = layer.directions if like.dim() == 2 and like.shape[1] == layer.directions * layer.hidden else 1
        return active(layer, weight, like.shape[0], like.shape[1] if like.dim() == 2 else None, blocks)

    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(cut(full[name], parameter))
    inputs: tuple[Tensor, ...] = (torch.randn(steps, batch, layer.inputs, dtype=dtype, requires_grad=True),)
    if state:
        inputs += (torch.randn(layer.layers * layer.directions, batch, layer.hidden, dtype=dtype),)
    sliced = Sliced(layer, ours)
    return Problem(ours.to(dtype), plain.to(dtype), sliced.to(dtype), inputs, cut)
