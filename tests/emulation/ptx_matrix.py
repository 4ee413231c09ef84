"""The tensor core's instructions of ``ptx_sim``: ldmatrix, stmatrix, mma.sync, and Hopper's wgmma.

Products are summed in float64 and rounded to float32 once: hardware differs in the last bits. Float32 operands (tf32) lose
the lower 13 bits, as on the hardware.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulation.ptx_parse import TYPES, Instruction, PTXError, vector
from tests.emulation.rounding import from_bfloat16

LANE = np.arange(32)
ROW, PAIR = LANE // 4, LANE % 4  # of the 8x4 arrangement in which a warp's lanes hold a fragment
PER_REGISTER = {"tf32": 1, "s8": 4, "u8": 4, "bf16": 2, "f16": 2}  # numbers of an operand in 32 bits


def shape(i: Instruction) -> tuple[int, int, int]:
    m, n, k = next(found.groups() for mod in i.mods if (found := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", mod)))
    return int(m), int(n), int(k)


def numbers(words: np.ndarray, kind: str) -> np.ndarray:
    """32-bit registers (..., r) as the numbers in them (..., r * per register), in float64."""
    words = np.ascontiguousarray(words)
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if kind in ("s8", "u8"):
        return words.view(TYPES[kind]).astype(np.float64)
    half = words.view(np.uint16)
    return (from_bfloat16(half) if kind == "bf16" else half.view(np.float16)).astype(np.float64)


def registers(m: Any, operand: str, kind: str = "b32") -> np.ndarray:
    """The registers of a vector operand, shape (threads, registers)."""
    return np.stack([m.read(name, kind) for name in vector(operand)], 1)


def _count(i: Instruction) -> int:
    return int(i.first("x1", "x2", "x4")[1:])


def load_matrix(m: Any, i: Instruction) -> None:
    """ldmatrix: lanes 8j to 8j+7 give the rows of the 8x8 matrix j."""
    count = _count(i)
    at = np.zeros(m.threads, np.int64)
    at[m.index] = m.address(i.operands[1])
    rows = at.reshape(-1, 32)[np.unique(m.index // 32), : 8 * count]
    if (rows % 16).any():
        raise PTXError("ldmatrix: a row that is not aligned to 16 bytes")
    index = m.shared.at(rows.reshape(-1), 16, "ldmatrix")
    matrices = m.shared.bytes[index].view(np.uint16).reshape(len(rows), count, 8, 8)
    if "trans" in i.mods:
        matrices = matrices.swapaxes(2, 3)
    low = matrices[:, :, ROW, 2 * PAIR].astype(np.uint32)
    high = matrices[:, :, ROW, 2 * PAIR + 1].astype(np.uint32)
    for k, target in enumerate(vector(i.operands[0])):
        m.write(target, m.spread((low[:, k] | high[:, k] << np.uint32(16)).reshape(-1)))


def store_matrix(m: Any, i: Instruction) -> None:
    count = _count(i)
    at = np.zeros(m.threads, np.int64)
    at[m.index] = m.address(i.operands[0])
    words = registers(m, i.operands[1])
    for warp in np.unique(m.index // 32):
        lanes = slice(32 * warp, 32 * warp + 32)
        half = np.ascontiguousarray(words[lanes]).view(np.uint16).reshape(32, count, 2)
        matrices = np.zeros((count, 8, 8), np.uint16)
        for k in range(count):
            matrices[k, ROW, 2 * PAIR] = half[:, k, 0]
            matrices[k, ROW, 2 * PAIR + 1] = half[:, k, 1]
        if "trans" in i.mods:
            matrices = matrices.swapaxes(1, 2)
        index = m.shared.at(at[lanes][: 8 * count], 16, "stmatrix")
        m.shared.bytes[index] = np.ascontiguousarray(matrices).view(np.uint8).reshape(8 * count, 16)


def mma(m: Any, i: Instruction) -> None:
    """mma.sync: every warp multiplies the fragments in its registers."""
    rows, columns, depth = shape(i)
    kind, out = i.mods[-3], i.mods[-1]
    if out not in ("f32", "s32"):
        raise PTXError(f"mma with accumulators of type {out}")
    per = PER_REGISTER[kind]
    warps = m.threads // 32
    a = numbers(registers(m, i.operands[1]), kind).reshape(warps, 32, -1)
    b = numbers(registers(m, i.operands[2]), kind).reshape(warps, 32, -1)
    c = registers(m, i.operands[3], out).reshape(warps, 32, -1)
    left, right = np.zeros((warps, rows, depth)), np.zeros((warps, depth, columns))
    for k in range(a.shape[2]):
        register, within = divmod(k, per)
        left[:, ROW + 8 * (register % 2), PAIR * per + within + 4 * per * (register // 2)] = a[:, :, k]
    for k in range(b.shape[2]):
        register, within = divmod(k, per)
        right[:, PAIR * per + within + 4 * per * register, ROW] = b[:, :, k]
    product = left @ right
    for k, target in enumerate(vector(i.operands[0])):
        value = product[:, ROW + 8 * (k // 2), 2 * PAIR + k % 2] + c[:, :, k]
        m.write(target, value.astype(TYPES[out]).reshape(-1))


class WarpgroupProducts:
    """wgmma of every warpgroup: issued, committed, and done only when waited for.

    Shared memory is read as late as the program allows, when a product is waited for; its accumulators are NaN until
    then. So a wait that comes too late, or that lets too many groups through, shows in the result.
    """

    def __init__(self, warpgroups: int):
        self.open: list[list] = [[] for _ in range(warpgroups)]
        self.groups: list[list[list]] = [[] for _ in range(warpgroups)]

    def pending(self, warpgroup: int) -> list[dict]:
        return [one for group in self.groups[warpgroup] for one in group] + self.open[warpgroup]


def wgmma(m: Any, i: Instruction) -> None:
    kind = i.mods[0]
    for warpgroup in np.unique(m.index // 128):
        if kind == "mma_async":
            _issue(m, i, warpgroup)
        elif kind == "commit_group":
            m.products.groups[warpgroup].append(m.products.open[warpgroup])
            m.products.open[warpgroup] = []
        elif kind == "wait_group":
            groups = m.products.groups[warpgroup]
            while len(groups) > int(i.operands[0]):
                group = groups.pop(0)
                while group:
                    _finish(m, group.pop(0), group, warpgroup)


def _issue(m: Any, i: Instruction, warpgroup: int) -> None:
    lanes = slice(128 * warpgroup, 128 * warpgroup + 128)
    targets = vector(i.operands[0])
    rows, columns, depth = shape(i)
    kind = i.type
    flags = [int(flag) for flag in i.operands[4:]]  # scale-a, scale-b, then which operands are transposed
    from_registers = i.operands[1].startswith("{")
    one = {
        "shape": (rows, columns, depth),
        "kind": kind,
        "targets": targets,
        "accumulate": m.read(i.operands[3], "pred")[lanes].copy(),
        "transposed": (0, flags[2] if len(flags) == 3 else 0) if from_registers else tuple(flags[2:4] or (0, 0)),
        "b": int(m.read(i.operands[2], "u64")[lanes][0]),
        "a": numbers(registers(m, i.operands[1])[lanes], kind)
        if from_registers
        else int(m.read(i.operands[1], "u64")[lanes][0]),
        "c": None,
    }
    in_flight = any(before["targets"] == targets for before in m.products.pending(warpgroup))
    if not in_flight:  # else the accumulators are those of the product before
        one["c"] = registers(m, i.operands[0], "f32")[lanes].copy()
        for name in targets:
            m.write_lanes(name, m.thread[lanes], np.full(128, np.nan, np.float32))
    m.products.open[warpgroup].append(one)


def _finish(m: Any, one: dict, group: list[dict], warpgroup: int) -> None:
    """Do the product ``one``; ``group`` are the ones committed with it that come next."""
    rows, columns, depth = one["shape"]
    tile_a, tile_b = one["transposed"]
    b = _tile(m, one["b"], columns, depth, one["kind"], tile_b)
    if isinstance(one["a"], int):
        a = _tile(m, one["a"], rows, depth, one["kind"], tile_a)
    else:
        a = _fragment(one["a"], rows, depth, PER_REGISTER[one["kind"]])
    product = a @ b.T
    values = np.where(one["accumulate"][:, None], one["c"], 0).astype(np.float64)
    for warp in range(4):
        for k in range(values.shape[1]):
            at = (16 * warp + ROW + 8 * (k // 2 % 2), k // 4 * 8 + 2 * PAIR + k % 2)
            values[32 * warp : 32 * warp + 32, k] += product[at]
    values = values.astype(np.float32)
    after = group + m.products.pending(warpgroup)
    later = next((p for p in after if p["targets"] == one["targets"] and p["c"] is None), None)
    if later is not None:
        later["c"] = values
        return
    lanes = np.arange(128 * warpgroup, 128 * warpgroup + 128)
    for k, name in enumerate(one["targets"]):
        m.write_lanes(name, lanes, values[:, k])


def _fragment(words: np.ndarray, rows: int, depth: int, per: int) -> np.ndarray:
    """The operand A (rows, depth) that the 128 threads hold in registers."""
    a = np.zeros((rows, depth))
    for warp in range(4):
        for k in range(words.shape[1]):
            register, within = divmod(k, per)
            row = 16 * warp + ROW + 8 * (register % 2)
            a[row, PAIR * per + within + 4 * per * (register // 2)] = words[32 * warp : 32 * warp + 32, k]
    return a


def _tile(m: Any, descriptor: int, rows: int, depth: int, kind: str, transposed: int) -> np.ndarray:
    """The operand (rows, depth) that a shared-memory matrix descriptor points at."""
    size = 4 // PER_REGISTER[kind]
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    mode = descriptor >> 62
    if not mode:
        raise PTXError("wgmma descriptor without swizzle")
    width = {1: 128, 2: 64, 3: 32}[mode]  # bytes of a swizzled line
    row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    per_line = width // size
    if transposed:
        at = row // per_line * leading + k // 8 * stride + k % 8 * width + row % per_line * size
    else:
        at = row // 8 * stride + row % 8 * width + k * size
    at = start + at
    at = at ^ ((at >> 7 & (width // 16 - 1)) << 4)
    index = m.shared.at(at.reshape(-1), size, "wgmma operand")
    words = m.shared.bytes[index].view(np.uint32 if size == 4 else np.uint16)
    return numbers(words[:, 0], kind).reshape(rows, depth)


HANDLERS: dict[str, Callable[[Any, Instruction], None]] = {
    "ldmatrix": load_matrix,
    "stmatrix": store_matrix,
    "mma": mma,
    "wgmma": wgmma,
}
