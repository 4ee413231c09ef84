"""``slim_conv_transpose`` on GPUs: the launchers. Its forward is ``slim_conv``'s gradient of the input, and the reverse."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.reference import slim_conv_transpose as reference
from slimkernels.reference.slim_conv import conv_memory_format
from slimkernels.triton_kernels._conv import (
    as_2d,
    channels_dense,
    geometry_2d,
    launch_conv,
    launch_weight_gradient,
    takes,
)


def slim_conv_transpose(
    x: Tensor,  # (B, c, *spatial)
    weight: Tensor,  # (C, N / groups, *kernel)
    bias: Tensor | None,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    residual: Tensor | None,  # the output's shape
) -> Tensor:  # (B, out_channels, *spatial)
    """Launcher of the forward kernel; 3d, float64 and what is empty compose ATen."""
    size = [
        (s - 1) * step - 2 * p + d * (k - 1) + extra + 1
        for s, k, step, p, extra, d in zip(
            x.shape[2:], weight.shape[2:], stride, padding, output_padding, dilation, strict=True
        )
    ]
    y = x.new_empty((x.shape[0], *size, out_channels)).movedim(-1, 1)
    if not takes(x, y):
        geometry = stride, padding, output_padding, dilation
        return reference.slim_conv_transpose(x, weight, bias, out_channels, *geometry, groups, activation, residual)
    launch_conv(
        channels_dense(x),
        as_2d(weight),
        as_2d(y),
        geometry_2d(stride, padding, dilation),
        groups,
        True,
        bias=bias,
        activation=activation,
        residual=None if residual is None else as_2d(residual),
    )
    return y.contiguous(memory_format=conv_memory_format(x, weight))


def slim_conv_transpose_backward(
    dy: Tensor,  # (B, n, *spatial)
    x: Tensor,  # (B, c, *spatial)
    weight: Tensor,  # (C, N / groups, *kernel)
    full_bias: int,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # shapes of x, weight, (full_bias,); an empty tensor where not needed
    """Launcher of the gradients; those of weight and bias have the full size, with zeros outside the slice."""
    if not takes(x, dy):
        spatial = stride, padding, output_padding, dilation
        return reference.slim_conv_transpose_backward(
            dy, x, weight, full_bias, *spatial, groups, need_dx, need_dw, need_db
        )
    c, n = x.shape[1], dy.shape[1] // groups
    geometry = geometry_2d(stride, padding, dilation)
    dy2 = channels_dense(dy)
    dx, dw, db = (dy.new_empty(0) for _ in range(3))
    if need_dx:
        dx = x.new_empty((x.shape[0], *x.shape[2:], c)).movedim(-1, 1)
        launch_conv(dy2, as_2d(weight), as_2d(dx), geometry, groups, False)
        dx = dx.contiguous(memory_format=conv_memory_format(x, weight))
    if need_dw:
        dw = torch.empty_like(weight) if (c, n) == weight.shape[:2] else torch.zeros_like(weight)
        active = dw.narrow(0, 0, c).narrow(1, 0, n)
        launch_weight_gradient(channels_dense(x), dy2, as_2d(active), geometry, groups)
    if need_db:
        db = dy.new_zeros(full_bias)
        db.narrow(0, 0, dy.shape[1]).copy_(dy2.sum((0, 2, 3)))
    return dx, dw, db
