"""What every op file uses: the library handle, registration, autocast and argument checks."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from slimkernels.cuda_kernels import reason_missing as cuda_missing
from slimkernels.triton_kernels import reason_missing as triton_missing

LIBRARY = torch.library.Library("slimkernels", "DEF")

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "elu", "relu6", "hardswish", "tanh", "sigmoid")
# Those whose derivative can be computed from their output; the others need their input in backward.
OUTPUT_ACTIVATIONS = ("none", "relu", "elu", "relu6", "tanh", "sigmoid")

# Asked once: torch.compile of torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(k for k in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(k))


# Of the packages of GPU kernels: why one cannot be used here, or "".
REASON_MISSING = {"triton_kernels": triton_missing, "cuda_kernels": cuda_missing}


def define(schema: str, *, fake: Callable, default: Callable) -> None:
    """Define the op ``schema``, its shape function and its reference.

    The reference is registered under "default" (CompositeExplicitAutograd): a kernel for a device overrides it.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"slimkernels::{name}", fake, lib=LIBRARY)


def autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Attach ``backward`` to the op ``name``.

    For an op whose arguments are positional, without defaults and without lists of tensors this does what
    ``torch.library.register_autograd`` does, but looks at the schema once and not in every call: a training forward of a
    small layer then spends 7 us here instead of 30.
    """
    op = getattr(torch.ops.slimkernels, name).default
    arguments = op._schema.arguments
    if any(a.kwarg_only or a.has_default_value() or "List[Tensor]" in str(a.type) for a in arguments):
        torch.library.register_autograd(f"slimkernels::{name}", backward, setup_context=setup_context, lib=LIBRARY)
        return

    def below(keyset, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    def forward(ctx, keyset, *inputs):
        output = below(keyset, *inputs)
        setup_context(ctx, inputs, output)
        return output

    def run_backward(ctx, *grads):
        needs = ctx.needs_input_grad
        ctx.needs_input_grad = needs[1:]  # the first is the keyset
        try:
            given = backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needs  # a kept graph runs again
        return (None, *given) if isinstance(given, tuple) else (None, given)

    members = {"forward": staticmethod(forward), "backward": staticmethod(run_backward)}
    node: Any = type(f"{name}_autograd", (torch.autograd.Function,), members)

    def choose(keyset, *inputs):
        check_no_tangents(name, *inputs)
        needed = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
        return node.apply(keyset, *inputs) if needed else below(keyset, *inputs)

    LIBRARY.impl(name, choose, "Autograd", with_keyset=True)


def on_gpu(name: str, *modules: str) -> None:
    """Make the functions ``name`` of ``slimkernels.<module>`` the kernels of the op ``name`` for CUDA tensors.

    They are imported at the first call. Each is asked in turn, where its package can be used, and returns NotImplemented
    for what another one runs; last comes the function of the same name in ``reference``, in the last module's file.
    """
    loaded: list[Callable] = []

    def load() -> Iterator[Callable]:
        stem = modules[-1].rpartition(".")[2]
        for module in modules:
            if not REASON_MISSING[module.partition(".")[0]]():
                yield getattr(importlib.import_module(f"slimkernels.{module}"), name)
        yield getattr(importlib.import_module(f"slimkernels.reference.{stem}"), name)

    def run(*args):
        if not loaded:
            loaded[:] = list(load())
        for kernel in loaded:
            result = kernel(*args)
            if result is not NotImplemented:
                return result
        raise AssertionError(name)

    LIBRARY.impl(name, run, "CUDA")


def check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: expected activation to be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_no_tangents(op: str, *values: Any) -> None:
    """Without this, PyTorch drops what forward-mode differentiation asks for and calls the derivative zero."""
    if forward_ad._current_level >= 0:
        for value in values:
            if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
                raise NotImplementedError(f"{op}: expected inputs without tangents (forward-mode derivatives), got one")


def check_float(op: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected x to be a Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: expected x of dtype float32, float64, bfloat16 or float16, got {x.dtype}")


def check_same_dtype_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Every tensor in ``others`` that is not None has the dtype and device of ``x``."""
    for name, other in others.items():
        if other is None:
            continue
        if other.dtype != x.dtype:
            raise TypeError(f"{op}: expected {name} of dtype {x.dtype} like x, got {other.dtype}")
        if other.device != x.device:
            raise ValueError(f"{op}: expected {name} on device {x.device} like x, got {other.device}")


def check_shape(op: str, name: str, tensor: Tensor | None, shape: Sequence[int]) -> None:
    if tensor is not None and tensor.shape != shape and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: expected {name} of shape {tuple(shape)}, got {tuple(tensor.shape)}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast asks for on the device of ``x``, or None when it is off."""
    kind = x.device.type
    on = kind in _AUTOCAST_DEVICES and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def grad_needed(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
