"""LSTM and GRU on GPUs: PyTorch's own call of cuDNN, on the active slices packed into one buffer.

cuDNN reads no strides: it wants all weights one after another. So every call copies the active slices, once, to where
cuDNN wants them; the weights of a layer are used in each of its steps, and the copy is small beside those.

A compiled model calls the ops of single layers. Their backward runs cuDNN's forward once more: what that keeps has a size
that only cuDNN knows, so it cannot be an output of an op.
"""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from slimkernels.ops._common import LIBRARY
from slimkernels.reference._recurrent import split_weights
from slimkernels.reference._slice import block_slice, block_unslice

LSTM, GRU = 2, 3  # as cuDNN numbers them


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


def recomputes(x: Tensor) -> bool:
    """Whether the op of a layer with ``x`` keeps nothing for its backward."""
    return x.device.type == "cuda" and HAS_CUDNN


def cudnn(
    kind: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    packed: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    hidden: int,
    projected: int,
    train: bool,
) -> tuple[tuple, tuple]:
    """One layer by cuDNN: the arguments that its backward begins and goes on with, and its results."""
    hx = _state(h0, x, 1, bidirectional, projected or hidden)
    states = hx, _state(c0, x, 1, bidirectional, hidden) if kind == LSTM else None
    sizes = [] if batch_sizes is None else batch_sizes.tolist()
    begin = x.contiguous(), packed, len(packed) // (2 if bidirectional else 1)
    rest = kind, hidden, projected, 1, False, 0.0, train, bidirectional, sizes, None
    *found, reserve, buffer = FORWARD(*begin, None, *states, *rest)
    return (*begin, buffer, *states), (found, rest, reserve)


def layer(
    kind: int, x, h0, c0, weights, batch_sizes, bidirectional, hidden, projected, in_blocks, save
) -> tuple[Tensor, ...]:  # y, h_n, [c_n], and what other devices keep: empty
    gates, state = (4, projected or hidden) if kind == LSTM else (3, hidden)
    packed = pack(weights, gates, x.shape[-1], in_blocks, hidden, state, 1, bidirectional)
    _, (found, *_) = cudnn(kind, x, h0, c0, packed, batch_sizes, bidirectional, hidden, projected, False)
    if kind == GRU:
        return *found[:2], x.new_empty(0)
    return *found, x.new_empty(0), x.new_empty(0)


def layer_backward(
    kind: int, dy, dh_n, dc_n, x, h0, c0, weights, batch_sizes, bidirectional, hidden, projected, in_blocks, *needs
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    gates, state = (4, projected or hidden) if kind == LSTM else (3, hidden)
    packed = pack(weights, gates, x.shape[-1], in_blocks, hidden, state, 1, bidirectional)
    begin, (found, rest, reserve) = cudnn(kind, x, h0, c0, packed, batch_sizes, bidirectional, hidden, projected, True)
    need_dx, need_dstate, need_dw = needs
    wanted = [need_dx, need_dstate, need_dstate and kind == LSTM, need_dw]
    dx, dh0, dc0, dw = BACKWARD(*begin, found[0], dy, dh_n, dc_n, *rest, reserve, wanted)
    full = []
    if need_dw:
        columns = {0: in_blocks}  # of each direction's weights only the first has blocks of columns
        per = len(weights) // (2 if bidirectional else 1)
        for k, (gradient, part, weight) in enumerate(zip(dw, packed, weights, strict=True)):
            is_projection = per % 2 == 1 and k % per == per - 1
            gradient = gradient.view(part.shape)
            if gradient.dim() == 2:
                gradient = block_unslice(gradient, 1, weight.shape[1], columns.get(k % per, 1))
            full.append(block_unslice(gradient, 0, weight.shape[0], 1 if is_projection else gates))
    empty = x.new_empty(0)
    return (
        dx.view(x.shape) if need_dx else empty,
        dh0 if need_dstate else empty.clone(),
        dc0 if wanted[2] else empty.clone(),
        full,
    )


def lstm_layer(x, h0, c0, weights, batch_sizes, bidirectional, hidden, projected, in_blocks, save):
    """The op ``slim_lstm``."""
    return layer(LSTM, x, h0, c0, weights, batch_sizes, bidirectional, hidden, projected, in_blocks, save)


def lstm_layer_backward(
    dy, dh_n, dc_n, x, h0, c0, weights, batch_sizes, y, gates, cells, bidirectional, hidden, projected, in_blocks, *needs
):  # fmt: skip
    """The op ``slim_lstm_backward``."""
    sizes = bidirectional, hidden, projected, in_blocks
    return layer_backward(LSTM, dy, dh_n, dc_n, x, h0, c0, weights, batch_sizes, *sizes, *needs)


def gru_layer(x, h0, weights, batch_sizes, bidirectional, hidden, in_blocks, save):
    """The op ``slim_gru``."""
    return layer(GRU, x, h0, None, weights, batch_sizes, bidirectional, hidden, 0, in_blocks, save)


def gru_layer_backward(dy, dh_n, x, h0, weights, batch_sizes, y, gates, bidirectional, hidden, in_blocks, *needs):
    """The op ``slim_gru_backward``."""
    sizes = bidirectional, hidden, 0, in_blocks
    dx, dh0, _, dw = layer_backward(GRU, dy, dh_n, None, x, h0, None, weights, batch_sizes, *sizes, *needs)
    return dx, dh0, dw


FORWARD, BACKWARD = torch.ops.aten._cudnn_rnn.default, torch.ops.aten._cudnn_rnn_backward.default
# On AMD's GPUs PyTorch's own layers call MIOpen; compiled ones run the reference there.
HAS_CUDNN = torch.version.hip is None and os.environ.get("SLIMKERNELS_DISABLE") != "1"


def on_gpu(name: str, run: Callable) -> None:
    """Make ``run`` the kernel of the op ``name`` for CUDA tensors: what a compiled model calls."""
    if HAS_CUDNN or (name.endswith("_inference") and os.environ.get("SLIMKERNELS_DISABLE") != "1"):
        LIBRARY.impl(name, run, "CUDA")
