"""``slim_layer_norm`` on GPUs: the launchers; the kernels are those of ``_row_norm``."""

from torch import Tensor

from slimkernels.reference import slim_layer_norm as reference
from slimkernels.triton_kernels import _row_norm
from slimkernels.triton_kernels._norm import takes


def slim_layer_norm(
    x: Tensor,  # (*, c)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    eps: float,
    activation: str,
    residual: Tensor | None,  # (*, c)
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference of this name; what the kernel does not take composes ATen."""
    if not takes(x):
        return reference.slim_layer_norm(x, weight, bias, eps, activation, residual)
    y, mean, invstd = _row_norm.forward(x, weight, bias, eps, activation, residual, True)
    assert mean is not None
    return y, mean, invstd


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the reference of this name; what the kernel does not take, wider rows too, composes ATen."""
    fits = takes(x) and x.shape[-1] <= _row_norm.WIDEST_BACKWARD
    run = _row_norm.backward if fits else reference.row_norm_backward
    needs = need_dx, need_dw, need_db, need_dresidual
    return run(dy, x, mean, invstd, weight, bias, output, residual, activation, *needs)
