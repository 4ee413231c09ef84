"""LSTM, GRU and their cells for the converter: which axes of their weights are cut, and what stands in for them while tracing.

The sides of a recurrent layer beside ``in`` and ``out`` (the hidden units of both directions): ``gates``, the rows of its
weights (3 or 4 blocks of the hidden units); ``state``, the hidden units that each step takes in; ``next``, those that the
layers stacked on the first take in. All of them are slices of one width dimension, that of the hidden units, and have one
order for both directions and all stacked layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

LAYERS, CELLS = (nn.LSTM, nn.GRU), (nn.LSTMCell, nn.GRUCell)
SIDES = {"in": "input_size", "out": "", "gates": "", "next": "", "state": "hidden_size"}


def size_of(module: Any, side: str) -> int:
    """Full size of a side."""
    if side == "in":
        return module.input_size
    hidden = module.hidden_size
    return hidden * {"state": 1, "gates": gates(module)}.get(side, directions(module))


def gates(module: Any) -> int:
    if isinstance(module, nn.RNNCellBase):
        return 4 if isinstance(module, nn.LSTMCell) else 3
    return {"LSTM": 4, "GRU": 3}[module.mode]


def directions(module: Any) -> int:
    return 2 if getattr(module, "bidirectional", False) else 1


def layers(module: Any) -> int:
    return getattr(module, "num_layers", 1)


def axes_of(module: Any) -> dict[str, dict[int, str]]:
    """Parameter name -> {axis: side}."""
    found: dict[str, dict[int, str]] = {}
    if isinstance(module, nn.RNNCellBase):
        found |= {"weight_ih": {0: "gates", 1: "in"}, "weight_hh": {0: "gates", 1: "state"}}
        return found | {"bias_ih": {0: "gates"}, "bias_hh": {0: "gates"}}
    for layer in range(module.num_layers):
        for suffix in ("", "_reverse")[: directions(module)]:
            found[f"weight_ih_l{layer}{suffix}"] = {0: "gates", 1: "next" if layer else "in"}
            found[f"weight_hh_l{layer}{suffix}"] = {0: "gates", 1: "state"}
            found[f"bias_ih_l{layer}{suffix}"] = {0: "gates"}
            found[f"bias_hh_l{layer}{suffix}"] = {0: "gates"}
    return found


def same_units(module: Any) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
    """Pairs of (side, position) that stand for the same hidden unit."""
    hidden = module.hidden_size
    for side in ("out", "gates", "next"):
        for position in range(size_of(module, side)):
            yield ("state", position % hidden), (side, position)


def macs_of(module: Any) -> list[tuple[tuple[str, str], int]]:
    """((side taken in, side put out), multiplications by a matrix of that size), for every step of every sequence."""
    both = directions(module)
    found = [(("in", "gates"), both), (("state", "gates"), both * layers(module))]
    return found if layers(module) == 1 else [*found, (("next", "gates"), both * (layers(module) - 1))]


def steps_of(module: Any, output: Any) -> int:
    """Steps of all sequences together that made an output."""
    if isinstance(module, nn.RNNCellBase):
        h = output[0] if isinstance(output, tuple) else output
        return h.numel() // module.hidden_size
    y = output[0].data if isinstance(output[0], PackedSequence) else output[0]
    return y.numel() // size_of(module, "out")


def refresh(module: Any) -> None:
    """Bring the list of weights that torch's own layers (not the cells) read up to date with the parameters."""
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


class _StandIn(nn.Module):
    """Has the inputs, outputs and coupled channels of a recurrent layer, in operations that the trace knows."""

    linear: nn.Linear
    mode: str
    hidden_size: int
    num_layers: int
    bidirectional: bool
    batch_first: bool

    def forward(self, x: Any, hx: Any = None) -> Any:
        if isinstance(x, PackedSequence):
            data, batch = self.linear(x.data), int(x.batch_sizes[0])
            return PackedSequence(data, *x[1:]), self._states(data[:batch], 1)
        y = self.linear(x)
        for state in () if hx is None else (hx,) if isinstance(hx, Tensor) else hx:
            start = state.sum(0)  # (batch, h)
            if x.dim() == 3:
                start = start.unsqueeze(1 if self.batch_first else 0)
            y = y + torch.cat([start] * directions(self), -1)
        last = y.select(1 if x.dim() == 3 and self.batch_first else 0, -1)
        return y, self._states(last, x.dim() - 2)

    def _states(self, last: Tensor, batched: int) -> Any:  # (batch, D * h) or (D * h,) -> (layers * D, batch, h)
        parts = last.split(self.hidden_size, -1) if self.bidirectional else [last]
        state = torch.stack([*parts] * self.num_layers)
        return state if self.mode == "GRU" else (state, state)


class _CellStandIn(nn.Module):
    """Likewise for a cell."""

    linear: nn.Linear
    two_states: bool

    def forward(self, x: Tensor, hx: Any = None) -> Any:  # (batch, i) or (i,)
        y = self.linear(x)
        for state in () if hx is None else (hx,) if isinstance(hx, Tensor) else hx:
            y = y + state
        return (y, y * 1.0) if self.two_states else y


@contextmanager
def stand_ins(model: nn.Module, names: dict[int, str]) -> Iterator[dict[int, str]]:
    """Every LSTM, GRU and cell of a model replaced by a stand-in, whose linear layer ``names`` then has under the layer's name.

    Only the classes and contents of the modules change: whoever holds one keeps it.
    """
    found = [m for m in model.modules() if isinstance(m, (*LAYERS, *CELLS)) and not getattr(m, "proj_size", 0)]
    before = [(m.__class__, m._parameters, m._modules) for m in found]
    known = dict(names)
    module: Any
    try:
        for module in found:
            weight = module._parameters[next(iter(axes_of(module)))]
            linear = nn.Linear(module.input_size, size_of(module, "out"), device=weight.device, dtype=weight.dtype)
            known[id(linear)] = names[id(module)]
            cell = isinstance(module, nn.RNNCellBase)
            if cell:
                module.two_states = isinstance(module, nn.LSTMCell)
            module.__class__ = _CellStandIn if cell else _StandIn
            module.__dict__.update(_parameters={}, _modules={"linear": linear})
        yield known
    finally:
        for module, (cls, parameters, modules) in zip(found, before, strict=True):
            module.__class__ = cls
            module.__dict__.update(_parameters=parameters, _modules=modules)
            module.__dict__.pop("two_states", None)
