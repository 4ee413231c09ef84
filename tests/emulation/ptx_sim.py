"""Rung T3's engine: the PTX that Triton or nvcc made, executed on the CPU with numpy.

One block at a time. ``order`` says how its threads take turns: "together" (all threads at the lowest instruction), "ahead"
(one warp at a time, as far as it gets, the first warp first) or "behind" (the last warp first): a missing barrier shows
in one of the last two. What is watched:

- global accesses: inside what the launch was given, aligned; shared accesses: inside what the kernel declared;
- shared memory starts as NaN; what cp.async copies is NaN until its warp waited for it, what wgmma adds up likewise;
- barriers: every thread of the block at the same one; shuffles read active lanes only;
- an unknown instruction is an error.

Not the hardware's: the last bits of ex2, lg2, rcp, sin and cos (numpy's) and of sums in the tensor cores. Not covered: TMA,
mbarrier, tcgen05, clusters.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.emulation import ptx_access, ptx_arith, ptx_matrix, ptx_warp
from tests.emulation.ptx_memory import POISON, AsyncCopies, DeviceMemory, SharedMemory
from tests.emulation.ptx_parse import DTYPES, TYPES, Instruction, Kernel, PTXError, immediate, parse

ORDERS = ("together", "ahead", "behind")
TURNS = ("bra", "ret", "exit", "bar", "barrier")  # after which it may be other threads' turn
NOTHING = ("membar", "fence", "nanosleep", "griddepcontrol", "discard", "prefetch", "createpolicy", "setmaxnreg")


class Machine:
    """Runs the blocks of one launch. ``arguments``: a number a parameter, or the bytes of a structure."""

    def __init__(
        self,
        kernel: Kernel,
        arguments: Sequence[Any],
        memory: DeviceMemory,
        block: tuple[int, int, int],
        grid: tuple[int, int, int],
        dynamic_shared: int = 0,
        order: str = "together",
    ):
        if order not in ORDERS:
            raise ValueError(f"Machine: expected order to be one of {ORDERS}, got {order!r}")
        self.kernel, self.memory, self.block, self.grid, self.order = kernel, memory, block, grid, order
        self.threads = block[0] * block[1] * block[2]
        self.thread = np.arange(self.threads)
        self.shared_bytes = kernel.shared_bytes + dynamic_shared
        self.parameters = {name: value for (_, name, _), value in zip(kernel.parameters, arguments, strict=True)}
        self.symbols = {name: memory.add(values) for name, values in kernel.constants.items()}
        self.symbols |= kernel.shared | kernel.local
        self._place_structures()
        self.steps = 0
        self.moved = 0  # bytes of global memory, in the sectors that a warp's instruction touches, without any cache

    def _place_structures(self) -> None:
        """Structures have an address in the space of the parameters, too: arrays in them are read by index."""
        parts: list[bytes] = []
        for name, value in self.parameters.items():
            if isinstance(value, bytes):
                self.symbols[name] = 16 * len(parts)
                parts += [value[k : k + 16].ljust(16, b"\0") for k in range(0, len(value), 16)]
        self.structures = np.frombuffer(b"".join(parts), np.uint8)

    def run(self) -> None:
        x, y, z = self.grid
        with np.errstate(all="ignore"):
            for at in range(x * y * z):
                self.run_block((at % x, at // x % y, at // (x * y)))

    def run_block(self, block: tuple[int, int, int]) -> None:
        self.at = block
        self.registers: dict[str, np.ndarray] = {}
        self.fixed: dict[tuple[str, str], np.ndarray] = {}  # operands that no instruction writes, by type
        self.shared = SharedMemory(self.shared_bytes)
        self.local = np.full((self.threads, self.kernel.local_bytes), POISON, np.uint8)
        warps = -(-self.threads // 32)
        self.copies = AsyncCopies(self.shared, warps)
        self.products = ptx_matrix.WarpgroupProducts(-(-warps // 4))
        self.carry = np.zeros(self.threads, bool)
        self.counter = np.zeros(self.threads, np.int64)
        self.done = np.zeros(self.threads, bool)
        self.waiting = np.zeros(self.threads, bool)  # at a barrier of the block
        self.gathering = np.zeros(self.threads, bool)  # at an instruction that takes a whole warp or warpgroup
        while not self.done.all():
            runnable = ~(self.done | self.waiting | self.gathering)
            if runnable.any():
                self._take_turn(runnable)
            elif self.gathering.any():
                raise PTXError("a part of the threads that an instruction takes together never reaches it")
            else:
                self._open_barrier()

    def _open_barrier(self) -> None:
        places = np.unique(self.counter[self.waiting])
        if len(places) > 1:
            raise PTXError("threads of one block wait at different barriers")
        self.waiting[:] = False

    def _take_turn(self, runnable: np.ndarray) -> None:
        """Steps of the threads whose turn it is, of those the ones furthest behind, until the turn may be others'."""
        if self.order != "together":
            candidates = np.flatnonzero(runnable)
            warp = candidates[0 if self.order == "ahead" else -1] // 32
            runnable = runnable & (self.thread // 32 == warp)
        counters = self.counter[runnable]
        at = int(counters.min())
        others = counters[counters > at]
        until = int(others.min()) if others.size else len(self.kernel.program)
        mask = runnable & (self.counter == at)
        lanes = np.flatnonzero(mask)
        straight = True
        while straight and at < until:
            i = self.kernel.program[at]
            size = _gathers(i)
            straight = not size and i.name not in TURNS
            at += 1
            self.steps += 1
            if not straight or at == until:
                self.counter[mask] = at
            self._step(i, mask, lanes, size)
        if straight and at == len(self.kernel.program):
            self.done |= mask

    def _step(self, i: Instruction, mask: np.ndarray, lanes: np.ndarray, size: int) -> None:
        """One instruction, which waits for ``size`` threads, of the threads in ``mask``, whose numbers are ``lanes``."""
        self.mask, self.index = mask, lanes
        if i.guard is not None:
            self.mask = mask & (self.read(i.guard, "pred") ^ i.negated)
            self.index = np.flatnonzero(self.mask)
        if i.name == "bra":
            self.counter[self.index] = self.kernel.labels[i.operands[0]]
        elif i.name in ("ret", "exit"):
            self.done |= self.mask
        elif len(self.index):
            if size and not self._gathered(int(self.counter[self.index[0]]), size):
                return
            handler = HANDLERS.get(i.name)
            try:
                if handler is None:
                    raise PTXError("unknown instruction")
                handler(self, i)
            except (PTXError, KeyError, IndexError, ValueError, TypeError) as error:
                message = f"{error if isinstance(error, PTXError) else repr(error)} at `{i.text}` in block {self.at}"
                raise PTXError(message) from error

    def _gathered(self, at: int, size: int) -> bool:
        """Leaves active the groups of ``size`` threads that have all come to ``at``, past it; the others wait."""
        here = self.mask | (self.gathering & (self.counter == at))
        group = self.thread // size
        ready = here & (np.bincount(group, ~here) == 0)[group]
        self.gathering = (self.gathering | self.mask) & ~ready
        self.mask, self.index = ready, np.flatnonzero(ready)
        return bool(len(self.index))

    # Operands

    def read(self, operand: str, kind: str) -> np.ndarray:
        """The operand in every thread, as the PTX type ``kind``."""
        dtype = DTYPES[kind]
        if (register := self.registers.get(operand)) is not None:
            return _as(register, dtype)
        if operand in self.kernel.registers:  # read before it was written
            return np.zeros(self.threads, dtype)
        if operand.startswith("!"):
            return ~self.read(operand[1:], kind)
        values = self.fixed.get((operand, kind))
        if values is None:
            self.fixed[operand, kind] = values = self._fixed(operand, kind).astype(dtype)
            values.setflags(write=False)
        return values

    def _fixed(self, operand: str, kind: str) -> np.ndarray:
        if (number := immediate(operand, kind)) is not None:
            return np.full(self.threads, number)
        if operand in self.symbols:
            return np.full(self.threads, self.symbols[operand])
        return self._special(operand)

    def _special(self, operand: str) -> np.ndarray:
        name, _, axis = operand.removeprefix("%").partition(".")
        if axis in ("x", "y", "z"):
            k = "xyz".index(axis)
            if name == "tid":
                return self.thread // int(np.prod(self.block[:k])) % self.block[k]
            sizes = {"ctaid": self.at, "ntid": self.block, "nctaid": self.grid}
            if name in sizes:
                return np.full(self.threads, sizes[name][k])
        if name == "laneid":
            return self.thread % 32
        if name == "warpid":
            return self.thread // 32
        raise PTXError(f"operand {operand}")

    def write(self, target: str, values: np.ndarray) -> None:
        """``values``, one a thread, to a register in the active threads."""
        if len(self.index) == self.threads:
            self.write_lanes(target, slice(None), values)
        else:
            self.write_lanes(target, self.index, values[self.index])

    def write_lanes(self, target: str, lanes: np.ndarray | slice, values: np.ndarray) -> None:
        if target == "_":
            return
        dtype = DTYPES[self.kernel.registers[target]]
        register = self.registers.get(target)
        if register is None:
            self.registers[target] = register = np.zeros(self.threads, dtype)
        register[lanes] = _as(values, dtype)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """What the active threads loaded, with room for the others."""
        result = np.zeros(self.threads, values.dtype)
        result[self.index] = values
        return result

    def address(self, operand: str) -> np.ndarray:
        """The addresses ``[%rd1+16]`` in the active threads."""
        base, _, offset = operand.strip("[] ").partition("+")
        kind = "u64" if self.kernel.registers.get(base.strip(), "b64")[1:] == "64" else "u32"
        return self.read(base.strip(), kind).astype(np.int64)[self.index] + (int(offset, 0) if offset else 0)


def _gathers(i: Instruction) -> int:
    """How many threads an instruction waits for: a warpgroup, a warp that exchanges values, or 0."""
    if i.name == "wgmma" and i.mods[0] != "fence":
        return 128
    whole_warp = i.name in ("shfl", "vote", "redux") and i.guard is None and i.operands[-1] in ("-1", "0xffffffff")
    return 32 if whole_warp else 0


def _as(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The bits of ``values`` as ``dtype``; a narrower type takes the low bits, a wider one extends them."""
    if values.dtype == dtype:
        return values
    if values.dtype.itemsize != dtype.itemsize:
        kind = "i" if values.dtype.kind == "i" else "u"
        values = values.view(f"{kind}{values.dtype.itemsize}").astype(f"{kind}{dtype.itemsize}")
    return values.view(dtype)


def _barrier(m: Machine, i: Instruction) -> None:
    if "warp" in i.mods:
        return
    if i.operands[0] != "0" or (len(i.operands) > 1 and int(i.operands[1]) != m.threads):
        raise PTXError("a barrier of a part of the block")
    m.waiting |= m.mask


HANDLERS: dict[str, Callable[[Machine, Instruction], None]] = {
    **ptx_arith.HANDLERS,
    **ptx_matrix.HANDLERS,
    **ptx_warp.HANDLERS,
    **ptx_access.HANDLERS,
    **dict.fromkeys(("bar", "barrier"), _barrier),
    **dict.fromkeys(NOTHING, lambda m, i: None),
}


def run(
    ptx: str,
    arguments: Sequence[Any],  # arrays are buffers, updated in place; numbers; bytes of a structure
    grid: Sequence[int],
    block: Sequence[int],
    dynamic_shared: int = 0,
    order: str = "together",
    name: str | None = None,
) -> int:
    """Run one kernel of ``ptx``; the number of steps it took."""
    kernel, memory = parse(ptx, name), DeviceMemory()
    placed: dict[int, int] = {}
    for a in arguments:
        if isinstance(a, np.ndarray) and id(a) not in placed:
            placed[id(a)] = memory.add(a)
    numbers = [
        np.uint64(placed[id(a)]) if isinstance(a, np.ndarray) else _number(a, kind)
        for a, (kind, _, _) in zip(arguments, kernel.parameters, strict=True)
    ]
    sizes = [(*size, 1, 1)[:3] for size in (block, grid)]
    machine = Machine(kernel, numbers, memory, sizes[0], sizes[1], dynamic_shared, order)
    machine.run()
    memory.write_back()
    return machine.steps


def _number(value: Any, kind: str) -> Any:
    """A Python number as the parameter type ``kind`` (the .b32 of a float: give a numpy float32)."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, np.generic):
        return value.view(f"u{value.dtype.itemsize}")
    return np.array(value).astype(TYPES[kind]).view(f"u{np.dtype(TYPES[kind]).itemsize}")[()]
