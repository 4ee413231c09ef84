"""The instructions of ``ptx_sim`` in which the lanes of a warp exchange values."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulation.ptx_parse import Instruction, PTXError


def shuffle(m: Any, i: Instruction) -> None:
    values = m.read(i.operands[1], "b32")
    by, packed = (m.read(o, "u32").astype(np.int64) for o in i.operands[2:4])
    lane = m.thread % 32
    segment, clamp = packed >> 8 & 31, packed & 31
    last = (lane & segment) | (clamp & ~segment)
    how = i.first("up", "down", "bfly", "idx")
    source = {
        "up": lane - by,
        "down": lane + by,
        "bfly": lane ^ by,
        "idx": (lane & segment) | (by & ~segment & 31),
    }[how or ""]
    valid = source >= last if how == "up" else source <= last
    source = m.thread // 32 * 32 + np.where(valid, source, lane)
    if not m.mask[source[m.index]].all():
        raise PTXError("shfl reads a lane that is not active")
    target, *predicate = i.operands[0].split("|")
    m.write(target.strip(), values[source])
    if predicate:
        m.write(predicate[0].strip(), valid)


def vote(m: Any, i: Instruction) -> None:
    active = m.mask.reshape(-1, 32)
    given = active if i.name == "activemask" else (m.read(i.operands[1], "pred") & m.mask).reshape(-1, 32)
    how = i.first("all", "any", "ballot") or "ballot"
    result = {
        "all": (given | ~active).all(1),
        "any": given.any(1),
        "ballot": (given.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32),
    }[how]
    m.write(i.operands[0], np.repeat(result, 32))


REDUCTIONS: dict[str, Callable] = {
    "add": np.add.reduce,
    "min": np.minimum.reduce,
    "max": np.maximum.reduce,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


def reduce(m: Any, i: Instruction) -> None:
    """redux.sync: over the active lanes of every warp."""
    values = m.read(i.operands[1], i.type)
    result = np.zeros_like(values)
    for warp in np.unique(m.index // 32):
        lanes = m.index[m.index // 32 == warp]
        result[lanes] = REDUCTIONS[i.first(*REDUCTIONS) or ""](values[lanes])
    m.write(i.operands[0], result)


HANDLERS: dict[str, Callable[[Any, Instruction], None]] = {
    "shfl": shuffle,
    **dict.fromkeys(("vote", "activemask"), vote),
    "redux": reduce,
}
