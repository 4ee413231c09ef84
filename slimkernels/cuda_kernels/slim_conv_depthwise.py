"""The depthwise case of ``slim_conv`` in CUDA C++: forward, and the gradients of ``x`` and the weight."""

from collections.abc import Sequence
from types import NotImplementedType

import torch
from torch import Tensor

from slimkernels.cuda_kernels import available, operators
from slimkernels.ops._common import ACTIVATIONS
from slimkernels.reference.slim_conv import conv_memory_format

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST = 2**30  # the kernels count along a dimension, and the pixels of a channel, in 32 bits


def takes(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether the kernels run this convolution of ``x`` (B, c, *spatial): depthwise, 1d or 2d, not empty."""
    spatial = x.shape[2:]
    return (
        groups == x.shape[1] > 1
        and x.dim() in (3, 4)
        and x.dtype in DTYPES
        and x.numel() > 0
        and weight.shape[1] == 1
        and weight.stride(0) > 0
        and x.shape[0] * spatial.numel() < MOST
        and available()
    )


def slim_conv(
    x: Tensor,  # (B, c, *spatial)
    weight: Tensor,  # (N, 1, *kernel), read through its strides
    bias: Tensor | None,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    residual: Tensor | None,
) -> Tensor | NotImplementedType:
    """As the reference of this name; NotImplemented where the kernels do not take the convolution."""
    if not takes(x, weight, groups):
        return NotImplemented
    memory_format = conv_memory_format(x, weight)
    size = [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, k, step, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    y = torch.empty((x.shape[0], out_channels, *size), dtype=x.dtype, device=x.device, memory_format=memory_format)
    if residual is not None:
        residual = _planes(residual.contiguous(memory_format=memory_format))
    operators().depthwise_forward(
        _planes(x.contiguous(memory_format=memory_format)),
        _planes(weight),
        None if bias is None else bias.contiguous(),
        residual,
        _planes(y),
        _geometry(stride, padding, dilation),
        ACTIVATIONS.index(activation),
    )
    return y


def slim_conv_backward(
    dy: Tensor,  # (B, n, *spatial)
    x: Tensor,  # (B, c, *spatial)
    weight: Tensor,  # (N, 1, *kernel)
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor] | NotImplementedType:
    """As the reference of this name, sums in a fixed order; NotImplemented where the kernels do not take it."""
    if not takes(x, weight, groups):
        return NotImplemented
    memory_format = conv_memory_format(x, weight)
    geometry = _geometry(stride, padding, dilation)
    dy = dy.contiguous(memory_format=memory_format)
    dx, dw, db = (dy.new_empty(0) for _ in range(3))
    if need_dx:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
        operators().depthwise_input_gradient(_planes(dy), _planes(weight), _planes(dx), geometry)
    if need_dw:
        dw = torch.zeros_like(weight)
        x = x.contiguous(memory_format=memory_format)
        operators().depthwise_weight_gradient(_planes(dy), _planes(x), _planes(dw), geometry)
    if need_db:
        db = weight.new_zeros(weight.shape[0])
        db[: dy.shape[1]] = dy.sum((0, *range(2, dy.dim())))
    return dx, dw, db


def _planes(t: Tensor) -> Tensor:
    """1d as 2d with height 1: a view."""
    return t if t.dim() == 4 else t.unsqueeze(2)


def _geometry(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> list[int]:
    if len(stride) == 2:
        return [*stride, *padding, *dilation]
    return [1, *stride, 0, *padding, 1, *dilation]
