"""``slim_rms_norm``: RMS norm, residual add and activation, on the first features of full-size parameters."""

import torch
from torch import Tensor

from slimkernels.ops._common import autograd, define, on_gpu
from slimkernels.ops._eager import eager
from slimkernels.ops._norm import check_norm, checked_residual, empty_or, saved_for_activation
from slimkernels.ops.slim_layer_norm import contiguous_like
from slimkernels.reference import slim_rms_norm as reference
from slimkernels.reference.slim_batch_norm import statistics_dtype

_eager = eager("slim_rms_norm")


def slim_rms_norm(
    x: Tensor,  # (*, c), c <= C
    weight: Tensor | None = None,  # (C,) or None
    *,
    eps: float | None = None,  # None: the epsilon of float32 (float64 for float64), as torch
    activation: str = "none",
    residual: Tensor | None = None,  # (*, c), added before the activation
) -> Tensor:  # (*, c)
    """RMS norm over the last dimension with the first ``c`` entries of full-size parameters.

    Equivalent to ``act(F.rms_norm(x, (c,), weight[:c], eps) + residual)``. The output is contiguous. Backward
    recomputes the normalised input from ``x``. GPU: Triton; float64, and the backward of rows wider than 4096, run the
    reference.

    Raises: ValueError when a shape or the activation's name does not fit, TypeError for dtypes: ``x`` and ``residual``
    share one; parameters have that one or float32.
    Numerics: 16-bit inputs are computed in float32 and rounded once, at the store; the statistic is float32.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).
    """
    op = "slim_rms_norm"
    y = _eager(x, weight, eps, activation, residual)
    if y is not None:
        return y
    check_norm(op, x, -1, activation, weight=weight)
    residual = checked_residual(op, x, residual)
    if eps is None:
        eps = torch.finfo(statistics_dtype(x)).eps
    y, _ = torch.ops.slimkernels.slim_rms_norm.default(x, weight, eps, activation, residual)
    return y


def _fake(x, weight, eps, activation, residual):
    return contiguous_like(x), x.new_empty(x.shape[:-1], dtype=statistics_dtype(x))


def _backward_fake(dy, x, invrms, weight, output, residual, activation, need_dx, need_dw, need_dresidual):
    return (
        contiguous_like(x) if need_dx else dy.new_empty(0),
        empty_or(weight, need_dw, dy),
        contiguous_like(x) if need_dresidual else dy.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    x, weight, _, ctx.activation, residual = inputs
    y, invrms = output
    ctx.mark_non_differentiable(invrms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, invrms, weight, *saved_for_activation(ctx.activation, y, residual))


def _backward(ctx, dy, dinvrms):
    if dy is None:
        return (None,) * 5
    need_dx, need_dw, _, _, need_dresidual = ctx.needs_input_grad
    plain = ctx.activation == "none"
    dx, dw, dresidual = torch.ops.slimkernels.slim_rms_norm_backward.default(
        dy, *ctx.saved_tensors, ctx.activation, need_dx, need_dw, need_dresidual and not plain
    )
    return (
        dx if need_dx else None,
        dw if need_dw else None,
        None,
        None,
        (dy if plain else dresidual) if need_dresidual else None,
    )


define(
    "slim_rms_norm(Tensor x, Tensor? weight, float eps, str activation, Tensor? residual) -> (Tensor, Tensor)",
    fake=_fake,
    default=reference.slim_rms_norm,
)
define(
    "slim_rms_norm_backward(Tensor dy, Tensor x, Tensor invrms, Tensor? weight, Tensor? output, Tensor? residual,"
    " str activation, bool need_dx, bool need_dw, bool need_dresidual) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    default=reference.slim_rms_norm_backward,
)
autograd("slim_rms_norm", _backward, _setup_context)
on_gpu("slim_rms_norm", "triton_kernels.slim_rms_norm")
on_gpu("slim_rms_norm_backward", "triton_kernels.slim_rms_norm")
