"""``slim_rms_norm`` on GPUs: the launchers; the kernels are those of ``_row_norm``."""

from torch import Tensor

from slimkernels.reference import slim_rms_norm as reference
from slimkernels.triton_kernels import _row_norm
from slimkernels.triton_kernels._norm import takes


def slim_rms_norm(
    x: Tensor,  # (*, c)
    weight: Tensor | None,  # (C,)
    eps: float,
    activation: str,
    residual: Tensor | None,  # (*, c)
) -> tuple[Tensor, Tensor]:
    """As the reference of this name; what the kernel does not take composes ATen."""
    if not takes(x):
        return reference.slim_rms_norm(x, weight, eps, activation, residual)
    y, _, invrms = _row_norm.forward(x, weight, None, eps, activation, residual, False)
    return y, invrms


def slim_rms_norm_backward(
    dy: Tensor,  # (*, c)
    x: Tensor,  # (*, c)
    invrms: Tensor,  # (*)
    weight: Tensor | None,  # (C,)
    output: Tensor | None,  # (*, c)
    residual: Tensor | None,  # (*, c)
    activation: str,
    need_dx: bool,
    need_dw: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference of this name; what the kernel does not take, wider rows too, composes ATen."""
    if not takes(x) or x.shape[-1] > _row_norm.WIDEST_BACKWARD:
        return reference.slim_rms_norm_backward(
            dy, x, invrms, weight, output, residual, activation, need_dx, need_dw, need_dresidual
        )
    dx, dw, _, dresidual = _row_norm.backward(
        dy, x, None, invrms, weight, None, output, residual, activation, need_dx, need_dw, False, need_dresidual
    )
    return dx, dw, dresidual
