"""Gradients straight into slices: several backward passes add to one buffer a parameter, which autograd sees once.

By default every op returns a full-size gradient, zero outside the active slice, and autograd adds those up. Inside
``gradient_slots`` an op adds the slice alone to the parameter's ``Slot``. In all passes but the last it runs on a leaf
of its own that shares the parameter's memory, so that no hook of the parameter sees those. The last pass hands the sum to
autograd, and ``flush`` what that pass did not reach: hooks run once, with the sum.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from slimkernels import _extension

Parameter = TypeVar("Parameter", bound=Tensor | None)


class Waiting:
    """Additions on one GPU that share a launch. Those of small slices only: a large one is worth its own, and what waits
    holds memory (``MOST * SMALL`` numbers at most)."""

    MOST = 36  # slices of one launch
    SMALL = 2**18  # numbers

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.parts: list[Tensor] = []
        self.stream: torch.cuda.Stream | None = None

    @classmethod
    def takes(cls, part: Tensor) -> bool:
        return part.is_cuda and part.numel() <= cls.SMALL

    def put(self, slot: "Slot", part: Tensor) -> None:
        stream = torch.cuda.current_stream(part.device) if part.is_cuda else None
        if slot.waits or stream != self.stream or len(self.parts) == self.MOST:
            self.run()  # no buffer twice in a launch, and the stream that made the parts adds them
        self.stream = stream
        slot.waits = True
        self.slots.append(slot)
        self.parts.append(part)

    def run(self) -> None:
        slots, parts, self.slots, self.parts = self.slots, self.parts, [], []
        if not slots:
            return
        for slot in slots:
            slot.waits = False
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            torch.ops.slimkernels.slice_accumulate_.default([slot.sum() for slot in slots], parts)


class Slot:
    """The sum of one parameter's gradients; ``last`` hands it to autograd at the next addition.

    On the CPU the extension's class of this name does the same without Python (csrc/cpu/gradient_slot.cpp).
    """

    __slots__ = ("last", "leaf", "open", "parameter", "queue", "total", "waits")

    def __init__(self, parameter: Tensor, queue: Waiting) -> None:
        self.parameter = parameter
        self.leaf = parameter.detach().requires_grad_()  # what ops run on before the last pass
        self.queue = queue  # the device's
        self.waits = False  # whether the queue holds an addition to the sum
        self.total: Tensor | None = None
        self.last = False
        self.open = True

    def add(self, part: Tensor) -> Tensor | None:
        """Adds the gradient of the leading slice; what the op returns to autograd for the parameter.

        ``part`` is not used by the caller afterwards.
        """
        dtype = self.parameter.dtype
        if dtype != torch.float32:  # which 16-bit gradients are added to as they are
            part = part.to(dtype)
        if not self.open:
            return _extended(part, torch.zeros_like(self.parameter))
        if self.total is not None and not self.last and self.queue.takes(part):
            self.queue.put(self, part)
        elif self.total is not None:
            torch.ops.slimkernels.slice_accumulate_.default([self.sum()], [part])
        elif part.shape == self.parameter.shape and part.stride() == self.parameter.stride():
            self.total = part.to(dtype)
        else:
            self.total = _extended(part, torch.zeros_like(self.parameter))
        return self.take() if self.last else None

    def sum(self) -> Tensor:
        """The sum, with what waited for a launch in it."""
        if self.waits:
            self.queue.run()
        assert self.total is not None
        return self.total

    def take(self) -> Tensor | None:
        total = None if self.total is None else self.sum()
        self.total = None
        return total

    def close(self) -> None:
        self.open, self.total, self.waits = False, None, False


def _extended(part: Tensor, zeros: Tensor) -> Tensor:
    torch.ops.slimkernels.slice_accumulate_.default([zeros], [part])
    return zeros


_slots: dict[int, Slot] = {}  # by id of the parameter and of its leaf: other threads' backward finds them too


def make_slot(parameter: Tensor, queue: Waiting) -> Slot:
    extension = _extension._C
    return Slot(parameter, queue) if extension is None or not parameter.is_cpu else extension.Slot(parameter)


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
    queues: dict[torch.device, Waiting] = defaultdict(Waiting)
    made = [
        make_slot(p, queues[p.device])
        for p in dict.fromkeys(parameters)
        if type(p) in (nn.Parameter, Tensor) and p.requires_grad and p.is_leaf and id(p) not in _slots
    ]
    _slots.update({id(t): slot for slot in made for t in (slot.parameter, slot.leaf)})
    try:
        yield made
    finally:
        for slot in made:
            slot.close()
            del _slots[id(slot.parameter)], _slots[id(slot.leaf)]


def flush(slots: Iterable[Slot]) -> None:
    """Accumulates what is left in the slots through autograd, so that the parameters' hooks run."""
    filled = [(slot.parameter, slot.take()) for slot in slots if slot.total is not None]
    if filled:
        parameters, totals = zip(*filled, strict=True)
        del filled
        torch.autograd.backward(parameters, totals)
