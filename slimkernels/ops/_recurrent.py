"""What ``slim_lstm`` and ``slim_gru`` share: their checks and the walk over the layers."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from slimkernels.ops._common import check_float, check_no_tangents, check_same_dtype_device, check_shape


def check_layers(
    op: str,
    x: Tensor,
    weights: Sequence[Tensor],
    gates: int,
    hidden: int | None,
    proj: int | None,
    num_layers: int,
    directions: int,
    in_blocks: int,
    counts: tuple[int, ...],
) -> tuple[int, int]:
    """Checks x and every weight; returns the active hidden and projection sizes (0: none)."""
    check_float(op, x)
    per = len(weights) // max(num_layers * directions, 1)
    if per not in counts or per * num_layers * directions != len(weights):
        raise ValueError(
            f"{op}: expected weights to hold {', '.join(map(str, counts))} tensors for each of {num_layers} layers x"
            f" {directions} directions, got {len(weights)} tensors"
        )
    shapes = [w.shape for w in weights]
    state_shape = shapes[1]  # of every w_hh
    if len(state_shape) != 2 or state_shape[0] % gates:
        raise ValueError(f"{op}: expected w_hh of shape ({gates} * H, P), got {tuple(state_shape)}")
    rows, full_state = state_shape
    full = rows // gates
    has_proj = per % 2 == 1
    h = full if hidden is None else hidden
    if h < 1 or h > full:
        raise ValueError(f"{op}: expected hidden_size between 1 and {full}, got {h}")
    p = 0
    if has_proj:
        p = full_state if proj is None else proj
        if p < 1 or p > full_state:
            raise ValueError(f"{op}: expected proj_size between 1 and {full_state}, got {p}")
    elif proj:
        raise ValueError(f"{op}: expected no proj_size for weights without projection, got {proj}")
    elif full_state != full:
        raise ValueError(f"{op}: expected w_hh of shape ({rows}, {full}), got {tuple(state_shape)}")
    bias_shape = (rows,)
    for start in range(0, len(weights), per):
        layer = start // (per * directions)
        in_shape = shapes[start]
        if len(in_shape) != 2 or in_shape[0] != rows:
            raise ValueError(f"{op}: expected w_ih of shape ({rows}, I), got {tuple(in_shape)}")
        if layer == 0:
            check_input(op, x.shape[-1], in_shape[1], in_blocks)
        elif in_shape[1] != directions * full_state:
            raise ValueError(
                f"{op}: expected w_ih of layer {layer} of shape ({rows}, {directions * full_state}),"
                f" got {tuple(in_shape)}"
            )
        # Compared here first: a call costs more than the comparison, and a streaming step makes eight.
        if shapes[start + 1] != state_shape:
            check_shape(op, "w_hh", weights[start + 1], state_shape)
        if per >= 4 and (shapes[start + 2] != bias_shape or shapes[start + 3] != bias_shape):
            check_shape(op, "b_ih", weights[start + 2], bias_shape)
            check_shape(op, "b_hh", weights[start + 3], bias_shape)
        if has_proj:
            check_shape(op, "w_hr", weights[start + per - 1], (full_state, full))
    return h, p


def check_input(op: str, active: int, full: int, blocks: int) -> None:
    if blocks < 1 or full % blocks:
        raise ValueError(f"{op}: expected in_blocks to divide the full input size {full}, got {blocks}")
    if active < 1 or active > full:
        raise ValueError(f"{op}: expected x.shape[-1] between 1 and {full}, got {active}")
    if blocks > 1 and active % blocks:
        raise ValueError(f"{op}: expected x.shape[-1] to be a multiple of in_blocks={blocks}, got {active}")


def check_steps(op: str, x: Tensor, batch_sizes: Tensor | None) -> int:
    """Checks the dimensions of x and the batch sizes; returns the size of the batch."""
    if batch_sizes is None:
        if x.dim() != 3:
            raise ValueError(f"{op}: expected x to have 3 dimensions (steps, batch, i), got shape {tuple(x.shape)}")
        if x.shape[0] < 1:
            raise ValueError(f"{op}: expected x to have at least 1 step, got shape {tuple(x.shape)}")
        return x.shape[1]
    if x.dim() != 2:
        raise ValueError(f"{op}: expected packed x to have 2 dimensions (rows, i), got shape {tuple(x.shape)}")
    if batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise TypeError(
            f"{op}: expected batch_sizes of dtype torch.int64 on the CPU,"
            f" got {batch_sizes.dtype} on {batch_sizes.device}"
        )
    sizes = batch_sizes.tolist()
    if not sizes or sizes[-1] < 1 or any(a < b for a, b in pairwise(sizes)):
        raise ValueError(
            f"{op}: expected batch_sizes to be positive and never to grow (no empty sequence), got {sizes}"
        )
    if sum(sizes) != x.shape[0]:
        raise ValueError(f"{op}: expected batch_sizes to sum to the {x.shape[0]} rows of x, got {sum(sizes)}")
    return sizes[0]


def check_states(
    op: str,
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor | None],
    state_sizes: Sequence[int],
    all_layers: int,  # num_layers * directions
    batch: int,
    dropout: float,
) -> None:
    check_no_tangents(op, x, *weights, *states)
    for name, state, size in zip(("h0", "c0"), states, state_sizes, strict=False):
        if state is not None:
            check_shape(op, name, state, (all_layers, batch, size))
            if state.dtype != x.dtype or state.device != x.device:
                check_same_dtype_device(op, x, **{name: state})
    dtype, device = x.dtype, x.device
    for weight in weights:
        if weight.dtype != dtype or weight.device != device:
            check_same_dtype_device(op, x, weights=weight)
    if not 0 <= dropout <= 1:
        raise ValueError(f"{op}: expected dropout between 0 and 1, got {dropout}")


def run_layers(
    run: Callable[
        ..., tuple[Tensor, ...]
    ],  # (x, states of the layer, weights of the layer, in_blocks) -> y and final states
    x: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor | None],
    num_layers: int,
    bidirectional: bool,
    in_blocks: int,
    dropout: float = 0.0,
) -> tuple[Tensor, ...]:
    """y and the final states, each (num_layers * directions, batch, size)."""
    if num_layers == 1:
        return run(x, states, weights, in_blocks)
    directions, per_layer = 2 if bidirectional else 1, len(weights) // num_layers
    finals: list[tuple[Tensor, ...]] = []
    for layer in range(num_layers):
        if layer and dropout:
            x = F.dropout(x, dropout, True)
        at = slice(layer * directions, (layer + 1) * directions)
        x, *final = run(
            x,
            [None if state is None else state[at] for state in states],
            weights[layer * per_layer : (layer + 1) * per_layer],
            directions if layer else in_blocks,
        )
        finals.append(tuple(final))
    return x, *(torch.cat(parts) for parts in zip(*finals, strict=True))
