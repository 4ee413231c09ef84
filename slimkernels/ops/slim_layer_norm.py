"""``slim_layer_norm``: layer norm, residual add and activation, on the first features of full-size parameters."""

import torch
from torch import Tensor

from slimkernels.ops._common import autograd, define, on_gpu
from slimkernels.ops._eager import eager
from slimkernels.ops._norm import check_norm, checked_residual, empty_or, saved_for_activation
from slimkernels.reference import slim_layer_norm as reference
from slimkernels.reference.slim_batch_norm import statistics_dtype

_eager = eager("slim_layer_norm")


def slim_layer_norm(
    x: Tensor,  # (*, c), c <= C
    weight: Tensor | None = None,  # (C,) or None
    bias: Tensor | None = None,  # (C,) or None
    *,
    eps: float = 1e-5,
    activation: str = "none",
    residual: Tensor | None = None,  # (*, c), added before the activation
) -> Tensor:  # (*, c)
    """Layer norm over the last dimension with the first ``c`` entries of full-size parameters.

    Equivalent to ``act(F.layer_norm(x, (c,), weight[:c], bias[:c], eps) + residual)``. The output is contiguous. Backward
    recomputes the normalised input from ``x``. GPU: Triton; float64, and the backward of rows wider than 4096, run the
    reference.

    Raises: ValueError when a shape or the activation's name does not fit, TypeError for dtypes: ``x`` and ``residual``
    share one; parameters have that one or float32.
    Numerics: 16-bit inputs are computed in float32 and rounded once, at the store; statistics are float32, the variance
    taken around the mean.
    Source: Ba et al., Layer Normalization (arXiv 1607.06450).
    """
    op = "slim_layer_norm"
    y = _eager(x, weight, bias, eps, activation, residual)
    if y is not None:
        return y
    check_norm(op, x, -1, activation, weight=weight, bias=bias)
    residual = checked_residual(op, x, residual)
    y, _, _ = torch.ops.slimkernels.slim_layer_norm.default(x, weight, bias, eps, activation, residual)
    return y


def contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake(x, weight, bias, eps, activation, residual):
    statistic = x.new_empty(x.shape[:-1], dtype=statistics_dtype(x))
    return contiguous_like(x), statistic, torch.empty_like(statistic)


def _backward_fake(
    dy, x, mean, invstd, weight, bias, output, residual, activation, need_dx, need_dw, need_db, need_dresidual
):
    return (
        contiguous_like(x) if need_dx else dy.new_empty(0),
        empty_or(weight, need_dw, dy),
        empty_or(bias, need_db, dy),
        contiguous_like(x) if need_dresidual else dy.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, ctx.activation, residual = inputs
    y, mean, invstd = output
    ctx.mark_non_differentiable(mean, invstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, invstd, weight, bias, *saved_for_activation(ctx.activation, y, residual))


def _backward(ctx, dy, dmean, dinvstd):
    if dy is None:
        return (None,) * 6
    need_dx, need_dw, need_db, _, _, need_dresidual = ctx.needs_input_grad
    plain = ctx.activation == "none"
    dx, dw, db, dresidual = torch.ops.slimkernels.slim_layer_norm_backward.default(
        dy, *ctx.saved_tensors, ctx.activation, need_dx, need_dw, need_db, need_dresidual and not plain
    )
    return (
        dx if need_dx else None,
        dw if need_dw else None,
        db if need_db else None,
        None,
        None,
        (dy if plain else dresidual) if need_dresidual else None,
    )


define(
    "slim_layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, str activation, Tensor? residual)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    default=reference.slim_layer_norm,
)
define(
    "slim_layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias,"
    " Tensor? output, Tensor? residual, str activation, bool need_dx, bool need_dw, bool need_db, bool need_dresidual)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    default=reference.slim_layer_norm_backward,
)
autograd("slim_layer_norm", _backward, _setup_context)
on_gpu("slim_layer_norm", "triton_kernels.slim_layer_norm")
on_gpu("slim_layer_norm_backward", "triton_kernels.slim_layer_norm")
