"""``slim_linear``: a linear layer on the active block slice of a full-width weight."""

import torch
from torch import Tensor

from slimkernels.ops._common import (
    OUTPUT_ACTIVATIONS,
    autocast_dtype,
    autograd,
    check_activation,
    check_float,
    check_same_dtype_device,
    check_shape,
    define,
    grad_needed,
    on_gpu,
)
from slimkernels.ops._eager import eager
from slimkernels.ops._slots import cast_slice, deposit, slot_of, stand_in
from slimkernels.ops.activation import activation as apply_activation
from slimkernels.ops.activation import activation_grad
from slimkernels.reference import slim_linear as reference

_eager = eager("slim_linear")


def slim_linear(
    x: Tensor,  # (*, k), k <= K
    weight: Tensor,  # (N, K), read through its strides, never copied
    bias: Tensor | None = None,  # (N,) or None
    out_features: int | None = None,  # n <= N; None means N
    *,
    in_blocks: int = 1,
    out_blocks: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,  # (*, n), added before the activation
) -> Tensor:  # (*, n)
    """Linear layer on the first ``n`` rows and ``k`` columns of a full-width weight.

    Equivalent to ``act(F.linear(x, weight[:n, :k], bias[:n]) + residual)``. With ``in_blocks`` / ``out_blocks`` the
    dimension is made of that many equal parts, each cut to its first ``k // in_blocks`` / ``n // out_blocks`` entries
    (packed QKV: 3 out blocks; GLU: 2; the layer after a bidirectional LSTM: 2 in blocks).

    CPU: on AVX-512 a kernel of tiles on oneDNN's brgemm with everything after the product fused in (a pass over the
    weight's rows for at most 4 rows of x); the reference for float64, an empty x, a weight with no unit stride, and on
    older CPUs, where F.linear is faster. GPU: Triton, everything after the product fused in; float64 runs the reference.

    Raises: ValueError when a shape, a width or the activation's name does not fit, TypeError when dtypes differ.
    Numerics: 16-bit inputs are multiplied and summed in float32 and rounded once, at the store. On a GPU float32 is
    multiplied in tf32 when ``torch.backends.cuda.matmul.fp32_precision`` (or ``torch.backends.fp32_precision``) says so.
    Source: Yu et al., Slimmable Neural Networks (arXiv 1812.08928), section 3.
    """
    op = "slim_linear"
    y = _eager(x, weight, bias, out_features, in_blocks, out_blocks, activation, residual)
    if y is not None:
        return y
    check_float(op, x)
    check_activation(op, activation)
    if weight.dim() != 2:
        raise ValueError(f"{op}: expected weight to have 2 dimensions (N, K), got shape {tuple(weight.shape)}")
    full_out, full_in = weight.shape
    n = full_out if out_features is None else out_features
    if x.dim() < 1:
        raise ValueError(f"{op}: expected x to have at least 1 dimension, got shape {tuple(x.shape)}")
    check_blocks(op, "out_features", n, full_out, "out_blocks", out_blocks)
    check_blocks(op, "x.shape[-1]", x.shape[-1], full_in, "in_blocks", in_blocks)
    check_shape(op, "bias", bias, (full_out,))
    check_shape(op, "residual", residual, (*x.shape[:-1], n))
    dtype = autocast_dtype(x)
    if dtype is not None:
        rows, columns = (n, x.shape[-1]) if in_blocks == out_blocks == 1 else weight.shape
        x, weight = x.to(dtype), cast_slice(weight, dtype, rows, columns)
        bias, residual = cast_slice(bias, dtype, rows), None if residual is None else residual.to(dtype)
    check_same_dtype_device(op, x, weight=weight, bias=bias, residual=residual)
    weight, bias = stand_in(weight), stand_in(bias)
    run = torch.ops.slimkernels.slim_linear.default
    if activation not in OUTPUT_ACTIVATIONS and grad_needed(x, weight, bias, residual):
        # Backward needs the activation's input: keep it instead of computing it twice.
        return apply_activation(run(x, weight, bias, n, in_blocks, out_blocks, "none", residual), activation)
    return run(x, weight, bias, n, in_blocks, out_blocks, activation, residual)


def check_blocks(op: str, name: str, active: int, full: int, blocks_name: str, blocks: int) -> None:
    if blocks < 1 or full % blocks:
        raise ValueError(f"{op}: expected {blocks_name} to divide the full size {full}, got {blocks}")
    if active < 1 or active > full:
        raise ValueError(f"{op}: expected {name} between 1 and {full}, got {active}")
    if blocks > 1 and active % blocks:
        raise ValueError(f"{op}: expected {name} to be a multiple of {blocks_name}={blocks}, got {active}")


def _fake(x, weight, bias, out_features, in_blocks, out_blocks, activation, residual):
    return x.new_empty((*x.shape[:-1], out_features))


def _backward_fake(dy, x, weight, in_blocks, out_blocks, need_dx, need_dw, need_db):
    empty = dy.new_empty(0)
    return (
        x.new_empty(x.shape) if need_dx else empty,
        weight.new_empty(weight.shape) if need_dw else dy.new_empty(0),
        weight.new_empty(weight.shape[0]) if need_db else dy.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.out_features, ctx.in_blocks, ctx.out_blocks, ctx.activation, residual = inputs
    ctx.weight_slot, ctx.bias_slot = slot_of(weight), slot_of(bias)
    by_output = ctx.activation in OUTPUT_ACTIVATIONS
    ctx.has_output = by_output and ctx.activation != "none"
    ctx.recompute = not by_output
    ctx.save_for_backward(
        x, weight, output if ctx.has_output else None, *((bias, residual) if ctx.recompute else (None, None))
    )


def _backward(ctx, dy):
    x, weight, output, bias, residual = ctx.saved_tensors
    need_dx, need_dw, need_db, *_, need_dresidual = ctx.needs_input_grad
    if ctx.recompute:
        output = torch.ops.slimkernels.slim_linear.default(
            x, weight, bias, ctx.out_features, ctx.in_blocks, ctx.out_blocks, "none", residual
        )
    dz = activation_grad(dy, output, ctx.activation)
    slots = ctx.weight_slot, ctx.bias_slot
    shape = weight.shape
    if slots != (None, None) and ctx.in_blocks == ctx.out_blocks == 1:
        weight = weight[: ctx.out_features, : x.shape[-1]]  # gradients of the active slice alone
    dx, dw, db = torch.ops.slimkernels.slim_linear_backward.default(
        dz, x, weight, ctx.in_blocks, ctx.out_blocks, need_dx, need_dw, need_db
    )
    if slots != (None, None):
        dw = deposit(ctx.weight_slot, dw, shape) if need_dw else None
        db = deposit(ctx.bias_slot, db, shape[:1]) if need_db else None
    return (
        dx if need_dx else None,
        dw if need_dw else None,
        db if need_db else None,
        *([None] * 4),
        dz if need_dresidual else None,
    )


define(
    "slim_linear(Tensor x, Tensor weight, Tensor? bias, SymInt out_features, SymInt in_blocks, SymInt out_blocks,"
    " str activation, Tensor? residual) -> Tensor",
    fake=_fake,
    default=reference.slim_linear,
)
define(
    "slim_linear_backward(Tensor dy, Tensor x, Tensor weight, SymInt in_blocks, SymInt out_blocks, bool need_dx,"
    " bool need_dw, bool need_db) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    default=reference.slim_linear_backward,
)
autograd("slim_linear", _backward, _setup_context)
on_gpu("slim_linear", "triton_kernels.slim_linear")
on_gpu("slim_linear_backward", "triton_kernels.slim_linear")
