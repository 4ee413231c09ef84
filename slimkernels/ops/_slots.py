"""Gradients straight into slices: several backward passes add to one buffer a parameter, which autograd sees once.

By default every op returns a full-size gradient, zero outside the active slice, and autograd adds those up. Inside
``gradient_slots`` an op adds the slice alone to the parameter's ``Slot``. In all passes but the last it runs on a leaf
of its own that shares the parameter's memory, so that no hook of the parameter sees those. The last pass hands the sum to
autograd, and ``flush`` what that pass did not reach: hooks run once, with the sum.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

Parameter = TypeVar("Parameter", bound=Tensor | None)


class Slot:
    """The sum of one parameter's gradients; ``last`` hands it to autograd at the next addition."""

    __slots__ = ("last", "leaf", "open", "parameter", "total")

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.leaf = parameter.detach().requires_grad_()  # what ops run on before the last pass
        self.total: Tensor | None = None
        self.last = False
        self.open = True

    def add(self, part: Tensor) -> Tensor | None:
        """Adds the gradient of the leading slice; what the op returns to autograd for the parameter.

        ``part`` is not used by the caller afterwards.
        """
        part = part.to(self.parameter.dtype)
        if not self.open:
            return _extended(part, torch.zeros_like(self.parameter))
        if self.total is not None:
            torch.ops.slimkernels.slice_accumulate_.default([self.total], [part])
        elif part.shape == self.parameter.shape and part.stride() == self.parameter.stride():
            self.total = part
        else:
            self.total = _extended(part, torch.zeros_like(self.parameter))
        return self.take() if self.last else None

    def take(self) -> Tensor | None:
        total, self.total = self.total, None
        return total


def _extended(part: Tensor, zeros: Tensor) -> Tensor:
    torch.ops.slimkernels.slice_accumulate_.default([zeros], [part])
    return zeros


_slots: dict[int, Slot] = {}  # by id of the parameter and of its leaf: other threads' backward finds them too


def slot_of(parameter: Tensor | None) -> Slot | None:
    """The slot of a parameter or its leaf, None outside ``gradient_slots`` and for any other tensor."""
    return _slots.get(id(parameter)) if _slots else None


def stand_in(parameter: Parameter) -> Parameter:
    """What an op that deposits its gradients runs on instead of ``parameter``."""
    if torch.compiler.is_compiling() or not _slots:
        return parameter
    slot = slot_of(parameter)
    return parameter if slot is None or slot.last else cast("Parameter", slot.leaf)


class _CastSlice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter, dtype, sizes):
        ctx.slot, ctx.shape = slot_of(parameter), parameter.shape
        return parameter[tuple(slice(0, size) for size in sizes)].to(dtype)

    @staticmethod
    def backward(ctx, grad):
        return deposit(ctx.slot, grad, ctx.shape), None, None


def cast_slice(parameter: Parameter, dtype: torch.dtype, *sizes: int) -> Parameter:
    """The leading slice of a parameter that has a slot, in the dtype of autocast; any other tensor as a whole."""
    if parameter is None or parameter.dtype == dtype:
        return parameter
    if torch.compiler.is_compiling() or slot_of(parameter) is None:
        return cast("Parameter", parameter.to(dtype))
    return _CastSlice.apply(stand_in(parameter), dtype, sizes)


def deposit(slot: Slot | None, part: Tensor, shape: Sequence[int]) -> Tensor | None:
    """``slot.add(part)``; without a slot the gradient of the full ``shape``."""
    if slot is not None:
        return slot.add(part)
    return part if part.shape == tuple(shape) else _extended(part, part.new_zeros(shape))


@contextmanager
def gradient_slots(parameters: Iterable[Tensor]) -> Iterator[list[Slot]]:
    """Inside it the gradients of ``parameters`` add up in slots. What is in them when it is left is lost."""
    made = [Slot(p) for p in parameters if type(p) in (nn.Parameter, Tensor) and p.requires_grad and p.is_leaf]
    made = [slot for slot in made if id(slot.parameter) not in _slots]
    _slots.update({id(t): slot for slot in made for t in (slot.parameter, slot.leaf)})
    try:
        yield made
    finally:
        for slot in made:
            slot.open = False
            slot.total = None
            del _slots[id(slot.parameter)], _slots[id(slot.leaf)]


def flush(slots: Iterable[Slot]) -> None:
    """Accumulates what is left in the slots through autograd, so that the parameters' hooks run."""
    filled = [(slot.parameter, slot.take()) for slot in slots if slot.total is not None]
    if filled:
        parameters, totals = zip(*filled, strict=True)
        del filled
        torch.autograd.backward(parameters, totals)
