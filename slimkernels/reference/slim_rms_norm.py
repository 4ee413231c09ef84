"""``slim_rms_norm`` in plain PyTorch: the specification, the fallback and the test oracle."""

from torch import Tensor

from slimkernels.reference.slim_layer_norm import row_norm_backward, slim_rms_norm

__all__ = ["slim_rms_norm", "slim_rms_norm_backward"]


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
) -> tuple[Tensor, Tensor, Tensor]:  # (*, c), (C,), (*, c); an empty tensor where not needed
    """See ``row_norm_backward``."""
    dx, dw, _, dresidual = row_norm_backward(
        dy, x, None, invrms, weight, None, output, residual, activation, need_dx, need_dw, False, need_dresidual
    )
    return dx, dw, dresidual
