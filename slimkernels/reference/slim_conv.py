"""``slim_conv`` in plain PyTorch: the specification, the fallback and the test oracle."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from slimkernels.reference._activation import activation as apply_activation


def conv_memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Layout of the output and of the gradient of ``x``: channels-last when ``x`` or the weight is, as in PyTorch."""
    if x.dim() > 3:
        for t in (x, weight):
            if (memory_format := suggest_memory_format(t)) != torch.contiguous_format:
                return memory_format
    return torch.contiguous_format


def convolve(
    x: Tensor,  # (B, c, *spatial)
    weight: Tensor,  # the active slice
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    activation: str,
    residual: Tensor | None,
    memory_format: torch.memory_format,
) -> Tensor:
    """PyTorch's convolution, then residual and activation."""
    y = torch.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    if residual is not None:
        y = y + residual
    if activation != "none":
        y = apply_activation(y, activation)
    return y.contiguous(memory_format=memory_format)


def convolve_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,  # full size
    active: tuple[int, int],  # leading entries of the weight's first two dimensions that took part
    full_bias: int,  # size of the bias's gradient
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the convolution; those of weight and bias have the full size, with zeros outside the slice."""
    w = weight.narrow(0, 0, active[0]).narrow(1, 0, active[1])
    dx, dw, db = torch.ops.aten.convolution_backward(
        dy,
        x,
        w,
        [dy.shape[1]],
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
        [need_dx, need_dw, need_db],
    )
    empty = dy.new_empty(0)
    if need_dx:
        dx = dx.contiguous(memory_format=conv_memory_format(x, weight))
    if need_dw:
        full = torch.zeros_like(weight)
        full.narrow(0, 0, active[0]).narrow(1, 0, active[1]).copy_(dw)
        dw = full
    if need_db:
        full = db.new_zeros(full_bias)
        full.narrow(0, 0, dy.shape[1]).copy_(db)
        db = full
    return dx if need_dx else empty, dw if need_dw else dy.new_empty(0), db if need_db else dy.new_empty(0)


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
    """``act(conv(x, W, b) + residual)`` with ``W`` and ``b`` the active slice of ``weight`` and ``bias``."""
    w = weight.narrow(0, 0, out_channels).narrow(1, 0, x.shape[1] // groups)
    b = None if bias is None else bias.narrow(0, 0, out_channels)
    memory_format = conv_memory_format(x, weight)
    zeros = [0] * len(stride)
    return convolve(x, w, b, stride, padding, dilation, False, zeros, groups, activation, residual, memory_format)


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
    """Gradients of the convolution without its activation."""
    active = (dy.shape[1], x.shape[1] // groups)
    zeros = [0] * len(stride)
    return convolve_backward(
        dy,
        x,
        weight,
        active,
        weight.shape[0],
        stride,
        padding,
        dilation,
        False,
        zeros,
        groups,
        need_dx,
        need_dw,
        need_db,
    )
