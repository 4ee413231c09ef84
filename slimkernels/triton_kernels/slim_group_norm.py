"""``slim_group_norm`` on GPUs: the launchers; the kernels are those of ``_channel_norm``."""

from torch import Tensor

from slimkernels.reference import slim_group_norm as reference
from slimkernels.triton_kernels import _channel_norm, _channel_norm_backward
from slimkernels.triton_kernels._norm import takes


def slim_group_norm(
    x: Tensor,  # (N, c, *)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    group_size: int,
    eps: float,
    activation: str,
    residual: Tensor | None,  # (N, c, *)
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference of this name; what the kernels do not take composes ATen."""
    if not takes(x):
        return reference.slim_group_norm(x, weight, bias, group_size, eps, activation, residual)
    group_size = min(group_size, x.shape[1])
    return _channel_norm.forward(x, weight, bias, residual, None, group_size, eps, True, True, activation)


def slim_group_norm_backward(
    dy: Tensor,  # (N, c, *)
    x: Tensor,  # (N, c, *)
    mean: Tensor,  # (N, groups)
    invstd: Tensor,  # (N, groups)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    output: Tensor | None,  # (N, c, *)
    residual: Tensor | None,  # (N, c, *)
    group_size: int,
    activation: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference of this name; what the kernels do not take composes ATen."""
    needs = need_dx, need_dw, need_db, need_dresidual
    if not takes(x):
        return reference.slim_group_norm_backward(
            dy, x, mean, invstd, weight, bias, output, residual, group_size, activation, *needs
        )
    return _channel_norm_backward.backward(
        *(dy, x, mean, invstd, weight, bias, output, residual, min(group_size, x.shape[1]), 0.0),
        *(True, True, True, activation, *needs),
    )
