"""The instructions of ``ptx_sim`` that only compute: integers, floating point, comparisons, conversions, bits."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulation.ptx_parse import TYPES, Instruction, PTXError, vector
from tests.emulation.rounding import from_bfloat16, to_bfloat16

FLOATS = ("f16", "f32", "f64", "bf16", "f16x2", "bf16x2")
ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def bits(dtype: Any) -> int:
    return 8 * np.dtype(dtype).itemsize


def unsigned(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.dtype.itemsize}")


def halves(values: np.ndarray, kind: str) -> list[np.ndarray]:
    """The numbers in a register of type bf16, f16, bf16x2 or f16x2, in float32."""
    parts = [values.astype(np.uint16), (values >> np.uint32(16)).astype(np.uint16)] if "x2" in kind else [values]
    return [from_bfloat16(part) if kind[0] == "b" else part.view(np.float16).astype(np.float32) for part in parts]


def packed(parts: list[np.ndarray], kind: str) -> np.ndarray:
    """The inverse of ``halves``."""
    words = [
        to_bfloat16(part.astype(np.float32)) if kind[0] == "b" else part.astype(np.float16).view(np.uint16)
        for part in parts
    ]
    return words[0] if len(words) == 1 else words[0].astype(np.uint32) | words[1].astype(np.uint32) << np.uint32(16)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, np.ones_like(b), b)
    quotient = np.where(b == 0, np.zeros_like(a) - a.dtype.type(1), a // safe)
    if a.dtype.kind == "i":  # towards zero, not down
        quotient += ((a % safe) != 0) & ((a < 0) != (safe < 0)) & (b != 0)
    return quotient


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmod(a, np.where(b == 0, np.ones_like(b), b))


BINARY: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _divide,
    "rem": _remainder,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "copysign": lambda sign, size: np.copysign(size, sign),
}
UNARY: dict[str, Callable] = {
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
    "cnot": lambda a: (a == 0).astype(a.dtype),
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _function(i: Instruction) -> Callable:
    if i.name in ("min", "max"):
        keeps_nan = "NaN" in i.mods
        low = np.minimum if keeps_nan else np.fmin
        return low if i.name == "min" else (np.maximum if keeps_nan else np.fmax)
    if i.name in ("fma", "mad"):
        return _fused
    return BINARY.get(i.name) or UNARY[i.name]


def arithmetic(m: Any, i: Instruction) -> None:
    """One number a thread, or two 16-bit numbers in one register."""
    if "cc" in i.mods or i.name in ("addc", "subc", "madc"):
        return carry_chain(m, i)
    if i.type in ("bf16", "bf16x2", "f16x2"):
        arguments = [halves(m.read(o, i.type), i.type) for o in i.operands[1:]]
        results = [_function(i)(*numbers) for numbers in zip(*arguments, strict=True)]
        if "relu" in i.mods:
            results = [np.maximum(r, 0) for r in results]
        return m.write(i.operands[0], packed(results, i.type))
    if i.name in ("mul", "mad") and i.type not in FLOATS:
        return integer_product(m, i)
    result = _function(i)(*(m.read(o, i.type) for o in i.operands[1:]))
    if "sat" in i.mods and i.type in FLOATS:
        result = np.clip(result, 0, 1)
    m.write(i.operands[0], result)


def integer_product(m: Any, i: Instruction) -> None:
    """mul and mad: the low half, the high half, or all of the product."""
    a, b = m.read(i.operands[1], i.type), m.read(i.operands[2], i.type)
    half = i.first("lo", "hi", "wide")
    if half == "lo":
        product = a * b
    else:
        kind = object if a.dtype.itemsize == 8 else f"{a.dtype.kind}{2 * a.dtype.itemsize}"
        product = a.astype(kind) * b.astype(kind)
        if half == "hi":
            product = (product >> bits(a.dtype)).astype(a.dtype)
    if i.name == "mad":
        wide = {"16": "32", "32": "64"}.get(i.type[1:]) if half == "wide" else i.type[1:]
        product = product + m.read(i.operands[3], f"{i.type[0]}{wide}")
    m.write(i.operands[0], product)


def carry_chain(m: Any, i: Instruction) -> None:
    """add.cc, addc, mad.lo.cc and so on: integers of any length, a word at a time."""
    width = bits(TYPES[i.type])
    a, b, *c = (m.read(o, f"u{i.type[1:]}").astype(object) for o in i.operands[1:])
    carry = m.carry.astype(object) if i.name.endswith("c") and i.name != "mad" else 0
    if i.name.startswith("mad"):
        product = a * b
        result = (product >> width if "hi" in i.mods else product % 2**width) + c[0] + carry
    else:
        result = a + b + carry if i.name.startswith("add") else a - b - carry
    if "cc" in i.mods:
        m.carry = np.where(m.mask, (result < 0) | (result >= 2**width), m.carry).astype(bool)
    m.write(i.operands[0], np.array([int(r) % 2**width for r in result], f"u{width // 8}"))


def shift(m: Any, i: Instruction) -> None:
    values, by = m.read(i.operands[1], i.type), m.read(i.operands[2], "u32")
    width = bits(values.dtype)
    kept = np.minimum(by, width - 1).astype(values.dtype)
    if i.name == "shl":
        result = np.where(by >= width, values.dtype.type(0), values << kept)
    else:  # a signed number is filled with its sign
        beyond = values >> values.dtype.type(width - 1) if values.dtype.kind == "i" else values.dtype.type(0)
        result = np.where(by >= width, beyond, values >> kept)
    m.write(i.operands[0], result.astype(values.dtype))


def move(m: Any, i: Instruction) -> None:
    """mov, with packing ``mov.b32 %r, {%h, %h}`` and unpacking."""
    target, source = i.operands
    if target.startswith("{"):
        parts = vector(target)
        width = bits(TYPES[i.type]) // len(parts)
        value = unsigned(m.read(source, i.type))
        for k, part in enumerate(parts):
            m.write(part, (value >> value.dtype.type(k * width)).astype(f"u{width // 8}"))
    elif source.startswith("{"):
        parts = vector(source)
        kind = np.dtype(TYPES[i.type])
        width = bits(kind) // len(parts)
        value = np.zeros(m.threads, f"u{kind.itemsize}")
        for k, part in enumerate(parts):
            value |= m.read(part, f"b{width}").astype(value.dtype) << value.dtype.type(k * width)
        m.write(target, value)
    else:
        m.write(target, m.read(source, i.type))


def compare(m: Any, i: Instruction) -> None:
    """``setp %p|%q``: the result and its opposite, or of two 16-bit numbers in one register that of each."""
    a, b = m.read(i.operands[1], i.type), m.read(i.operands[2], i.type)
    if i.type in ("bf16", "f16", "bf16x2", "f16x2"):
        pairs = list(zip(halves(unsigned(a), i.type), halves(unsigned(b), i.type), strict=True))
    else:
        pairs = [(a, b)]
    results = [_comparison(i.mods[0], *pair) for pair in pairs]
    if logic := i.first("and", "or", "xor"):
        results = [BINARY[logic](result, m.read(i.operands[3], "pred")) for result in results]
    if len(results) == 1:
        results.append(~results[0])
    for target, result in zip(i.operands[0].split("|"), results, strict=False):
        m.write(target.strip(), result)


def _comparison(how: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    floating = a.dtype.kind == "f"
    unordered = np.isnan(a) | np.isnan(b) if floating else np.zeros(len(a), bool)
    if how in ("nan", "num"):
        return unordered if how == "nan" else ~unordered
    how = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(how, how)
    functions = {
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
        "eq": np.equal,
        "ne": np.not_equal,
    }
    if how in functions:
        return functions[how](a, b) & ~unordered
    return functions[how.removesuffix("u")](a, b) | unordered


def select(m: Any, i: Instruction) -> None:
    a, b = m.read(i.operands[1], i.type), m.read(i.operands[2], i.type)
    m.write(i.operands[0], np.where(m.read(i.operands[3], "pred"), a, b))


def convert(m: Any, i: Instruction) -> None:
    to, source = i.mods[-2], i.mods[-1]
    if to in ("bf16x2", "f16x2"):
        high, low = (m.read(o, "f32") for o in i.operands[1:3])
        return m.write(i.operands[0], packed([low, high], to))
    values = m.read(i.operands[1], source)
    if source == "bf16":
        values = from_bfloat16(values)
    rounding = ROUNDINGS.get(i.first(*ROUNDINGS) or "")
    if to == "bf16":
        result = to_bfloat16(values.astype(np.float32))
    elif to == "tf32":
        result = (values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    elif to[0] in "us" and values.dtype.kind == "f":
        limits = np.iinfo(TYPES[to])
        whole = np.clip(rounding(values.astype(np.float64)), limits.min, float(limits.max))
        result = np.where(np.isnan(values), 0, whole).astype(TYPES[to])
    elif rounding is not None and values.dtype.kind == "f":
        result = rounding(values).astype(TYPES[to])
    else:
        result = values.astype(TYPES[to])
    if "sat" in i.mods and to in FLOATS:
        result = np.nan_to_num(np.clip(result, 0, 1), nan=0.0)
    m.write(i.operands[0], result)


def permute_bytes(m: Any, i: Instruction) -> None:
    a, b, selector = (m.read(o, "b32").astype(np.uint64) for o in i.operands[1:4])
    both = a | b << np.uint64(32)
    result = np.zeros(m.threads, np.uint64)
    for k in range(4):
        choice = selector >> np.uint64(4 * k)
        byte = both >> ((choice & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= np.where(choice & np.uint64(8), sign, byte) << np.uint64(8 * k)
    m.write(i.operands[0], result.astype(np.uint32))


def logic_table(m: Any, i: Instruction) -> None:
    a, b, c = (m.read(o, i.type) for o in i.operands[1:4])
    table, result = int(i.operands[4], 0), np.zeros_like(a)
    for k in range(8):
        if table >> k & 1:
            result |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    m.write(i.operands[0], result)


def extract_bits(m: Any, i: Instruction) -> None:
    values = m.read(i.operands[1], i.type)
    at, count = (m.read(o, "u32").astype(object) for o in i.operands[2:4])
    found = (unsigned(values).astype(object) >> at) & (2**count - 1)
    if i.type[0] == "s":
        negative = np.array([c > 0 and (int(v) >> (int(c) - 1)) & 1 for v, c in zip(found, count, strict=True)], bool)
        found = found - np.where(negative, 2**count, 0)
    m.write(i.operands[0], np.array([int(v) for v in found], values.dtype))


def insert_bits(m: Any, i: Instruction) -> None:
    new, old = (m.read(o, i.type).astype(object) for o in i.operands[1:3])
    at, count = (m.read(o, "u32").astype(object) & 255 for o in i.operands[3:5])
    kept = 2 ** bits(TYPES[i.type]) - 1
    hole = ((2**count - 1) * 2**at) & kept
    m.write(i.operands[0], (old & (kept ^ hole) | (new * 2**at) & hole).astype(TYPES[i.type]))


def funnel_shift(m: Any, i: Instruction) -> None:
    low, high, by = (m.read(o, "b32").astype(np.uint64) for o in i.operands[1:4])
    by = by & np.uint64(31) if "wrap" in i.mods else np.minimum(by, 32)
    both = low | high << np.uint64(32)
    m.write(i.operands[0], (both >> by if "r" in i.mods else both << by >> np.uint64(32)).astype(np.uint32))


def count_bits(m: Any, i: Instruction) -> None:
    values = m.read(i.operands[1], i.type)
    if i.name == "popc":
        result = [int(v).bit_count() for v in values]
    elif i.name == "clz":
        result = [bits(values.dtype) - int(v).bit_length() for v in values]
    else:  # brev
        result = [int(f"{int(v):0{bits(values.dtype)}b}"[::-1], 2) for v in values]
    m.write(i.operands[0], np.array(result, np.uint32 if i.name != "brev" else values.dtype))


def test_number(m: Any, i: Instruction) -> None:
    tests = {"infinite": np.isinf, "finite": np.isfinite, "notanumber": np.isnan}
    if i.mods[0] not in tests:
        raise PTXError(f"testp.{i.mods[0]}")
    m.write(i.operands[0], tests[i.mods[0]](m.read(i.operands[1], i.type)))


def to_generic(m: Any, i: Instruction) -> None:
    m.write(i.operands[0], m.read(i.operands[1], "u64"))


HANDLERS: dict[str, Callable[[Any, Instruction], None]] = {
    **dict.fromkeys((*BINARY, *UNARY, "min", "max", "fma", "mad", "addc", "subc", "madc"), arithmetic),
    "shl": shift,
    "shr": shift,
    "mov": move,
    "setp": compare,
    "selp": select,
    "cvt": convert,
    "prmt": permute_bytes,
    "lop3": logic_table,
    "bfe": extract_bits,
    "bfi": insert_bits,
    "shf": funnel_shift,
    **dict.fromkeys(("popc", "clz", "brev"), count_bits),
    "testp": test_number,
    "cvta": to_generic,
}
