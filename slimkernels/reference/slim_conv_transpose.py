"""``slim_conv_transpose`` in plain PyTorch: the specification, the fallback and the test oracle."""

from collections.abc import Sequence

from torch import Tensor

from slimkernels.reference.slim_conv import conv_memory_format, convolve, convolve_backward


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
    """``act(conv_transpose(x, W, b) + residual)`` with ``W`` and ``b`` the active slice of ``weight`` and ``bias``."""
    w = weight.narrow(0, 0, x.shape[1]).narrow(1, 0, out_channels // groups)
    b = None if bias is None else bias.narrow(0, 0, out_channels)
    memory_format = conv_memory_format(x, weight)
    return convolve(
        x, w, b, stride, padding, dilation, True, output_padding, groups, activation, residual, memory_format
    )


def slim_conv_transpose_backward(
    dy: Tensor,  # (B, n, *spatial)
    x: Tensor,  # (B, c, *spatial)
    weight: Tensor,  # (C, N / groups, *kernel)
    full_bias: int,  # size of the bias's gradient
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # shapes of x, weight, (full_bias,); an empty tensor where not needed
    """Gradients of the transposed convolution without its activation."""
    active = (x.shape[1], dy.shape[1] // groups)
    return convolve_backward(
        dy,
        x,
        weight,
        active,
        full_bias,
        stride,
        padding,
        dilation,
        True,
        output_padding,
        groups,
        need_dx,
        need_dw,
        need_db,
    )
