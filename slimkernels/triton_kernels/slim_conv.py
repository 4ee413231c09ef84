"""``slim_conv`` on GPUs: the launchers; the kernels are those of ``_conv``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.reference import slim_conv as reference
from slimkernels.triton_kernels._conv import (
    as_2d,
    channels_dense,
    geometry_2d,
    launch_conv,
    launch_weight_gradient,
    takes,
)


def depthwise(channels: int, out_channels: int, groups: int) -> bool:
    """One channel a group: no matrix product. Where the CUDA C++ kernels are not used PyTorch's are."""
    return groups > 1 and channels == groups == out_channels


def slim_conv(
    x: Tensor,  # (B, c, *spatial)
    weight: Tensor,  # (N, C / groups, *kernel)
    bias: Tensor | None,  # (N,)
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    residual: Tensor | None,  # the output's shape
) -> Tensor:  # (B, out_channels, *spatial)
    """Launcher of the forward kernel; depthwise, 3d, float64 and what is empty compose ATen."""
    size = [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, k, step, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    y = x.new_empty((x.shape[0], *size, out_channels)).movedim(-1, 1)
    if not takes(x, y) or depthwise(x.shape[1], out_channels, groups):
        return reference.slim_conv(
            x, weight, bias, out_channels, stride, padding, dilation, groups, activation, residual
        )
    launch_conv(
        channels_dense(x),
        as_2d(weight),
        as_2d(y),
        geometry_2d(stride, padding, dilation),
        groups,
        False,
        bias=bias,
        activation=activation,
        residual=None if residual is None else as_2d(residual),
    )
    return y.contiguous(memory_format=reference.conv_memory_format(x, weight))


def slim_conv_backward(
    dy: Tensor,  # (B, n, *spatial)
    x: Tensor,  # (B, c, *spatial)
    weight: Tensor,  # (N, C / groups, *kernel)
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # shapes of x, weight, (N,); an empty tensor where not needed
    """Launcher of the gradients; those of weight and bias have the full size, with zeros outside the slice."""
    n, c = dy.shape[1], x.shape[1] // groups
    if not takes(x, dy) or depthwise(x.shape[1], n, groups):
        return reference.slim_conv_backward(dy, x, weight, stride, padding, dilation, groups, need_dx, need_dw, need_db)
    geometry = geometry_2d(stride, padding, dilation)
    dy2 = channels_dense(dy)
    dx, dw, db = (dy.new_empty(0) for _ in range(3))
    if need_dx:
        dx = x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)
        launch_conv(dy2, as_2d(weight), as_2d(dx), geometry, groups, True)
        dx = dx.contiguous(memory_format=reference.conv_memory_format(x, weight))
    if need_dw:
        dw = torch.empty_like(weight) if (n, c) == weight.shape[:2] else torch.zeros_like(weight)
        active = dw.narrow(0, 0, n).narrow(1, 0, c)
        launch_weight_gradient(dy2, channels_dense(x), as_2d(active), geometry, groups)
    if need_db:
        db = dy.new_zeros(weight.shape[0])
        db.narrow(0, 0, n).copy_(dy2.sum((0, 2, 3)))
    return dx, dw, db
