"""What the programs of one launch read and write: found out of bounds, and found in each other's way.

Programs of a grid run in any order, and at once. So no address may be stored by two of them, nor stored by one and
loaded by another; an address that is updated by atomics is touched by nothing else.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

SECTOR = 32  # bytes: the smallest piece of memory that a GPU moves


class OutOfBounds(AssertionError):
    """An active lane touched memory that no tensor argument covers."""


class Race(AssertionError):
    """The result depends on the order in which programs run."""


@dataclass
class Launch:
    """One run of one kernel over its grid."""

    name: str
    starts: np.ndarray  # of the memory that the tensor arguments cover, ascending and disjoint
    ends: np.ndarray
    program: int = 0  # the one that runs now
    programs: int = 0
    moved: dict[str, int] = field(default_factory=lambda: {"load": 0, "store": 0, "atomic": 0})  # bytes, by sectors
    log: dict[str, list[tuple[np.ndarray, int]]] = field(
        default_factory=lambda: {"load": [], "store": [], "atomic": []}
    )

    def touch(self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        """``kind`` ("load", "store" or "atomic") of ``size`` bytes at each of ``pointers`` where ``mask`` is set."""
        pointers, mask = np.broadcast_arrays(pointers, mask)
        active = pointers[mask.astype(bool)].astype(np.uint64)
        if not active.size:
            return
        self.check_bounds(kind, active, size)
        self.moved[kind] += SECTOR * np.unique(active // SECTOR).size
        self.log[kind].append((np.unique(active), self.program))

    def check_bounds(self, kind: str, active: np.ndarray, size: int) -> None:
        if not self.starts.size:
            raise OutOfBounds(f"{kind} in {self.name}, which has no tensor argument")
        span = np.searchsorted(self.starts, active, side="right") - 1
        outside = (span < 0) | (active + np.uint64(size) > self.ends[np.maximum(span, 0)])
        if outside.any():
            first, nearest = int(active[outside][0]), max(int(span[outside][0]), 0)
            past = first + size - int(self.ends[nearest])
            raise OutOfBounds(
                f"{kind} in {self.name}: {int(outside.sum())} of {active.size} active lanes out of bounds in program"
                f" {self.program}; the first ends {past} bytes past the end of tensor {nearest} in the order of memory"
            )

    def check_races(self) -> None:
        tables = {kind: _flat(entries) for kind, entries in self.log.items()}
        stored, stores = tables["store"]
        order = np.lexsort((stores, stored))
        stored, stores = stored[order], stores[order]
        twice = (stored[1:] == stored[:-1]) & (stores[1:] != stores[:-1])
        if twice.any():
            raise Race(f"{self.name}: {int(twice.sum())} addresses are stored by more than one program")
        if count := _others(tables["load"], (stored, stores)):
            raise Race(f"{self.name}: {count} loads read an address that another program stores")
        for kind in ("store", "load"):
            if count := _others(tables["atomic"], tables[kind]):
                raise Race(f"{self.name}: {count} addresses are updated by one program and plain {kind}s of another")


def _flat(entries: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Addresses, and the program of each."""
    if not entries:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    return (
        np.concatenate([addresses for addresses, _ in entries]),
        np.concatenate([np.full(addresses.size, program) for addresses, program in entries]),
    )


def _others(some: tuple[np.ndarray, np.ndarray], all_of: tuple[np.ndarray, np.ndarray]) -> int:
    """How many of ``some`` are also touched in ``all_of`` by a program that is not their own."""
    addresses, programs = all_of
    if not addresses.size or not some[0].size:
        return 0
    # Of each address the first and the last program are enough: if any differs from one's own, one of these two does.
    order = np.lexsort((programs, addresses))
    addresses, programs = addresses[order], programs[order]
    first = np.searchsorted(addresses, some[0], side="left")
    last = np.searchsorted(addresses, some[0], side="right") - 1
    found = last >= first
    first = np.minimum(first, addresses.size - 1)
    return int((found & ((programs[first] != some[1]) | (programs[np.maximum(last, 0)] != some[1]))).sum())


def spans_of(arguments: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the memory that the tensors among ``arguments`` cover: of the views, not of their storages."""
    spans: list[list[int]] = []
    tensors = [getattr(a, "base", a) for a in arguments]
    found = []
    for t in tensors:
        if hasattr(t, "data_ptr") and t.numel():
            extent = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
            found.append([t.data_ptr(), t.data_ptr() + extent * t.element_size()])
    for start, end in sorted(found):
        if spans and start < spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
    return tuple(np.array([span[i] for span in spans], np.uint64) for i in (0, 1))  # type: ignore[return-value]
