"""LSTM, GRU and their cells for the converter: which axes of their weights are cut.

The sides of a recurrent layer beside ``in`` and ``out`` (the hidden units of both directions): ``gates``, the rows of its
weights (3 or 4 blocks of the hidden units); ``state``, the hidden units that each step takes in; ``next``, those that the
layers stacked on the first take in. All of them are slices of one width dimension, that of the hidden units, and have one
order for both directions and all stacked layers.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
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
