"""``slim_linear`` in plain PyTorch: the specification, the fallback and the test oracle."""

import torch.nn.functional as F
from torch import Tensor

from slimkernels.reference._activation import activation as apply_activation
from slimkernels.reference._slice import block_slice, block_unslice


def slim_linear(
    x: Tensor,  # (*, k)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    out_features: int,
    in_blocks: int = 1,
    out_blocks: int = 1,
    activation: str = "none",
    residual: Tensor | None = None,  # (*, n)
) -> Tensor:  # (*, n)
    """``act(x @ W.T + b + residual)`` with ``W`` and ``b`` the active block slice of ``weight`` and ``bias``."""
    w = block_slice(block_slice(weight, 1, x.shape[-1], in_blocks), 0, out_features, out_blocks)
    b = None if bias is None else block_slice(bias, 0, out_features, out_blocks)
    y = F.linear(x, w, b)
    if residual is not None:
        y = y + residual
    return y if activation == "none" else apply_activation(y, activation)


def slim_linear_backward(
    dy: Tensor,  # (*, n)
    x: Tensor,  # (*, k)
    weight: Tensor,  # (N, K)
    in_blocks: int,
    out_blocks: int,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # (*, k), (N, K), (N,); an empty tensor where not needed
    """Gradients of ``x @ W.T + b``; those of weight and bias have the full size, with zeros outside the slice."""
    n, k = dy.shape[-1], x.shape[-1]
    dx = dw = db = dy.new_empty(0)
    if need_dx:
        w = block_slice(block_slice(weight, 1, k, in_blocks), 0, n, out_blocks)
        dx = dy.matmul(w)
    dy2 = dy.reshape(-1, n)
    if need_dw:
        dw = block_unslice(dy2.t().mm(x.reshape(-1, k)), 1, weight.shape[1], in_blocks)
        dw = block_unslice(dw, 0, weight.shape[0], out_blocks)
    if need_db:
        db = block_unslice(dy2.sum(0), 0, weight.shape[0], out_blocks)
    return dx, dw, db
