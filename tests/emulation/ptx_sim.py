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

from tests.emulation import ptx_arith, ptx_matrix, ptx_warp
from tests.emulation.ptx_memory import POISON, AsyncCopies, DeviceMemory, SharedMemory, sectors_of
from tests.emulation.ptx_parse import TYPES, Instruction, Kernel, PTXError, immediate, parse, vector

ORDERS = ("together", "ahead", "behind")
SPACES = ("shared", "local", "global", "const")
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
                self.step(self._turn(runnable))
            elif self.gathering.any():
                raise PTXError("a part of the threads that an instruction takes together never reaches it")
            else:
                self._open_barrier()

    def _turn(self, runnable: np.ndarray) -> np.ndarray:
        """The threads that take the next step: of those whose turn it is, the ones furthest behind."""
        if self.order != "together":
            candidates = np.flatnonzero(runnable)
            warp = candidates[0 if self.order == "ahead" else -1] // 32
            runnable = runnable & (self.thread // 32 == warp)
        return runnable & (self.counter == self.counter[runnable].min())

    def _open_barrier(self) -> None:
        places = np.unique(self.counter[self.waiting])
        if len(places) > 1:
            raise PTXError("threads of one block wait at different barriers")
        self.waiting[:] = False

    def step(self, mask: np.ndarray) -> None:
        self.steps += 1
        at = int(self.counter[mask][0])
        if at >= len(self.kernel.program):
            self.done |= mask
            return
        i = self.kernel.program[at]
        if i.guard is not None:
            active = mask & (self.read(i.guard, "pred") ^ i.negated)
        else:
            active = mask
        self.mask, self.index = active, np.flatnonzero(active)
        self.counter[mask] = at + 1
        if i.name == "bra":
            self.counter[active] = self.kernel.labels[i.operands[0]]
        elif i.name in ("ret", "exit"):
            self.done |= active
        elif len(self.index):
            if (size := _gathers(i)) and not self._gathered(at, size):
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
        """Leaves active the groups of ``size`` threads that have all come to the instruction ``at``; the others wait."""
        here = self.mask | (self.gathering & (self.counter == at + 1))
        group = self.thread // size
        ready = here & (np.bincount(group, ~here) == 0)[group]
        self.gathering = (self.gathering | self.mask) & ~ready
        self.mask, self.index = ready, np.flatnonzero(ready)
        return bool(len(self.index))

    # Operands

    def read(self, operand: str, kind: str) -> np.ndarray:
        """The operand in every thread, as the PTX type ``kind``."""
        dtype = np.dtype(TYPES[kind])
        if operand in self.registers:
            return _as(self.registers[operand], dtype)
        if operand in self.kernel.registers:  # read before it was written
            return np.zeros(self.threads, dtype)
        if operand.startswith("!"):
            return ~self.read(operand[1:], kind)
        if (number := immediate(operand, kind)) is not None:
            return np.full(self.threads, number)
        if operand in self.symbols:
            return np.full(self.threads, self.symbols[operand]).astype(dtype)
        return self._special(operand).astype(dtype)

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
        dtype = np.dtype(TYPES[self.kernel.registers[target]])
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


# Instructions that move data or hold threads together


def _load_parameter(m: Machine, i: Instruction) -> None:
    name, _, offset = i.operands[1].strip("[] ").partition("+")
    if name in m.kernel.registers:
        return _load_of_structure(m, i)
    value, at = m.parameters[name], int(offset or 0)
    for k, target in enumerate(vector(i.operands[0])):
        dtype = np.dtype(TYPES[i.type])
        if isinstance(value, bytes):
            number = np.frombuffer(value, dtype, 1, at + k * dtype.itemsize)[0]
        else:
            number = np.asarray(value).astype(f"u{np.asarray(value).dtype.itemsize}").astype(f"u{dtype.itemsize}")
        m.write(target, np.full(m.threads, number).view(dtype))


def _load_of_structure(m: Machine, i: Instruction) -> None:
    names, dtype = vector(i.operands[0]), np.dtype(TYPES[i.type])
    addresses = m.address(i.operands[1])
    size = dtype.itemsize * len(names)
    if (addresses % size).any() or (addresses < 0).any() or (addresses + size > len(m.structures)).any():
        raise PTXError("a parameter read out of bounds or misaligned")
    for k, name in enumerate(names):
        at = addresses[:, None] + k * dtype.itemsize + np.arange(dtype.itemsize)
        m.write(name, m.spread(m.structures[at].view(dtype)[:, 0]))


def _load_store(m: Machine, i: Instruction) -> None:
    if i.name != "st" and i.mods[0] == "param":
        return _load_parameter(m, i)
    space = i.first(*SPACES) or "global"
    where, what = (i.operands[0], i.operands[1]) if i.name == "st" else (i.operands[1], i.operands[0])
    names, dtype = vector(what), np.dtype(TYPES[i.type])
    addresses = m.address(where)
    if (addresses % (dtype.itemsize * len(names))).any():
        raise PTXError(f"misaligned {space} access of {dtype.itemsize * len(names)} bytes")
    if space == "global":
        m.moved += sectors_of(m.index // 32, addresses)
    for k, name in enumerate(names):
        at = addresses + k * dtype.itemsize
        if i.name == "st":
            _store(m, space, at, m.read(name, i.type)[m.index])
        else:
            m.write(name, m.spread(_load(m, space, at, dtype)))


def _load(m: Machine, space: str, addresses: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if space == "local":
        found = m.local[m.index[:, None], addresses[:, None] + np.arange(dtype.itemsize)]
    else:
        memory = m.shared if space == "shared" else m.memory
        found = memory.bytes[memory.at(addresses, dtype.itemsize, "read")]
    return found.view(dtype)[:, 0]


def _store(m: Machine, space: str, addresses: np.ndarray, values: np.ndarray) -> None:
    size = values.dtype.itemsize
    content = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
    if space == "local":
        m.local[m.index[:, None], addresses[:, None] + np.arange(size)] = content
    else:
        memory = m.shared if space == "shared" else m.memory
        memory.bytes[memory.at(addresses, size, "write")] = content


def _async_copy(m: Machine, i: Instruction) -> None:
    warps = np.unique(m.index // 32)
    if "commit_group" in i.mods:
        return m.copies.commit(warps)
    if "wait_group" in i.mods:
        return m.copies.wait(warps, int(i.operands[0]))
    if "wait_all" in i.mods:
        m.copies.commit(warps)
        return m.copies.wait(warps, 0)
    if "bulk" in i.mods or "mbarrier" in i.mods:
        raise PTXError("unknown instruction")
    size = int(i.operands[2], 0)
    target, source = m.address(i.operands[0]), m.address(i.operands[1])
    given = m.read(i.operands[3], "u32")[m.index] if len(i.operands) > 3 else np.full(len(target), size)
    index = m.shared.at(target, size, "cp.async")
    values = np.zeros((len(target), size), np.uint8)
    for count in np.unique(given[given > 0]):  # fewer bytes than the copy's size: the rest is zero
        some = given == count
        if (source[some] % size).any():
            raise PTXError("misaligned cp.async")
        bytes_at = m.memory.at(source[some], 1, "cp.async") + np.arange(count)
        if not m.memory.allowed[bytes_at].all():
            raise PTXError("global cp.async out of bounds")
        values[some, :count] = m.memory.bytes[bytes_at]
    m.moved += sectors_of(m.index[given > 0] // 32, source[given > 0])
    m.copies.issue(m.index // 32, index, values)


ATOMICS: dict[str, Callable] = {
    "add": lambda old, value, _: old + value,
    "max": lambda old, value, _: max(old, value),
    "min": lambda old, value, _: min(old, value),
    "exch": lambda _old, value, _: value,
    "and": lambda old, value, _: old & value,
    "or": lambda old, value, _: old | value,
    "xor": lambda old, value, _: old ^ value,
    "cas": lambda old, compare, value: value if old == compare else old,
}


def _atomic(m: Machine, i: Instruction) -> None:
    space = "shared" if "shared" in i.mods else "global"
    first = 1 if i.name == "atom" else 0
    addresses, dtype = m.address(i.operands[first]), np.dtype(TYPES[i.type])
    values = [m.read(o, i.type)[m.index] for o in i.operands[first + 1 :]]
    function = ATOMICS[i.first(*ATOMICS) or ""]
    before = np.zeros(len(addresses), dtype)
    for k in range(len(addresses)):
        before[k] = _load(m, space, addresses[k : k + 1], dtype)[0]
        after = function(before[k], values[0][k], values[1][k] if len(values) > 1 else None)
        _store(m, space, addresses[k : k + 1], np.array([after]).astype(dtype))
    if i.name == "atom":
        m.write(i.operands[0], m.spread(before))


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
    **dict.fromkeys(("ld", "st", "ldu"), _load_store),
    "cp": _async_copy,
    **dict.fromkeys(("atom", "red"), _atomic),
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
