"""``slim_group_norm`` in plain PyTorch: the specification, the fallback and the test oracle."""

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.reference._activation import activation as apply_activation
from slimkernels.reference._activation import activation_backward
from slimkernels.reference.slim_batch_norm import statistics_dtype


def slim_group_norm(
    x: Tensor,  # (N, c, *)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    group_size: int,
    eps: float,
    activation: str = "none",
    residual: Tensor | None = None,  # (N, c, *)
) -> tuple[Tensor, Tensor, Tensor]:  # (N, c, *); mean and inverse standard deviation (N, groups)
    """``act((x - mean) * invstd * weight[:c] + bias[:c] + residual)`` per group of channels, and the statistics.

    Groups are ``group_size`` channels each; the last one has what is left.
    """
    wide = _grouped(x.to(statistics_dtype(x)), group_size)
    count = _counts(x, group_size)
    mean = wide.sum(-1) / count
    inside = _grouped(torch.ones_like(x, dtype=wide.dtype), group_size)
    var = ((wide - mean[..., None]) * inside).square().sum(-1) / count
    invstd = torch.rsqrt(var + eps)
    z = _normalize(x, mean, invstd, weight, bias, group_size)
    z = z if residual is None else z + residual
    y = z if activation == "none" else apply_activation(z, activation)
    return torch.empty_like(x).copy_(y), mean, invstd


def _grouped(x: Tensor, group_size: int) -> Tensor:
    """``(N, groups, group_size * length)``, the missing channels of the last group zero."""
    n, c = x.shape[:2]
    flat = x.flatten(2) if x.dim() > 2 else x[..., None]
    groups = (c + group_size - 1) // group_size
    flat = F.pad(flat, (0, 0, 0, groups * group_size - c))
    return flat.reshape(n, groups, group_size * flat.shape[2])


def _counts(x: Tensor, group_size: int) -> Tensor:
    """Values per group, ``(groups,)``."""
    c = x.shape[1]
    first = torch.arange(0, c, group_size, device=x.device, dtype=statistics_dtype(x))
    return (c - first).clamp(max=group_size) * (x[0, 0].numel() if x.numel() else 1)


def _per_channel(groups: Tensor, x: Tensor, group_size: int) -> Tensor:
    """``(N, groups)`` spread to ``(N, c, 1, ...)``."""
    spread = groups[..., None].expand(*groups.shape, group_size).flatten(1)[:, : x.shape[1]]
    return spread.reshape(*x.shape[:2], *[1] * (x.dim() - 2))


def _affine(t: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return t[: x.shape[1]].to(dtype).view(-1, *[1] * (x.dim() - 2))


def _normalize(
    x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, group_size: int
) -> Tensor:
    dtype = mean.dtype
    z = (x.to(dtype) - _per_channel(mean, x, group_size)) * _per_channel(invstd, x, group_size)
    z = z if weight is None else z * _affine(weight, x, dtype)
    return z if bias is None else z + _affine(bias, x, dtype)


def slim_group_norm_backward(
    dy: Tensor,  # (N, c, *)
    x: Tensor,  # (N, c, *)
    mean: Tensor,  # (N, groups)
    invstd: Tensor,  # (N, groups)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    output: Tensor | None,  # the forward's output, when there was a residual and the derivative can be had from it
    residual: Tensor | None,  # (N, c, *), when it cannot
    group_size: int,
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
            z = _normalize(x, mean, invstd, weight, bias, group_size)
            z = z if residual is None else z + residual
            by_output = activation not in ("gelu", "gelu_tanh", "silu", "hardswish")
            saved = apply_activation(z, activation) if by_output else z
        dz = activation_backward(dz, saved, activation)
    xhat = _normalize(x, mean, invstd, None, None, group_size)
    others = [dim for dim in range(x.dim()) if dim != 1]
    dx, dw, db, dresidual = (dy.new_empty(0) for _ in range(4))
    if need_dx:
        g = dz if weight is None else dz * _affine(weight, x, dtype)
        count = _counts(x, group_size)
        mean_g = _grouped(g, group_size).sum(-1) / count
        mean_gx = _grouped(g * xhat, group_size).sum(-1) / count
        centred = g - _per_channel(mean_g, x, group_size) - xhat * _per_channel(mean_gx, x, group_size)
        dx = torch.empty_like(x).copy_(centred * _per_channel(invstd, x, group_size))
    if need_dw:
        assert weight is not None
        dw = torch.zeros_like(weight)
        dw[:c] = (dz * xhat).sum(others)
    if need_db:
        assert bias is not None
        db = torch.zeros_like(bias)
        db[:c] = dz.sum(others)
    if need_dresidual:
        dresidual = torch.empty_like(x).copy_(dz)
    return dx, dw, db, dresidual
