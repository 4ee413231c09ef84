"""The memories of the simulated GPU: global memory with red zones, shared memory, copies that are under way."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tests.emulation.accesses import SECTOR
from tests.emulation.ptx_parse import PTXError

BASE = 0x7F0000000000  # where the first global buffer lies
POISON = 0xFF  # bytes that are a NaN in every floating-point type


def sectors_of(warps: np.ndarray, addresses: np.ndarray) -> int:
    """Bytes that one instruction moves: a sector once a warp, however many of its lanes touch it."""
    return SECTOR * np.unique((warps << 48) + addresses // SECTOR).size


class DeviceMemory:
    """Buffers in a fake address space; only bytes that were allowed may be touched."""

    def __init__(self):
        self.bytes = np.zeros(0, np.uint8)
        self.allowed = np.zeros(0, bool)
        self.buffers: list[tuple[np.ndarray, int]] = []

    def add(self, array: np.ndarray, allowed: np.ndarray | None = None) -> int:
        """The address of a copy of ``array``; ``allowed`` says which bytes may be touched (None: all)."""
        offset = len(self.bytes) + 256
        total = -(-(offset + array.nbytes + 256) // 256) * 256
        room = np.full(total, POISON, np.uint8)
        room[: len(self.bytes)] = self.bytes
        room[offset : offset + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        may = np.zeros(total, bool)
        may[: len(self.allowed)] = self.allowed
        may[offset : offset + array.nbytes] = True if allowed is None else allowed
        self.bytes, self.allowed = room, may
        self.buffers.append((array, offset))
        return BASE + offset

    def write_back(self) -> None:
        """What the kernel stored, into the arrays that were added."""
        for array, offset in self.buffers:
            array.view(np.uint8).reshape(-1)[:] = self.bytes[offset : offset + array.nbytes]

    def at(self, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        """Indices of the ``size`` bytes at each address, shape (addresses, size)."""
        if (addresses % size).any():
            raise PTXError(f"misaligned global {what}")
        first = addresses - BASE
        inside = (first >= 0) & (first + size <= len(self.bytes))
        index = first[:, None] + np.arange(size)
        if not inside.all() or not self.allowed[index].all():
            raise PTXError(f"global {what} out of bounds")
        return index


class HostMemory(DeviceMemory):
    """Its buffers are found at the addresses that they have in this process, as launchers in C++ pass them."""

    def __init__(self):
        super().__init__()
        self.windows = np.zeros((0, 3), np.int64)  # address in this process, bytes, address on the device; ascending

    def add(self, array: np.ndarray, allowed: np.ndarray | None = None) -> int:
        host = array.ctypes.data
        found = np.vstack([self.windows, [host, array.nbytes, super().add(array, allowed)]])
        self.windows = found[np.argsort(found[:, 0])]
        return host

    def at(self, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        if not len(self.windows):
            raise PTXError(f"global {what} out of bounds")
        host, length, device = self.windows[
            np.maximum(np.searchsorted(self.windows[:, 0], addresses, "right") - 1, 0)
        ].T
        within = addresses - host
        inside = (within >= 0) & (within < length)
        return super().at(np.where(inside, within + device, 0), size, what)


def place(tensors: Sequence[Tensor], memory: DeviceMemory) -> dict[int, int]:
    """Address of every storage in ``memory``; only the elements that a tensor holds may be touched."""
    storages, allowed = {}, {}
    for t in tensors:
        key = t.untyped_storage().data_ptr()
        if key not in storages:
            storages[key] = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
            allowed[key] = torch.zeros_like(storages[key], dtype=torch.bool)
        # A tensor of booleans that lies on the bytes as ``t`` does on its elements.
        size = t.element_size()
        strides = [size * stride for stride in t.stride()]
        held = allowed[key].as_strided((*t.shape, size), (*strides, 1), t.storage_offset() * size)
        held.fill_(True)
    return {key: memory.add(storage.numpy(), allowed[key].numpy()) for key, storage in storages.items()}


class SharedMemory:
    """Of one block; it starts as poison."""

    def __init__(self, size: int):
        self.size = size
        self.bytes = np.full(size, POISON, np.uint8)

    def at(self, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        if (addresses % size).any():
            raise PTXError(f"misaligned shared {what}")
        if (addresses < 0).any() or (addresses + size > self.size).any():
            raise PTXError(f"shared {what} out of bounds: {addresses.max()} of {self.size} bytes")
        return addresses[:, None] + np.arange(size)


class AsyncCopies:
    """cp.async of every warp: what it copies is seen only after the warp waited for it."""

    def __init__(self, shared: SharedMemory, warps: int):
        self.shared = shared
        self.open: list[list] = [[] for _ in range(warps)]
        self.groups: list[list[list]] = [[] for _ in range(warps)]

    def issue(self, warps: np.ndarray, index: np.ndarray, values: np.ndarray) -> None:
        """``values`` go to the bytes ``index`` of shared memory, both (threads, bytes); until then it is poison."""
        self.shared.bytes[index] = POISON
        for warp in np.unique(warps):
            self.open[warp].append((index[warps == warp], values[warps == warp]))

    def commit(self, warps: np.ndarray) -> None:
        for warp in warps:
            self.groups[warp].append(self.open[warp])
            self.open[warp] = []

    def wait(self, warps: np.ndarray, pending: int) -> None:
        """Until at most ``pending`` groups of each warp are under way."""
        for warp in warps:
            groups = self.groups[warp]
            while len(groups) > pending:
                for index, values in groups.pop(0):
                    self.shared.bytes[index] = values
