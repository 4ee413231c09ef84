"""Gradients that the reducing pass of a distributed step does not make itself: another width's, a skipped block's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimkernels.ops._slots import Slot
from slimkernels.train._common import map_tensors


@contextmanager
def all_reached(inner: nn.Module, slots: Sequence[Slot]) -> Iterator[None]:
    """Inside it the outputs of ``inner``, a module in DistributedDataParallel, depend on the parameters of all slots
    that have a sum: those that the forward does not reach get it as their gradient when backward comes to the outputs.
    The wrapper sees them used, so that it reduces them with all others; what it takes for unused stays with its rank.
    """

    def reach(module: nn.Module, inputs: object, outputs: object) -> object:
        found: list[Tensor] = []

        def collect(t: Tensor) -> Tensor:
            if t.requires_grad:
                found.append(t)
            return t

        map_tensors(outputs, collect)
        reached = _leaves(found)
        others = [slot for slot in slots if slot.total is not None and id(slot.parameter) not in reached]
        if not others:
            return outputs
        parameters = [slot.parameter for slot in others]
        return map_tensors(outputs, lambda t: _Reach.apply(t, others, *parameters) if t.requires_grad else t)

    handle = inner.register_forward_hook(reach)
    try:
        yield
    finally:
        handle.remove()


class _Reach(torch.autograd.Function):
    """The tensor as it is; backward hands over the sums of ``slots``, once."""

    @staticmethod
    def forward(ctx, x, slots, *parameters):
        ctx.slots = slots
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy, None, *(slot.take() for slot in ctx.slots)


def _leaves(outputs: Sequence[Tensor]) -> set[int]:
    """Ids of the tensors that a backward from ``outputs`` gives gradients to."""
    found, seen, waiting = set(), set(), [t.grad_fn for t in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        waiting += [child for child, _ in node.next_functions]
    return found
