"""Which channel every element of every tensor of a run belongs to.

A label is an integer: 0, nothing is known (a tensor that the network makes of any size it needs); ``n + 1``, the position
``n`` of the coupling; below 0, a size that is given (an input, a weight that stays as it is), with a reason. Labels are kept
by storage: a view has the labels of what it is a view of, and what is written into a view is in the base.
"""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

FIXED = "its channels meet a tensor of a given size"


class Labels:
    """Labels of tensors, and the reasons behind the negative ones."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self._of: dict[int, tuple[StorageWeakRef, int, Tensor]] = {}  # bytes that one label stands for, labels
        self._purge_at = 1000

    def fixed(self, reason: str) -> int:
        """The label of what has to keep its size."""
        if reason not in self.reasons:
            self.reasons.append(reason)
        return -1 - self.reasons.index(reason)

    def reason(self, label: int) -> str:
        return self.reasons[-1 - label]

    def get(self, t: Tensor) -> Tensor | None:
        """Labels of the shape of ``t`` (not to be changed), or None when all are 0."""
        if t.layout != torch.strided or t.is_meta:
            return None
        key = t.untyped_storage()._cdata
        if key not in self._of:
            return None
        ref, unit, stored = self._of[key]
        size = t.element_size()
        if size < unit:  # parts of complex numbers, for example
            stored = stored.repeat_interleave(unit // size)
            unit = size
            self._of[key] = (ref, unit, stored)
        k = size // unit
        return stored.as_strided(t.shape, [s * k for s in t.stride()], t.storage_offset() * k)

    def put(self, t: Tensor, labels: Tensor | None) -> None:
        """``labels`` broadcast to the shape of ``t``; None: all 0."""
        if t.layout != torch.strided or t.is_meta or t.numel() == 0:
            return
        storage = t.untyped_storage()
        if storage._cdata not in self._of:
            if labels is None:
                return
            if len(self._of) > self._purge_at:
                self._of = {key: entry for key, entry in self._of.items() if not entry[0].expired()}
                self._purge_at = 2 * len(self._of) + 1000
            made = torch.zeros(storage.nbytes() // t.element_size(), dtype=torch.int32)
            self._of[storage._cdata] = (StorageWeakRef(storage), t.element_size(), made)
        place = self.get(t)
        assert place is not None
        source = torch.zeros((), dtype=torch.int32) if labels is None else labels
        source = source.expand(t.shape)
        for dim, stride in enumerate(t.stride()):
            if stride == 0 and t.shape[dim] > 1:  # one element seen many times
                place, source = place.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
        place.copy_(source)


def varying(labels: Tensor) -> Tensor:
    """The same with size 1 in every dimension along which the labels are equal."""
    for dim in range(labels.dim()):
        first = labels.narrow(dim, 0, 1)
        if labels.shape[dim] > 1 and bool((labels == first).all()):
            labels = first
    return labels


def agreed(labels: Tensor, dims: list[int]) -> Tensor:
    """Size 1 in ``dims``: the label that all have there, or 0."""
    low = high = labels
    for dim in dims:
        low, high = low.amin(dim, keepdim=True), high.amax(dim, keepdim=True)
    return torch.where(low == high, low, torch.zeros((), dtype=low.dtype))
