"""``slim_batch_norm`` on GPUs: the launchers; the kernels are those of ``_channel_norm``."""

from torch import Tensor

from slimkernels.reference import slim_batch_norm as reference
from slimkernels.triton_kernels import _channel_norm, _channel_norm_backward
from slimkernels.triton_kernels._norm import takes


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
    running = None
    if not training:
        assert running_mean is not None
        assert running_var is not None
        running = running_mean, running_var
    y, mean, var = _channel_norm.forward(x, weight, bias, residual, running, 1, eps, False, False, activation)
    return y, mean.view(-1), var.view(-1)


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
    return _channel_norm_backward.backward(
        *(dy, x, mean, var, weight, bias, output, residual, 1, eps),
        *(False, False, training, activation, *needs),
    )
