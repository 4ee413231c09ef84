"""LSTM, GRU and their cells for the converter: which axes of their weights are cut.

The sides of a recurrent layer beside ``in`` and ``out`` (the hidden units of both directions): ``gates``, the rows of its
weights (3 or 4 blocks of the hidden units); ``state``, the hidden units that each step takes in; ``next``, those that the
layers stacked on the first take in. All of them are slices of one width dimension, that of the hidden units, and have one
order for both directions and all stacked layers.

A projection (``proj_size``) makes two width dimensions of it: that of the projection has ``out``, ``state`` and ``next``; that
of the hidden units has ``gates`` and ``cell``, the cell states, which the projection takes in.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

LAYERS, CELLS = (nn.LSTM, nn.GRU), (nn.LSTMCell, nn.GRUCell)
SIDES = {"in": "input_size", "out": "", "gates": "", "next": "", "state": "hidden_size"}
PROJECTED = SIDES | {"state": "proj_size", "cell": "hidden_size"}
HIDDEN = ":hidden"  # ends the name of the dimension of the hidden units where a projection has the layer's own name


def size_of(module: Any, side: str) -> int:
    """Full size of a side."""
    if side == "in":
        return module.input_size
    if side in ("gates", "cell"):
        return module.hidden_size * (gates(module) if side == "gates" else 1)
    return (projection(module) or module.hidden_size) * (1 if side == "state" else directions(module))


def projection(module: Any) -> int:
    """Full size of the projection, 0 without one."""
    return getattr(module, "proj_size", 0)


def state_sides(module: Any) -> tuple[str, str]:
    """The sides of an LSTM's hidden state and cell state; a GRU has only the first."""
    return "state", "cell" if projection(module) else "state"


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
            if projection(module):
                found[f"weight_hr_l{layer}{suffix}"] = {0: "state", 1: "cell"}
    return found


def same_units(module: Any) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
    """Pairs of (side, position) that stand for the same hidden unit, or output of the projection."""
    state, cell = state_sides(module)
    for whole, sides in ((state, ("out", "next")), (cell, ("gates",))):
        n = size_of(module, whole)
        for side in sides:
            for position in range(size_of(module, side)):
                yield (whole, position % n), (side, position)


def macs_of(module: Any) -> list[tuple[tuple[str, str], int]]:
    """((side taken in, side put out), multiplications by a matrix of that size), for every step of every sequence."""
    both = directions(module)
    found = [(("in", "gates"), both), (("state", "gates"), both * layers(module))]
    if projection(module):
        found.append((("cell", "state"), both * layers(module)))
    return found if layers(module) == 1 else [*found, (("next", "gates"), both * (layers(module) - 1))]


def steps_of(module: Any, output: Any) -> int:
    """Steps of all sequences together that made an output."""
    if isinstance(module, nn.RNNCellBase):
        h = output[0] if isinstance(output, tuple) else output
        return h.numel() // module.hidden_size
    y = output[0].data if isinstance(output[0], PackedSequence) else output[0]
    return y.numel() // size_of(module, "out")


@dataclass(frozen=True)
class CutStates:
    """Hook before a forward: the first units of initial states that the network writes at the full sizes."""

    full: tuple[int, ...]

    def __call__(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hx = given_states(args, kwargs)
        if hx is None:
            return args, kwargs
        cut = tuple(
            state.narrow(-1, 0, n) if state.shape[-1] == full else state
            for state, full, n in zip(as_states(hx), self.full, state_sizes(module), strict=False)
        )
        return (args[:1] or (kwargs["input"],)), {"hx": cut[0] if isinstance(hx, Tensor) else cut}


def given_states(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The initial states of a call, None where there are none."""
    return args[1] if len(args) > 1 else kwargs.get("hx")


def as_states(hx: Any) -> tuple[Tensor, ...]:
    return () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)


def state_sizes(module: Any) -> tuple[int, ...]:
    """Full sizes of the states."""
    return tuple(size_of(module, side) for side in state_sides(module))


def refresh(module: Any) -> None:
    """Bring the list of weights that torch's own layers (not the cells) read up to date with the parameters."""
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
