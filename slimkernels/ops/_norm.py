"""What the norm ops share: checks of the full-size parameters, and what backward keeps."""

import torch
from torch import Tensor

from slimkernels.ops._common import (
    OUTPUT_ACTIVATIONS,
    autocast_dtype,
    check_activation,
    check_float,
    check_same_dtype_device,
    check_shape,
)


def check_norm(op: str, x: Tensor, dim: int, activation: str, **parameters: Tensor | None) -> None:
    """``x`` is floating point with at least one channel in ``dim``, and every parameter has an entry for each."""
    check_float(op, x)
    check_activation(op, activation)
    least, form = (1, "(*, c)") if dim == -1 else (2, "(N, c, *)")
    if x.dim() < least:
        plural = "dimension" if least == 1 else "dimensions"
        raise ValueError(f"{op}: expected x to have at least {least} {plural} {form}, got shape {tuple(x.shape)}")
    if x.shape[dim] < 1:
        raise ValueError(f"{op}: expected x to have at least 1 channel, got shape {tuple(x.shape)}")
    for name, parameter in parameters.items():
        check_channels(op, name, parameter, x, dim)


def check_channels(op: str, name: str, t: Tensor | None, x: Tensor, dim: int) -> None:
    """``t`` is a full-size vector for the active channels of ``x``."""
    if t is None:
        return
    c = x.shape[dim]
    if t.dim() != 1 or t.shape[0] < c:
        raise ValueError(f"{op}: expected {name} of shape (C,) with C >= x.shape[{dim}]={c}, got {tuple(t.shape)}")
    if t.dtype != x.dtype and not (t.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
        extra = " or float32" if x.dtype in (torch.bfloat16, torch.float16) else ""
        raise TypeError(f"{op}: expected {name} of dtype {x.dtype}{extra}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{op}: expected {name} on device {x.device} like x, got {t.device}")


def checked_residual(op: str, x: Tensor, residual: Tensor | None) -> Tensor | None:
    """``residual`` with the shape, dtype and device of ``x`` (under autocast: cast to it)."""
    if residual is None:
        return None
    check_shape(op, "residual", residual, x.shape)
    if autocast_dtype(x) is not None:
        residual = residual.to(x.dtype)
    check_same_dtype_device(op, x, residual=residual)
    return residual


def saved_for_activation(activation: str, y: Tensor, residual: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What backward reads of ``(output, residual)``.

    Without a residual the activation's input is recomputed from x; with one, the output or the residual is read.
    """
    if residual is None or activation == "none":
        return None, None
    return (y, None) if activation in OUTPUT_ACTIVATIONS else (None, residual)


def empty_or(t: Tensor | None, need: bool, dy: Tensor) -> Tensor:
    """Fake gradient for the parameter ``t``."""
    return t.new_empty(t.shape) if need and t is not None else dy.new_empty(0)
