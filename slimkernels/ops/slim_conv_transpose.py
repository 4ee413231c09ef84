"""``slim_conv_transpose``: a transposed convolution with the active slice of a full-width weight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.ops._common import OUTPUT_ACTIVATIONS, autograd, check_shape, define, on_gpu
from slimkernels.ops._eager import eager
from slimkernels.ops.activation import activation_grad
from slimkernels.ops.slim_conv import (
    check_groups,
    check_range,
    check_ranks,
    conv_backward_fake,
    per_dimension,
    run_batched,
    same_dtype,
)
from slimkernels.reference import slim_conv_transpose as reference
from slimkernels.reference.slim_conv import conv_memory_format

_eager = eager("slim_conv_transpose")


def slim_conv_transpose(
    x: Tensor,  # (B, c, *spatial) or (c, *spatial), 1 to 3 spatial dimensions
    weight: Tensor,  # (C, N / groups, *kernel), read through its strides
    bias: Tensor | None = None,  # (N,) or None
    out_channels: int | None = None,  # n <= N; None means groups * weight.shape[1]
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,  # the ACTIVE number of groups
    activation: str = "none",
    residual: Tensor | None = None,  # the output's shape, added before the activation
) -> Tensor:  # (B, n, *spatial) or (n, *spatial); channels-last when x or weight is
    """Transposed convolution (1d, 2d or 3d by the weight's rank) with the active slice of a full-width weight.

    Equivalent to ``act(F.conv_transpose(x, weight[:c, :n // groups], bias[:n], stride, padding, output_padding, groups,
    dilation) + residual)``.

    On the CPU channels-last images run in matrix products of ours where those are faster (AVX-512), all else in oneDNN
    through PyTorch on the strided slice; then residual and activation in one pass. float64 runs the reference. On a GPU,
    1d and 2d, the Triton kernels of ``slim_conv`` run it in place, all fused.

    Raises: ValueError when a shape, a width or a name does not fit, TypeError when dtypes differ.
    Numerics: 16-bit inputs are multiplied and summed in float32, and rounded before the residual is added.
    Source: Yu et al., Slimmable Neural Networks (arXiv 1812.08928), section 3.
    """
    op = "slim_conv_transpose"
    y = _eager(
        *(x, weight, bias, out_channels, stride, padding, output_padding, dilation, groups, activation, residual)
    )
    if y is not None:
        return y
    spatial = check_ranks(op, x, weight, activation)
    channels = x.shape[-spatial - 1]
    check_range(op, "x's channels", channels, weight.shape[0])
    check_groups(op, "x's channels", channels, groups)
    n = weight.shape[1] * groups if out_channels is None else out_channels
    check_range(op, "out_channels", n, weight.shape[1] * groups)
    check_groups(op, "out_channels", n, groups)
    strides = per_dimension(op, "stride", stride, spatial, 1)
    paddings = per_dimension(op, "padding", padding, spatial, 0)
    extra = per_dimension(op, "output_padding", output_padding, spatial, 0)
    dilations = per_dimension(op, "dilation", dilation, spatial, 1)
    if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        raise ValueError(f"{op}: expected output_padding smaller than stride or dilation, got {output_padding}")
    out = conv_transpose_output_size(x.shape[-spatial:], weight.shape[2:], strides, paddings, extra, dilations)
    for size in out:
        if size < 1:
            raise ValueError(f"{op}: expected x large enough for padding {paddings}, got shape {tuple(x.shape)}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] < n):
        raise ValueError(f"{op}: expected bias of shape (N,) with N at least {n}, got {tuple(bias.shape)}")
    if residual is not None:
        check_shape(op, "residual", residual, (*x.shape[: -spatial - 1], n, *out))
    x, weight, bias, residual = same_dtype(op, x, weight, bias, residual)
    return run_batched(
        torch.ops.slimkernels.slim_conv_transpose.default,
        (x, weight, bias, n, strides, paddings, extra, dilations, groups),
        activation,
        residual,
        spatial,
    )


def conv_transpose_output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    return [
        (s - 1) * step - 2 * p + d * (k - 1) + extra + 1
        for s, k, step, p, extra, d in zip(size, kernel, stride, padding, output_padding, dilation, strict=True)
    ]


def _fake(x, weight, bias, out_channels, stride, padding, output_padding, dilation, groups, activation, residual):
    size = conv_transpose_output_size(x.shape[2:], weight.shape[2:], stride, padding, output_padding, dilation)
    memory_format = conv_memory_format(x, weight)
    shape = (x.shape[0], out_channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _backward_fake(
    dy, x, weight, full_bias, stride, padding, output_padding, dilation, groups, need_dx, need_dw, need_db
):
    return conv_backward_fake(dy, x, weight, full_bias, need_dx, need_dw, need_db)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.out_channels, *ctx.geometry, ctx.activation, residual = inputs
    ctx.full_bias = 0 if bias is None else bias.shape[0]
    recompute = ctx.activation not in OUTPUT_ACTIVATIONS
    saved_output = None if recompute or ctx.activation == "none" else output
    ctx.save_for_backward(x, weight, saved_output, *((bias, residual) if recompute else (None, None)))


def _backward(ctx, dy):
    x, weight, output, bias, residual = ctx.saved_tensors
    need_dx, need_dw, need_db, *_, need_dresidual = ctx.needs_input_grad
    if ctx.activation not in OUTPUT_ACTIVATIONS:
        output = torch.ops.slimkernels.slim_conv_transpose.default(
            x, weight, bias, ctx.out_channels, *ctx.geometry, "none", residual
        )
    dz = activation_grad(dy, output, ctx.activation)
    dx, dw, db = torch.ops.slimkernels.slim_conv_transpose_backward.default(
        dz, x, weight, ctx.full_bias, *ctx.geometry, need_dx, need_dw, need_db
    )
    gradients = (dx if need_dx else None, dw if need_dw else None, db if need_db else None)
    return *gradients, *([None] * 7), dz if need_dresidual else None


define(
    "slim_conv_transpose(Tensor x, Tensor weight, Tensor? bias, SymInt out_channels, SymInt[] stride, SymInt[] padding,"
    " SymInt[] output_padding, SymInt[] dilation, SymInt groups, str activation, Tensor? residual) -> Tensor",
    fake=_fake,
    default=reference.slim_conv_transpose,
)
define(
    "slim_conv_transpose_backward(Tensor dy, Tensor x, Tensor weight, SymInt full_bias, SymInt[] stride,"
    " SymInt[] padding, SymInt[] output_padding, SymInt[] dilation, SymInt groups, bool need_dx, bool need_dw,"
    " bool need_db) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    default=reference.slim_conv_transpose_backward,
)
autograd("slim_conv_transpose", _backward, _setup_context)
on_gpu("slim_conv_transpose", "triton_kernels.slim_conv_transpose")
on_gpu("slim_conv_transpose_backward", "triton_kernels.slim_conv_transpose")
