"""The activation on its own: the unfused half of the ops whose activation needs its input in backward."""

import torch
from torch import Tensor

from slimkernels.ops._common import OUTPUT_ACTIVATIONS, autograd, check_activation, check_float, define
from slimkernels.reference import _activation as reference


def activation(
    x: Tensor,  # any shape
    name: str,
) -> Tensor:  # the shape of x
    """Apply the activation ``name`` to every element of ``x``.

    Equivalent to ``torch.nn.functional``'s function of that name (``gelu_tanh`` is ``gelu(approximate="tanh")``).

    Raises: ValueError for an unknown name, TypeError when ``x`` is not floating point.
    Numerics: 16-bit inputs are computed in float32 and rounded once, at the store.
    """
    check_float("activation", x)
    check_activation("activation", name)
    return torch.ops.slimkernels.activation.default(x, name)


def activation_grad(dy: Tensor, saved: Tensor, name: str) -> Tensor:
    """Gradient at the input of the activation; ``saved`` is its output where that suffices, else its input."""
    return dy if name == "none" else torch.ops.slimkernels.activation_backward.default(dy, saved, name)


def _setup_context(ctx, inputs, output):
    x, ctx.name = inputs
    ctx.save_for_backward(output if ctx.name in OUTPUT_ACTIVATIONS else x)


def _backward(ctx, dy):
    (saved,) = ctx.saved_tensors
    return activation_grad(dy, saved, ctx.name), None


define(
    "activation(Tensor x, str name) -> Tensor",
    fake=lambda x, name: torch.empty_like(x),
    default=reference.activation,
)
define(
    "activation_backward(Tensor dy, Tensor saved, str name) -> Tensor",
    fake=lambda dy, saved, name: torch.empty_like(dy),
    default=reference.activation_backward,
)
autograd("activation", _backward, _setup_context)
