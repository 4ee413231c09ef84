"""``slim_layer_norm`` in plain PyTorch: the specification, the fallback and the test oracle."""

import torch
from torch import Tensor

from slimkernels.reference._activation import activation as apply_activation
from slimkernels.reference._activation import activation_backward
from slimkernels.reference.slim_batch_norm import statistics_dtype


def slim_layer_norm(
    x: Tensor,  # (*, c)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
    activation: str = "none",
    residual: Tensor | None = None,  # (*, c)
) -> tuple[Tensor, Tensor, Tensor]:  # (*, c); mean and inverse standard deviation (*)
    """``act((x - mean) * invstd * weight[:c] + bias[:c] + residual)`` over the last dimension, and the statistics."""
    wide = x.to(statistics_dtype(x))
    mean = wide.mean(-1)
    invstd = torch.rsqrt((wide - mean[..., None]).square().mean(-1) + eps)
    return _finish(x, _scaled(wide, mean, invstd, weight, bias), activation, residual), mean, invstd


def slim_rms_norm(
    x: Tensor,  # (*, c)
    weight: Tensor | None,  # (C,)
    eps: float,
    activation: str = "none",
    residual: Tensor | None = None,  # (*, c)
) -> tuple[Tensor, Tensor]:  # (*, c); inverse root mean square (*)
    """``act(x * invrms * weight[:c] + residual)`` over the last dimension, and the statistic."""
    wide = x.to(statistics_dtype(x))
    invrms = torch.rsqrt(wide.square().mean(-1) + eps)
    return _finish(x, _scaled(wide, None, invrms, weight, None), activation, residual), invrms


def _finish(x: Tensor, z: Tensor, activation: str, residual: Tensor | None) -> Tensor:
    z = z if residual is None else z + residual
    y = z if activation == "none" else apply_activation(z, activation)
    return torch.empty_like(x, memory_format=torch.contiguous_format).copy_(y)


def _scaled(wide: Tensor, mean: Tensor | None, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    c = wide.shape[-1]
    z = (wide if mean is None else wide - mean[..., None]) * invstd[..., None]
    z = z if weight is None else z * weight[:c].to(z.dtype)
    return z if bias is None else z + bias[:c].to(z.dtype)


def row_norm_backward(
    dy: Tensor,  # (*, c)
    x: Tensor,  # (*, c)
    mean: Tensor | None,  # (*), None for the norm without a mean
    invstd: Tensor,  # (*)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    output: Tensor | None,  # the forward's output, when there was a residual and the derivative can be had from it
    residual: Tensor | None,  # (*, c), when it cannot
    activation: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (*, c), (C,), (C,), (*, c); an empty tensor where not needed
    """Gradients of x, weight, bias and residual; weight's and bias's have the full size, zero outside the slice."""
    c, dtype = x.shape[-1], invstd.dtype
    wide, dz = x.to(dtype), dy.to(dtype)
    if activation != "none":
        if output is not None:
            saved = output.to(dtype)
        else:
            z = _scaled(wide, mean, invstd, weight, bias)
            z = z if residual is None else z + residual
            by_output = activation not in ("gelu", "gelu_tanh", "silu", "hardswish")
            saved = apply_activation(z, activation) if by_output else z
        dz = activation_backward(dz, saved, activation)
    xhat = (wide if mean is None else wide - mean[..., None]) * invstd[..., None]
    dx, dw, db, dresidual = (dy.new_empty(0) for _ in range(4))
    if need_dx:
        g = dz if weight is None else dz * weight[:c].to(dtype)
        centred = g - xhat * (g * xhat).mean(-1, keepdim=True)
        if mean is not None:
            centred = centred - g.mean(-1, keepdim=True)
        dx = _dense(x).copy_(centred * invstd[..., None])
    if need_dw:
        assert weight is not None
        dw = torch.zeros_like(weight)
        dw[:c] = (dz * xhat).reshape(-1, c).sum(0)
    if need_db:
        assert bias is not None
        db = torch.zeros_like(bias)
        db[:c] = dz.reshape(-1, c).sum(0)
    if need_dresidual:
        dresidual = _dense(x).copy_(dz)
    return dx, dw, db, dresidual


def _dense(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def slim_layer_norm_backward(
    dy: Tensor,  # (*, c)
    x: Tensor,  # (*, c)
    mean: Tensor,  # (*)
    invstd: Tensor,  # (*)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    output: Tensor | None,  # (*, c)
    residual: Tensor | None,  # (*, c)
    activation: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (*, c), (C,), (C,), (*, c); an empty tensor where not needed
    """See ``row_norm_backward``."""
    needs = need_dx, need_dw, need_db, need_dresidual
    return row_norm_backward(dy, x, mean, invstd, weight, bias, output, residual, activation, *needs)
