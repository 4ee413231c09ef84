"""The activations of the ops, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def activation(x: Tensor, name: str) -> Tensor:
    """``x`` (any shape) through the activation ``name``."""
    if name == "none":
        return x.clone()
    if name == "relu":
        return F.relu(x)
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "silu":
        return F.silu(x)
    if name == "elu":
        return F.elu(x)
    if name == "relu6":
        return F.relu6(x)
    if name == "hardswish":
        return F.hardswish(x)
    if name == "tanh":
        return torch.tanh(x)
    if name == "sigmoid":
        return torch.sigmoid(x)
    raise ValueError(f"activation: unknown name {name!r}")


def activation_backward(dy: Tensor, saved: Tensor, name: str) -> Tensor:
    """Gradient at the activation's input.

    ``saved`` is the output for relu, relu6, elu, tanh and sigmoid, and the input for gelu, silu and hardswish.
    """
    aten = torch.ops.aten
    if name == "none":
        return dy.clone()
    if name == "relu":
        return aten.threshold_backward(dy, saved, 0)
    if name == "relu6":
        return aten.hardtanh_backward(dy, saved, 0, 6)
    if name == "elu":
        return aten.elu_backward(dy, 1.0, 1.0, 1.0, True, saved)
    if name == "tanh":
        return aten.tanh_backward(dy, saved)
    if name == "sigmoid":
        return aten.sigmoid_backward(dy, saved)
    if name == "gelu":
        return aten.gelu_backward(dy, saved)
    if name == "gelu_tanh":
        return aten.gelu_backward(dy, saved, approximate="tanh")
    if name == "silu":
        return aten.silu_backward(dy, saved)
    if name == "hardswish":
        return aten.hardswish_backward(dy, saved)
    raise ValueError(f"activation_backward: unknown name {name!r}")
