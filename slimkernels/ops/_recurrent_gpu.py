"""LSTM and GRU on GPUs: PyTorch's own call of cuDNN, on the active slices packed into one buffer.

cuDNN reads no strides: it wants all weights one after another. So every call copies the active slices, once, to where
cuDNN wants them; the weights of a layer are used in each of its steps, and the copy is small beside those.
"""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from slimkernels.ops._common import LIBRARY
from slimkernels.reference._recurrent import split_weights
from slimkernels.reference._slice import block_slice


def used(x: Tensor) -> bool:
    """Whether a call with ``x`` is composed here: autograd then differentiates it. A compiled one calls the op."""
    return x.is_cuda and not torch.compiler.is_compiling() and os.environ.get("SLIMKERNELS_DISABLE") != "1"


def pack(
    weights: Sequence[Tensor],  # of each layer and direction: w_ih, w_hh, [b_ih, b_hh], [w_hr]
    gates: int,
    features: int,  # of the first layer's input
    in_blocks: int,
    hidden: int,
    state: int,  # of h, or of its projection
    num_layers: int,
    bidirectional: bool,
) -> list[Tensor]:
    """The active slices in the order of ``weights``, views of one buffer: all matrices, then all biases, as cuDNN has them."""
    directions, per_layer = 2 if bidirectional else 1, len(weights) // num_layers
    slices: list[Tensor] = []
    for layer in range(num_layers):
        columns, blocks = (directions * state, directions) if layer else (features, in_blocks)
        part = weights[layer * per_layer : (layer + 1) * per_layer]
        for w_ih, w_hh, b_ih, b_hh, w_hr in split_weights(part, bidirectional):
            slices.append(block_slice(block_slice(w_ih, 1, columns, blocks), 0, gates * hidden, gates))
            slices.append(block_slice(w_hh[:, :state], 0, gates * hidden, gates))
            slices += [block_slice(b, 0, gates * hidden, gates) for b in (b_ih, b_hh) if b is not None]
            if w_hr is not None:
                slices.append(w_hr[:state, :hidden])
    order = sorted(range(len(slices)), key=lambda k: slices[k].dim() == 1)
    flat = torch.cat([slices[k].reshape(-1) for k in order])
    parts = flat.split([slices[k].numel() for k in order])
    views = {k: part.view(slices[k].shape) for k, part in zip(order, parts, strict=True)}
    return [views[k] for k in range(len(slices))]


def lstm(
    x: Tensor,  # (steps, batch, i), or (rows, i) with batch_sizes
    h0: Tensor | None,  # (num_layers * D, batch, p)
    c0: Tensor | None,  # (num_layers * D, batch, h)
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    hidden_size: int,
    proj_size: int,
    in_blocks: int,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, h_n and c_n of ``slim_lstm``."""
    state = proj_size or hidden_size
    sizes = num_layers, bidirectional
    packed = pack(weights, 4, x.shape[-1], in_blocks, hidden_size, state, *sizes)
    states = [_state(h0, x, *sizes, state), _state(c0, x, *sizes, hidden_size)]
    return _run(torch.lstm, x, states, packed, batch_sizes, weights, *sizes, dropout)


def gru(
    x: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    hidden_size: int,
    in_blocks: int,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """y and h_n of ``slim_gru``."""
    sizes = num_layers, bidirectional
    packed = pack(weights, 3, x.shape[-1], in_blocks, hidden_size, hidden_size, *sizes)
    state = _state(h0, x, *sizes, hidden_size)
    return _run(torch.gru, x, state, packed, batch_sizes, weights, *sizes, dropout)


def _state(given: Tensor | None, x: Tensor, num_layers: int, bidirectional: bool, size: int) -> Tensor:
    if given is not None:
        return given.contiguous()
    return x.new_zeros(num_layers * (2 if bidirectional else 1), x.shape[1], size)  # packed input always has states


def _run(run, x, states, packed, batch_sizes, weights, num_layers, bidirectional, dropout):
    has_biases = len(weights) // (num_layers * (2 if bidirectional else 1)) >= 4
    train = dropout > 0 or (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *packed)))
    if batch_sizes is not None:
        return run(x, batch_sizes, states, packed, has_biases, num_layers, dropout, train, bidirectional)
    return run(x, states, packed, has_biases, num_layers, dropout, train, bidirectional, False)


def on_gpu(name: str, run: Callable) -> None:
    """Make ``run`` the kernel of the op ``name`` for CUDA tensors: what a compiled model calls."""
    if os.environ.get("SLIMKERNELS_DISABLE") != "1":
        LIBRARY.impl(name, run, "CUDA")
