"""A linear layer of PyTorch's oneDNN, its weight packed ahead: a peer for inference in float32.

``F.linear`` of PyTorch's x86 builds takes MKL for float32, also under torch.compile with frozen weights, and MKL runs at
less than half of the peak of some processors that are not Intel's. oneDNN does not; PyTorch has it behind operators of its
own (seen in torch 2.13).
"""

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """``linear`` for inputs of at least one row; its parameters are the layer's."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            rows = x.numel() // x.shape[-1]
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def packed(module: nn.Module) -> nn.Module:
    """``module`` with its linear layers replaced."""
    if isinstance(module, nn.Linear):
        return PackedLinear(module)
    for name, child in module.named_children():
        setattr(module, name, packed(child))
    return module
