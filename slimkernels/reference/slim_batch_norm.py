"""``slim_batch_norm`` in plain PyTorch: the specification, the fallback and the test oracle."""

import torch
from torch import Tensor

from slimkernels.reference._activation import activation as apply_activation
from slimkernels.reference._activation import activation_backward


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.dim() - 2))


def _others(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def slim_batch_norm(
    x: Tensor,  # (N, c, *)
    running_mean: Tensor | None,  # (C,), read only when not training
    running_var: Tensor | None,  # (C,)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    training: bool,
    eps: float,
    activation: str = "none",
    residual: Tensor | None = None,  # (N, c, *)
) -> tuple[Tensor, Tensor, Tensor]:  # (N, c, *); mean and biased variance that were used (c,)
    """``act((x - mean) / sqrt(var + eps) * weight[:c] + bias[:c] + residual)``, and the statistics."""
    c, dtype = x.shape[1], statistics_dtype(x)
    if training and x.numel() == 0:
        mean, var = x.new_zeros(c, dtype=dtype), x.new_zeros(c, dtype=dtype)
    elif training:
        var, mean = torch.var_mean(x.to(dtype), _others(x), correction=0)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean[:c].to(dtype, copy=True), running_var[:c].to(dtype, copy=True)
    z = _normalize(x, mean, var, weight, bias, eps)
    if residual is not None:
        z = z + residual
    y = z if activation == "none" else apply_activation(z, activation)
    out = torch.empty_like(x)
    return out.copy_(y), mean, var


def _normalize(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    c, dtype = x.shape[1], mean.dtype
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight[:c].to(dtype)
    z = (x.to(dtype) - _per_channel(mean, x)) * _per_channel(scale, x)
    return z if bias is None else z + _per_channel(bias[:c].to(dtype), x)


def slim_batch_norm_backward(
    dy: Tensor,  # (N, c, *)
    x: Tensor,  # (N, c, *)
    mean: Tensor,  # (c,)
    var: Tensor,  # (c,)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    output: Tensor | None,  # the forward's output, when there was a residual and the derivative can be had from it
    residual: Tensor | None,  # (N, c, *), when it cannot
    training: bool,
    eps: float,
    activation: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (N, c, *), (C,), (C,), (N, c, *); an empty tensor where not needed
    """Gradients of x, weight, bias and residual; weight's and bias's have the full size, zero outside the slice."""
    c, dtype = x.shape[1], mean.dtype
    dz = dy.to(dtype)
    if activation != "none":
        if output is not None:
            saved = output.to(dtype)
        else:
            z = _normalize(x, mean, var, weight, bias, eps)
            z = z if residual is None else z + residual
            by_output = activation not in ("gelu", "gelu_tanh", "silu", "hardswish")
            saved = apply_activation(z, activation) if by_output else z
        dz = activation_backward(dz, saved, activation)
    invstd = torch.rsqrt(var + eps)
    xhat = (x.to(dtype) - _per_channel(mean, x)) * _per_channel(invstd, x)
    sum_dz, sum_dz_xhat = dz.sum(_others(x)), (dz * xhat).sum(_others(x))
    dx, dw, db, dresidual = (dy.new_empty(0) for _ in range(4))
    if need_dx:
        count = max(x.numel() // c, 1)
        scale = invstd if weight is None else invstd * weight[:c].to(dtype)
        centred = dz
        if training:
            centred = dz - _per_channel(sum_dz / count, x) - xhat * _per_channel(sum_dz_xhat / count, x)
        dx = torch.empty_like(x).copy_(centred * _per_channel(scale, x))
    if need_dw:
        assert weight is not None
        dw = torch.zeros_like(weight)
        dw[:c] = sum_dz_xhat
    if need_db:
        assert bias is not None
        db = torch.zeros_like(bias)
        db[:c] = sum_dz
    if need_dresidual:
        dresidual = torch.empty_like(x).copy_(dz)
    return dx, dw, db, dresidual
