"""``slim_group_norm``: group norm, residual add and activation, on the first channels of full-size parameters."""

import torch
from torch import Tensor

from slimkernels.ops._common import autograd, define, on_gpu
from slimkernels.ops._eager import eager
from slimkernels.ops._norm import check_norm, checked_residual, empty_or, saved_for_activation
from slimkernels.reference import slim_group_norm as reference
from slimkernels.reference.slim_batch_norm import statistics_dtype

_eager = eager("slim_group_norm")


def slim_group_norm(
    x: Tensor,  # (N, c, *), c <= C
    weight: Tensor | None = None,  # (C,) or None
    bias: Tensor | None = None,  # (C,) or None
    *,
    group_size: int,
    eps: float = 1e-5,
    activation: str = "none",
    residual: Tensor | None = None,  # (N, c, *), added before the activation
) -> Tensor:  # (N, c, *)
    """Group norm that keeps the size of its groups, with the first ``c`` entries of full-size parameters.

    Equivalent to ``act(F.group_norm(x, c // group_size, weight[:c], bias[:c], eps) + residual)``: fewer channels give fewer
    groups, so that every group that is left has the statistics it has at full width. When ``group_size`` does not divide
    ``c``, the last group has the channels that are left (with ``group_size == C``: one group of all active channels). The
    output has the layout of ``x``. Backward recomputes the normalised input from ``x``.

    GPU: Triton, with sums in two passes and a fixed order (no atomics); float64 runs the reference.

    Raises: ValueError when a shape, the group size or the activation's name does not fit, TypeError for dtypes: ``x`` and
    ``residual`` share one; parameters have that one or float32.
    Numerics: 16-bit inputs are computed in float32 and rounded once, at the store; statistics are float32, the variance
    taken around the mean.
    Source: Wu and He, Group Normalization (arXiv 1803.08494); Yu et al. (arXiv 1812.08928) for slimming.
    """
    op = "slim_group_norm"
    y = _eager(x, weight, bias, group_size, eps, activation, residual)
    if y is not None:
        return y
    check_norm(op, x, 1, activation, weight=weight, bias=bias)
    if group_size < 1:
        raise ValueError(f"{op}: expected group_size of at least 1, got {group_size}")
    residual = checked_residual(op, x, residual)
    y, _, _ = torch.ops.slimkernels.slim_group_norm.default(x, weight, bias, group_size, eps, activation, residual)
    return y


def _fake(x, weight, bias, group_size, eps, activation, residual):
    groups = (x.shape[1] + group_size - 1) // group_size
    statistic = x.new_empty((x.shape[0], groups), dtype=statistics_dtype(x))
    return torch.empty_like(x), statistic, torch.empty_like(statistic)


def _backward_fake(
    dy,
    x,
    mean,
    invstd,
    weight,
    bias,
    output,
    residual,
    group_size,
    activation,
    need_dx,
    need_dw,
    need_db,
    need_dresidual,
):
    return (
        torch.empty_like(x) if need_dx else dy.new_empty(0),
        empty_or(weight, need_dw, dy),
        empty_or(bias, need_db, dy),
        torch.empty_like(x) if need_dresidual else dy.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.group_size, _, ctx.activation, residual = inputs
    y, mean, invstd = output
    ctx.mark_non_differentiable(mean, invstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, invstd, weight, bias, *saved_for_activation(ctx.activation, y, residual))


def _backward(ctx, dy, dmean, dinvstd):
    if dy is None:
        return (None,) * 7
    need_dx, need_dw, need_db, *_, need_dresidual = ctx.needs_input_grad
    plain = ctx.activation == "none"
    dx, dw, db, dresidual = torch.ops.slimkernels.slim_group_norm_backward.default(
        dy,
        *ctx.saved_tensors,
        ctx.group_size,
        ctx.activation,
        need_dx,
        need_dw,
        need_db,
        need_dresidual and not plain,
    )
    return (
        dx if need_dx else None,
        dw if need_dw else None,
        db if need_db else None,
        *([None] * 3),
        (dy if plain else dresidual) if need_dresidual else None,
    )


define(
    "slim_group_norm(Tensor x, Tensor? weight, Tensor? bias, SymInt group_size, float eps, str activation,"
    " Tensor? residual) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    default=reference.slim_group_norm,
)
define(
    "slim_group_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias,"
    " Tensor? output, Tensor? residual, SymInt group_size, str activation, bool need_dx, bool need_dw, bool need_db,"
    " bool need_dresidual) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    default=reference.slim_group_norm_backward,
)
autograd("slim_group_norm", _backward, _setup_context)
on_gpu("slim_group_norm", "triton_kernels.slim_group_norm")
on_gpu("slim_group_norm_backward", "triton_kernels.slim_group_norm")
