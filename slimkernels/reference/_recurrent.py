"""What the recurrent references share: the weights of a direction, the walk over time, the gradients of the weights.

Rows are (step, sequence) pairs in memory order. ``batch_sizes`` lists how many sequences are still running at each step
(they are sorted by length, as in a PackedSequence), so the rows of a step are the first sequences of the batch.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.reference._slice import block_slice, block_unslice


class Direction(NamedTuple):
    """Active slices of the weights of one direction, G gate blocks of h rows."""

    w_ih: Tensor  # (G * h, i)
    w_hh: Tensor  # (G * h, p), p the size of the state: h, or the projection's
    b_ih: Tensor | None  # (G * h,)
    b_hh: Tensor | None
    w_hr: Tensor | None  # (p, h)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Gates and cell state of 16-bit inputs are computed in float32."""
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def split_weights(weights: Sequence[Tensor], bidirectional: bool) -> list[Parts]:
    """(w_ih, w_hh, b_ih, b_hh, w_hr) of each direction from the flat list; None for what the layer does not have."""
    count = len(weights) // (2 if bidirectional else 1)
    bias, proj = count >= 4, count % 2 == 1
    found: list[Parts] = []
    for start in range(0, len(weights), count):
        part = weights[start : start + count]
        b_ih, b_hh = (part[2], part[3]) if bias else (None, None)
        found.append((part[0], part[1], b_ih, b_hh, part[-1] if proj else None))
    return found


def directions(
    weights: Sequence[Tensor],
    bidirectional: bool,
    gates: int,
    in_features: int,
    in_blocks: int,
    hidden: int,
    state: int,
) -> list[Direction]:
    """The active slices, in the dtype to compute in."""
    result = []
    weights = [w.to(compute_dtype(w)) for w in weights]
    for w_ih, w_hh, b_ih, b_hh, w_hr in split_weights(weights, bidirectional):
        result.append(
            Direction(
                block_slice(block_slice(w_ih, 1, in_features, in_blocks), 0, gates * hidden, gates),
                block_slice(w_hh[:, :state], 0, gates * hidden, gates),
                None if b_ih is None else block_slice(b_ih, 0, gates * hidden, gates),
                None if b_hh is None else block_slice(b_hh, 0, gates * hidden, gates),
                None if w_hr is None else w_hr[:state, :hidden],
            )
        )
    return result


def step_sizes(x: Tensor, batch_sizes: Tensor | None) -> list[int]:
    """Sequences running at each step; ``x`` is (steps, batch, i), or (rows, i) with ``batch_sizes``."""
    return [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()


def walk(sizes: list[int], reverse: bool) -> Iterator[tuple[int, int, slice]]:
    """(step, sequences running, rows) in the order of the recurrence."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    order = range(len(sizes))
    for t in reversed(order) if reverse else order:
        yield t, sizes[t], slice(starts[t], starts[t + 1])


def advance(state: Tensor, new: Tensor, running: int) -> Tensor:
    """``state`` (batch, *) with the first ``running`` rows replaced."""
    return new if running == state.shape[0] else torch.cat([new, state[running:]])


def initial(state: Tensor | None, direction: int, x: Tensor, size: int) -> Tensor:
    dtype = compute_dtype(x)
    return x.new_zeros(x.shape[1], size, dtype=dtype) if state is None else state[direction].to(dtype)


def weight_gradients(
    weights: Sequence[Tensor],
    bidirectional: bool,
    gates: int,
    in_blocks: int,
    parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]],  # of each direction, see below
) -> list[Tensor]:
    """Full-size gradients, zero outside the slice, in the order of ``weights``.

    ``parts``: gradients at the input half (rows, G * h) and at the recurrent half (rows, G * h) of the gates, the
    inputs (rows, i), the previous states (rows, p), and the gradient of the active ``w_hr`` or None.
    """
    result = []
    for (w_ih, w_hh, b_ih, b_hh, w_hr), (dx_gates, dh_gates, x, previous, dw_hr) in zip(
        split_weights(weights, bidirectional), parts, strict=True
    ):
        rows = w_ih.shape[0]
        dw_ih = block_unslice(dx_gates.t().mm(x), 1, w_ih.shape[1], in_blocks)
        dw_hh = block_unslice(dh_gates.t().mm(previous), 1, w_hh.shape[1])
        result += [block_unslice(dw_ih, 0, rows, gates), block_unslice(dw_hh, 0, rows, gates)]
        if b_ih is not None:
            result.append(block_unslice(dx_gates.sum(0), 0, rows, gates))
        if b_hh is not None:
            result.append(block_unslice(dh_gates.sum(0), 0, rows, gates))
        if w_hr is not None and dw_hr is not None:
            result.append(block_unslice(block_unslice(dw_hr, 1, w_hr.shape[1]), 0, w_hr.shape[0]))
    return [dw.to(weights[0].dtype) for dw in result]
