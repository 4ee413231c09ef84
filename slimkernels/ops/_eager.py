"""The short way of usual calls on the CPU: checks and autograd node in C++ (csrc/cpu/eager.h)."""

from collections.abc import Callable

from torch import Tensor
from torch.compiler import is_compiling

from slimkernels import _extension
from slimkernels.ops import _recipes
from slimkernels.ops._slots import _slots


def eager(op: str) -> Callable[..., Tensor | None]:
    """The C++ function for calls of ``op``; None from it, or where it cannot be used, sends the call the long way.

    The long way tells what is wrong with an argument, and takes all that is not usual: other devices, float64, subclasses,
    autocast, tracing, and training steps that put gradients into slots or leave recipes.
    """
    if _extension._C is None:
        return _never
    kernel = getattr(_extension._C, f"eager_{op}")

    def run(*args: object) -> Tensor | None:
        if is_compiling() or _slots or _recipes._active:
            return None
        return kernel(*args)

    return run


def _never(*args: object) -> None:
    return None
