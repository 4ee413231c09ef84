"""``slim_batch_norm`` on GPUs: the launchers; the kernels are those of ``_channel_norm``."""

import torch
from torch import Tensor

from slimkernels.reference import slim_batch_norm as reference
from slimkernels.triton_kernels import _channel_norm, _channel_norm_backward
from slimkernels.triton_kernels._norm import takes
from slimkernels.triton_kernels._rows import new_output, one_stride, rows_of


def slim_batch_norm(
    x: Tensor,  # (N, c, *)
    running_mean: Tensor | None,  # (C,), read only when not training
    running_var: Tensor | None,  # (C,)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    training: bool,
    eps: float,
    activation: str,
    residual: Tensor | None,  # (N, c, *)
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference of this name; what the kernels do not take composes ATen."""
    if not takes(x):
        return reference.slim_batch_norm(
            x, running_mean, running_var, weight, bias, training, eps, activation, residual
        )
    c = x.shape[1]
    y, y_work = new_output(x)
    x = one_stride(x)
    residual = None if residual is None else one_stride(residual)
    rows = rows_of(x, residual, y_work, batched=False)
    if training:
        mean, var = (t.view(c) for t in _channel_norm.statistics(x, rows, 1, eps, False))
        source, copies = (mean, var), None
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = (x.new_empty(c, dtype=torch.float32) for _ in range(2))
        source, copies = (running_mean, running_var), (mean, var)
    _channel_norm.normalize(
        x, *source, weight, bias, residual, y_work, copies, rows, 1, eps, inverse=False, activation=activation
    )
    return y if y_work is y else y.copy_(y_work), mean, var


def slim_batch_norm_backward(
    dy: Tensor,  # (N, c, *)
    x: Tensor,  # (N, c, *)
    mean: Tensor,  # (c,)
    var: Tensor,  # (c,)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    output: Tensor | None,  # (N, c, *)
    residual: Tensor | None,  # (N, c, *)
    training: bool,
    eps: float,
    activation: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference of this name; what the kernels do not take composes ATen."""
    needs = need_dx, need_dw, need_db, need_dresidual
    if not takes(x):
        return reference.slim_batch_norm_backward(
            dy, x, mean, var, weight, bias, output, residual, training, eps, activation, *needs
        )
    statistics = mean.contiguous(), var.contiguous()
    return _channel_norm_backward.backward(
        *(dy, x, *statistics, weight, bias, output, residual, 1, eps),
        *(False, False, training, activation, *needs),
    )
