"""``slim_batch_norm``: batch norm, residual add and activation, on the first channels of full-size parameters."""

import torch
from torch import Tensor

from slimkernels.ops._common import autograd, define, on_gpu
from slimkernels.ops._eager import eager
from slimkernels.ops._norm import check_norm, checked_residual, empty_or, saved_for_activation
from slimkernels.ops._recipes import leave_recipe
from slimkernels.ops._slots import deposit, slot_of, stand_in
from slimkernels.reference import slim_batch_norm as reference
from slimkernels.reference.slim_batch_norm import statistics_dtype

_eager = eager("slim_batch_norm")


def slim_batch_norm(
    x: Tensor,  # (N, c, *), c <= C
    running_mean: Tensor | None,  # (C,) or None
    running_var: Tensor | None,  # (C,) or None
    weight: Tensor | None = None,  # (C,) or None
    bias: Tensor | None = None,  # (C,) or None
    *,
    training: bool = False,
    momentum: float | Tensor = 0.1,  # a number, or a tensor of one element (cumulative average: 1 / batches so far)
    eps: float = 1e-5,
    activation: str = "none",
    residual: Tensor | None = None,  # (N, c, *), added before the activation
) -> Tensor:  # (N, c, *)
    """Batch norm with the first ``c`` entries of full-size parameters and statistics.

    Equivalent to ``act(F.batch_norm(x, running_mean[:c], running_var[:c], weight[:c], bias[:c], training, momentum,
    eps) + residual)``: when training, the first ``c`` running statistics are updated in place and the others stay (an
    empty batch changes none). Works on contiguous and channels-last input of any rank >= 2; the output has the layout
    of ``x``. Backward recomputes the normalised input from ``x``, so that nothing but ``x`` (and, with a residual, the
    output or the residual) is kept.

    GPU: Triton, with sums in two passes and a fixed order (no atomics); float64 runs the reference.

    Raises: ValueError when a shape, the activation's name, a missing running statistic or a batch of one value per
    channel in training does not fit, TypeError for dtypes: ``x`` and ``residual`` share one; parameters and statistics
    have that one or float32.
    Numerics: 16-bit inputs are computed in float32 and rounded once, at the store; means and variances are float32,
    merged from blocks (never as a difference of large sums).
    Source: Ioffe and Szegedy, Batch Normalization (arXiv 1502.03167); Yu et al., Slimmable Neural Networks (arXiv
    1812.08928).
    """
    op = "slim_batch_norm"
    given = (x, running_mean, running_var, weight, bias, momentum if training else None)
    y = _eager(*given, eps, activation, residual)
    if y is not None:
        return y
    parameters = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    check_norm(op, x, 1, activation, **parameters)
    c = x.shape[1]
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: expected running_mean and running_var to be both given or both None, got one of them")
    if running_mean is None and not training:
        raise ValueError(f"{op}: expected running_mean and running_var when training is False, got None")
    residual = checked_residual(op, x, residual)
    weight, bias = stand_in(weight), stand_in(bias)
    if not training:
        y, _, _ = torch.ops.slimkernels.slim_batch_norm.default(
            x, running_mean, running_var, weight, bias, False, eps, activation, residual
        )
        return y
    count = x.numel() // c
    if count == 1:
        raise ValueError(f"{op}: expected more than 1 value per channel in training, got shape {tuple(x.shape)}")
    y, mean, var = torch.ops.slimkernels.slim_batch_norm.default(
        x, None, None, weight, bias, True, eps, activation, residual
    )
    if running_mean is not None and running_var is not None and count > 0:
        update_running(running_mean, mean, momentum)
        update_running(running_var, var * (count / (count - 1)), momentum)
    return y


def update_running(running: Tensor, batch: Tensor, momentum: float | Tensor) -> None:
    """``running[:c] += momentum * (batch - running[:c])`` in place, with ``batch`` of ``c`` entries."""
    with torch.no_grad():
        active = running[: batch.shape[0]]
        if isinstance(momentum, Tensor):
            momentum = momentum.to(active.dtype)
        active.lerp_(batch.to(active.dtype), momentum)


def _fake(x, running_mean, running_var, weight, bias, training, eps, activation, residual):
    statistics = x.new_empty(x.shape[1], dtype=statistics_dtype(x))
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


def _backward_fake(
    dy,
    x,
    mean,
    var,
    weight,
    bias,
    output,
    residual,
    training,
    eps,
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


def _backward_slice_fake(dy, x, *others):
    need_dw, need_db = others[-3:-1]
    dx, _, _, dresidual = _backward_fake(dy, x, *others)
    weight, bias = others[2:4]
    active = x.shape[1]
    dw = weight.new_empty(active) if need_dw and weight is not None else dy.new_empty(0)
    db = bias.new_empty(active) if need_db and bias is not None else dy.new_empty(0)
    return dx, dw, db, dresidual


def _backward_slice(dy, x, *others):
    """Gradients of weight and bias of the active slice alone, by cutting the full ones of any device's kernel."""
    dx, dw, db, dresidual = torch.ops.slimkernels.slim_batch_norm_backward.default(dy, x, *others)
    return dx, dw[: x.shape[1]].clone(), db[: x.shape[1]].clone(), dresidual


def _setup_context(ctx, inputs, output):
    x, _, _, weight, bias, ctx.training, ctx.eps, ctx.activation, residual = inputs
    ctx.weight_slot, ctx.bias_slot = slot_of(weight), slot_of(bias)
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.recipe = leave_recipe(x, y, (mean, var, weight, bias, ctx.eps, ctx.activation), residual)
    saved_output, saved_residual = saved_for_activation(ctx.activation, y, residual)
    ctx.reads_output = saved_output is not None
    if ctx.recipe is not None:
        saved_output = None
    ctx.save_for_backward(x, mean, var, weight, bias, saved_output, saved_residual)


def _backward(ctx, dy, dmean, dvar):
    if dy is None:
        return (None,) * 9
    x, mean, var, weight, bias, output, residual = ctx.saved_tensors
    if ctx.recipe is not None and ctx.reads_output:
        output = ctx.recipe.value()
    need_dx, need_dw, need_db, need_dresidual = (ctx.needs_input_grad[i] for i in (0, 3, 4, 8))
    plain = ctx.activation == "none"
    slots = ctx.weight_slot, ctx.bias_slot
    run = torch.ops.slimkernels.slim_batch_norm_backward.default
    if slots != (None, None):
        run = torch.ops.slimkernels.slim_batch_norm_backward_slice.default
    dx, dw, db, dresidual = run(
        *(dy, x, mean, var, weight, bias, output, residual, ctx.training, ctx.eps, ctx.activation),
        *(need_dx, need_dw, need_db, need_dresidual and not plain),
    )
    if ctx.recipe is not None:
        ctx.recipe.release()
    if slots != (None, None):
        dw = deposit(ctx.weight_slot, dw, weight.shape) if need_dw else None
        db = deposit(ctx.bias_slot, db, bias.shape) if need_db else None
    if need_dresidual and plain:
        dresidual = dy
    return (
        dx if need_dx else None,
        None,
        None,
        dw if need_dw else None,
        db if need_db else None,
        *([None] * 3),
        dresidual if need_dresidual else None,
    )


define(
    "slim_batch_norm(Tensor x, Tensor? running_mean, Tensor? running_var, Tensor? weight, Tensor? bias, bool training,"
    " float eps, str activation, Tensor? residual) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    default=reference.slim_batch_norm,
)
define(
    "slim_batch_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias,"
    " Tensor? output, Tensor? residual, bool training, float eps, str activation, bool need_dx, bool need_dw,"
    " bool need_db, bool need_dresidual) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    default=reference.slim_batch_norm_backward,
)
define(
    "slim_batch_norm_backward_slice(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias,"
    " Tensor? output, Tensor? residual, bool training, float eps, str activation, bool need_dx, bool need_dw,"
    " bool need_db, bool need_dresidual) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_slice_fake,
    default=_backward_slice,
)
autograd("slim_batch_norm", _backward, _setup_context)
on_gpu("slim_batch_norm", "triton_kernels.slim_batch_norm")
on_gpu("slim_batch_norm_backward", "triton_kernels.slim_batch_norm")
