"""``slim_lstm``: an LSTM on the active gate-block slices of full-width weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.ops._common import autocast_dtype, autograd, define, grad_needed
from slimkernels.ops._recurrent import check_layers, check_states, check_steps, run_layers
from slimkernels.ops._recurrent_gpu import lstm, lstm_layer, lstm_layer_backward, on_gpu, recomputes, used
from slimkernels.reference import slim_lstm as reference

State = tuple[Tensor, Tensor]


def slim_lstm(
    x: Tensor,  # (steps, batch, i), or (rows, i) with batch_sizes
    weights: Sequence[
        Tensor
    ],  # of each layer and direction: w_ih (4 H, I), w_hh (4 H, H), [b_ih, b_hh (4 H,)], [w_hr (P, H)]
    hidden_size: int | None = None,  # h <= H; None means H
    state: State | None = None,  # h0 (num_layers * D, batch, p) and c0 (num_layers * D, batch, h); None means zeros
    *,
    num_layers: int = 1,
    bidirectional: bool = False,  # D = 2
    proj_size: int | None = None,  # p <= P where there is a projection; None means P
    in_blocks: int = 1,
    batch_sizes: Tensor | None = None,  # (steps,) of a PackedSequence
    dropout: float = 0.0,
    recompute: bool = False,
) -> tuple[Tensor, State]:  # (*, D * p) and the final states, p = h without projection
    """LSTM on the first ``h`` rows of each of the four gate blocks of its weights.

    Equivalent to ``torch.nn.LSTM`` with ``w_ih.unflatten(0, (4, H))[:, :h, :i]`` and so on for its weights. Input
    columns are the first ``i``, in ``in_blocks`` equal parts; the layers above a bidirectional one read two parts.
    ``dropout`` is applied to the input of each layer but the first. With ``recompute`` the gates are not kept for
    backward but computed again there. On a GPU this is one call of cuDNN, on copies of the active slices; it keeps what it
    needs.

    Without gradients on the CPU the active weights are packed once per version and width and the copy is kept (256 MiB in all,
    until the weights are gone): at the first call where it has fewer than 24 rows (streaming), else from the second on. Weights
    made in the call, views and those of inference mode are not kept. A write through ``.data``, which PyTorch does not count,
    is noticed by the first and last element of each weight. What the CPU keeps for backward, if it is 32 MiB or
    more, is memory that earlier steps gave back; up to 256 MiB of it stay with the process,
    until ``slimkernels.empty_cache()``.

    Raises: ValueError when a shape, a width, the batch sizes or the number of weights does not fit, TypeError when
    dtypes differ.
    Numerics: 16-bit inputs are multiplied and summed in float32, the cell state is float32 within a call; h is rounded
    at each step.
    Source: Li et al., Subnetwork-to-go (arXiv 2312.03464), section 2.
    """
    op, directions = "slim_lstm", 2 if bidirectional else 1
    h, p = check_layers(
        op, x, weights, 4, hidden_size, proj_size, num_layers, directions, in_blocks, counts=(2, 3, 4, 5)
    )
    batch = check_steps(op, x, batch_sizes)
    h0, c0 = (None, None) if state is None else state
    if state is None and batch_sizes is not None:
        h0, c0 = (x.new_zeros(num_layers * directions, batch, size) for size in (p or h, h))
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
        h0, c0 = (None if t is None else t.to(dtype) for t in (h0, c0))
        weights = [w if w.dtype == dtype else w.to(dtype)[:] for w in weights]  # views: no packed copy is kept
    check_states(op, x, weights, (h0, c0), (p or h, h), num_layers * directions, batch, dropout)
    if used(x):
        y, h_n, c_n = lstm(x, h0, c0, weights, batch_sizes, num_layers, bidirectional, h, p, in_blocks, dropout)
        return y, (h_n, c_n)
    needed = grad_needed(x, h0, c0, *weights)
    if not needed and not dropout:
        y, h_n, c_n = INFERENCE(x, h0, c0, weights, batch_sizes, num_layers, bidirectional, h, p, in_blocks)
        return y, (h_n, c_n)
    save = needed and (not recompute or recomputes(x))

    def run(x, states, weights, blocks):
        return LAYER(x, *states, weights, batch_sizes, bidirectional, h, p, blocks, save)[:3]

    y, h_n, c_n = run_layers(run, x, weights, (h0, c0), num_layers, bidirectional, in_blocks, dropout)
    return y, (h_n, c_n)


def _inference(x, h0, c0, weights, batch_sizes, num_layers, bidirectional, hidden_size, proj_size, in_blocks):
    """All layers, nothing kept for backward; by the op of a single layer, whatever its device has."""

    def run(x, states, weights, blocks):
        return LAYER(x, *states, weights, batch_sizes, bidirectional, hidden_size, proj_size, blocks, False)[:3]

    return run_layers(run, x, weights, (h0, c0), num_layers, bidirectional, in_blocks)


def _inference_fake(x, h0, c0, weights, batch_sizes, num_layers, bidirectional, hidden_size, proj_size, in_blocks):
    d, state = 2 if bidirectional else 1, proj_size or hidden_size
    batch = x.shape[1] if batch_sizes is None else h0.shape[1]
    return (
        x.new_empty((*x.shape[:-1], d * state)),
        x.new_empty((num_layers * d, batch, state)),
        x.new_empty((num_layers * d, batch, hidden_size)),
    )


def _fake(x, h0, c0, weights, batch_sizes, bidirectional, hidden_size, proj_size, in_blocks, save):
    keeps = save and not recomputes(x)
    d, state = 2 if bidirectional else 1, proj_size or hidden_size
    batch = x.shape[1] if batch_sizes is None else h0.shape[1]
    return (
        x.new_empty((*x.shape[:-1], d * state)),
        x.new_empty((d, batch, state)),
        x.new_empty((d, batch, hidden_size)),
        x.new_empty((d, *x.shape[:-1], 4, hidden_size) if keeps else (0,)),
        x.new_empty((d, *x.shape[:-1], hidden_size) if keeps else (0,)),
    )


def _backward_fake(
    dy, dh_n, dc_n, x, h0, c0, weights, batch_sizes, y, gates, cells, bidirectional, hidden_size, proj_size, in_blocks,
    need_dx, need_dstate, need_dw,
):  # fmt: skip
    d, state = 2 if bidirectional else 1, proj_size or hidden_size
    batch = x.shape[1] if batch_sizes is None else h0.shape[1]
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty((d, batch, state) if need_dstate else (0,)),
        x.new_empty((d, batch, hidden_size) if need_dstate else (0,)),
        [w.new_empty(w.shape) for w in weights] if need_dw else [],
    )


def _setup_context(ctx, inputs, output):
    x, h0, c0, weights, batch_sizes, *ctx.sizes, ctx.saved = inputs
    y, _, _, gates, cells = output
    ctx.count = len(weights)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gates, cells)
    kept = (y, gates, cells) if ctx.saved else (None, None, None)
    ctx.save_for_backward(x, h0, c0, batch_sizes, *kept, *weights)


def _backward(ctx, dy, dh_n, dc_n, *_):
    x, h0, c0, batch_sizes, y, gates, cells, *weights = ctx.saved_tensors
    if not ctx.saved:
        y, _, _, gates, cells = torch.ops.slimkernels.slim_lstm.default(
            x, h0, c0, weights, batch_sizes, *ctx.sizes, True
        )
    need_x, need_h, need_c, need_weights, *_ = ctx.needs_input_grad
    need_dw = any(need_weights)
    dx, dh0, dc0, dw = torch.ops.slimkernels.slim_lstm_backward.default(
        dy, dh_n, dc_n, x, h0, c0, weights, batch_sizes, y, gates, cells, *ctx.sizes, need_x, need_h or need_c, need_dw
    )
    dw = [g if need else None for g, need in zip(dw, need_weights, strict=True)] if need_dw else [None] * ctx.count
    return dx if need_x else None, dh0 if need_h else None, dc0 if need_c else None, dw, *([None] * 6)


define(
    "slim_lstm(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, bool bidirectional,"
    " SymInt hidden_size, SymInt proj_size, SymInt in_blocks, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    default=reference.slim_lstm,
)
define(
    "slim_lstm_inference(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, int num_layers,"
    " bool bidirectional, SymInt hidden_size, SymInt proj_size, SymInt in_blocks) -> (Tensor, Tensor, Tensor)",
    fake=_inference_fake,
    default=_inference,
)
define(
    "slim_lstm_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights,"
    " Tensor? batch_sizes, Tensor y, Tensor gates, Tensor cells, bool bidirectional, SymInt hidden_size,"
    " SymInt proj_size, SymInt in_blocks, bool need_dx, bool need_dstate, bool need_dw)"
    " -> (Tensor, Tensor, Tensor, Tensor[])",
    fake=_backward_fake,
    default=reference.slim_lstm_backward,
)
autograd("slim_lstm", _backward, _setup_context)
LAYER, INFERENCE = torch.ops.slimkernels.slim_lstm.default, torch.ops.slimkernels.slim_lstm_inference.default
on_gpu("slim_lstm_inference", lstm)
on_gpu("slim_lstm", lstm_layer)
on_gpu("slim_lstm_backward", lstm_layer_backward)
