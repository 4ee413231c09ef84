"""The instructions of ``ptx_sim`` that move data between registers and memories."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulation.ptx_memory import sectors_of
from tests.emulation.ptx_parse import DTYPES, Instruction, PTXError, vector

SPACES = ("shared", "local", "global", "const")


def load_parameter(m: Any, i: Instruction) -> None:
    name, _, offset = i.operands[1].strip("[] ").partition("+")
    if name in m.kernel.registers:
        return load_of_structure(m, i)
    value, at = m.parameters[name], int(offset or 0)
    for k, target in enumerate(vector(i.operands[0])):
        dtype = DTYPES[i.type]
        if isinstance(value, bytes):
            number = np.frombuffer(value, dtype, 1, at + k * dtype.itemsize)[0]
        else:
            number = np.asarray(value).astype(f"u{np.asarray(value).dtype.itemsize}").astype(f"u{dtype.itemsize}")
        m.write(target, np.full(m.threads, number).view(dtype))


def load_of_structure(m: Any, i: Instruction) -> None:
    names, dtype = vector(i.operands[0]), DTYPES[i.type]
    addresses = m.address(i.operands[1])
    size = dtype.itemsize * len(names)
    if (addresses % size).any() or (addresses < 0).any() or (addresses + size > len(m.structures)).any():
        raise PTXError("a parameter read out of bounds or misaligned")
    for k, name in enumerate(names):
        at = addresses[:, None] + k * dtype.itemsize + np.arange(dtype.itemsize)
        m.write(name, m.spread(m.structures[at].view(dtype)[:, 0]))


def load_store(m: Any, i: Instruction) -> None:
    if i.name != "st" and i.mods[0] == "param":
        return load_parameter(m, i)
    space = i.first(*SPACES) or "global"
    where, what = (i.operands[0], i.operands[1]) if i.name == "st" else (i.operands[1], i.operands[0])
    names, dtype = vector(what), DTYPES[i.type]
    addresses = m.address(where)
    if (addresses % (dtype.itemsize * len(names))).any():
        raise PTXError(f"misaligned {space} access of {dtype.itemsize * len(names)} bytes")
    if space == "global":
        m.moved += sectors_of(m.index // 32, addresses)
    for k, name in enumerate(names):
        at = addresses + k * dtype.itemsize
        if i.name == "st":
            store(m, space, at, m.read(name, i.type)[m.index])
        else:
            m.write(name, m.spread(load(m, space, at, dtype)))


def load(m: Any, space: str, addresses: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if space == "local":
        found = m.local[m.index[:, None], addresses[:, None] + np.arange(dtype.itemsize)]
    else:
        memory = m.shared if space == "shared" else m.memory
        found = memory.bytes[memory.at(addresses, dtype.itemsize, "read")]
    return found.view(dtype)[:, 0]


def store(m: Any, space: str, addresses: np.ndarray, values: np.ndarray) -> None:
    size = values.dtype.itemsize
    content = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
    if space == "local":
        m.local[m.index[:, None], addresses[:, None] + np.arange(size)] = content
    else:
        memory = m.shared if space == "shared" else m.memory
        memory.bytes[memory.at(addresses, size, "write")] = content


def async_copy(m: Any, i: Instruction) -> None:
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


def atomic(m: Any, i: Instruction) -> None:
    space = "shared" if "shared" in i.mods else "global"
    first = 1 if i.name == "atom" else 0
    addresses, dtype = m.address(i.operands[first]), DTYPES[i.type]
    values = [m.read(o, i.type)[m.index] for o in i.operands[first + 1 :]]
    function = ATOMICS[i.first(*ATOMICS) or ""]
    before = np.zeros(len(addresses), dtype)
    for k in range(len(addresses)):
        before[k] = load(m, space, addresses[k : k + 1], dtype)[0]
        after = function(before[k], values[0][k], values[1][k] if len(values) > 1 else None)
        store(m, space, addresses[k : k + 1], np.array([after]).astype(dtype))
    if i.name == "atom":
        m.write(i.operands[0], m.spread(before))


HANDLERS: dict[str, Callable[[Any, Instruction], None]] = {
    **dict.fromkeys(("ld", "st", "ldu"), load_store),
    "cp": async_copy,
    **dict.fromkeys(("atom", "red"), atomic),
}
