"""PTX text to a list of instructions: what ``ptx_sim`` executes."""

import functools
import re
import struct
from dataclasses import dataclass, field

import numpy as np

# numpy's type of every PTX type; registers hold the unsigned integer of the same size.
TYPES: dict[str, type[np.generic]] = {
    "pred": np.bool_,
    **dict.fromkeys(("b8", "u8"), np.uint8),
    "s8": np.int8,
    **dict.fromkeys(("b16", "u16", "bf16"), np.uint16),
    "s16": np.int16,
    "f16": np.float16,
    **dict.fromkeys(("b32", "u32", "f16x2", "bf16x2"), np.uint32),
    "s32": np.int32,
    **dict.fromkeys(("f32", "tf32"), np.float32),
    **dict.fromkeys(("b64", "u64"), np.uint64),
    "s64": np.int64,
    "f64": np.float64,
}

DTYPES = {kind: np.dtype(numbers) for kind, numbers in TYPES.items()}


class PTXError(Exception):
    """The program did what a GPU would not survive, or used what the simulator does not know."""


@dataclass(frozen=True, slots=True)
class Instruction:
    text: str
    guard: str | None  # predicate register, and whether it is negated
    negated: bool
    name: str  # "ld"
    mods: tuple[str, ...]  # ("global", "v4", "b32")
    operands: tuple[str, ...]

    @property
    def type(self) -> str:
        return self.mods[-1]

    def first(self, *choices: str) -> str | None:
        """The first modifier that is among ``choices``."""
        return next((mod for mod in self.mods if mod in choices), None)


@dataclass
class Kernel:
    name: str
    program: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # name: type
    parameters: list[tuple[str, str, int]] = field(default_factory=list)  # type, name, bytes
    shared: dict[str, int] = field(default_factory=dict)  # name: offset
    shared_bytes: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    constants: dict[str, np.ndarray] = field(default_factory=dict)  # of the module: .const and .global

    def __post_init__(self):
        self.registers.setdefault("_", "b64")

    def place_shared(self, name: str, kind: str, count: int) -> None:
        offset = -(-self.shared_bytes // 16) * 16
        self.shared[name] = offset
        self.shared_bytes = offset + count * np.dtype(TYPES[kind]).itemsize


def parse(ptx: str, name: str | None = None) -> Kernel:
    """The entry ``name`` of ``ptx``, or its first."""
    ptx = re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", ptx), flags=re.S)
    pattern = re.escape(name) if name else r"[\w$]+"
    entry = re.search(rf"\.entry\s+({pattern})\s*\((.*?)\)(.*?)\{{", ptx, re.S)
    if entry is None:
        raise PTXError(f"no entry {name or ''} in the PTX")
    kernel = Kernel(entry[1])
    _module_variables(ptx, kernel)
    kernel.parameters = [_parameter(text) for text in entry[2].split(",") if text.strip()]
    for statement in _statements(ptx, entry.end()):
        _statement(statement, kernel)
    return kernel


VARIABLE = r"\.align (\d+)\s+\.(\w+)\s+([\w$]+)\[(\d+)\]"


def _module_variables(ptx: str, kernel: Kernel) -> None:
    scope = r"^(?:\.visible |\.extern |\.weak |\.common )*\.(shared|global|const)\s+(?:\.align \d+ )?"
    for found in re.finditer(scope + r"\.(\w+)\s+([\w$]+)\[?(\d*)\]?(?:\s*=\s*\{([^}]*)\})?;", ptx, re.M):
        space, kind, symbol, count, values = found.groups()
        if space == "shared":
            kernel.place_shared(symbol, kind, int(count or 0))
        else:
            numbers = [int(v, 0) for v in values.split(",")] if values else []
            numbers += [0] * (int(count or 1) - len(numbers))
            kernel.constants[symbol] = np.array(numbers, TYPES[kind])


def _parameter(text: str) -> tuple[str, str, int]:
    words = text.split()
    kind = next(word[1:] for word in words if word[1:] in TYPES)
    found = re.fullmatch(r"([\w$]+)(?:\[(\d+)\])?", words[-1])
    if found is None:
        raise PTXError(f"parameter {text}")
    return kind, found[1], np.dtype(TYPES[kind]).itemsize * int(found[2] or 1)


def _statements(ptx: str, start: int) -> list[str]:
    """What stands between the semicolons of the body that begins at ``start``."""
    end, depth = start, 1
    while depth:
        depth += {"{": 1, "}": -1}.get(ptx[end], 0)
        end += 1
    body = re.sub(r"^\s*\.(loc|file|pragma|section)\b[^\n]*$", "", ptx[start : end - 1], flags=re.M)
    return [statement.strip() for statement in body.split(";")]


def _statement(text: str, kernel: Kernel) -> None:
    while found := re.match(r"(?:[{}]|([\w$]+):(?!:))\s*", text):  # braces of a scope, labels
        if found[1]:
            kernel.labels[found[1]] = len(kernel.program)
        text = text[found.end() :]
    if text.startswith(".reg"):
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S).groups()
        for name in names.split(","):
            many = re.fullmatch(r"\s*(.*)<(\d+)>\s*", name)
            expanded = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
            kernel.registers.update(dict.fromkeys(expanded, kind))
    elif text.startswith(".local"):
        align, kind, name, count = re.match(r"\.local\s+" + VARIABLE, text).groups()
        kernel.local[name] = -(-kernel.local_bytes // int(align)) * int(align)
        kernel.local_bytes = kernel.local[name] + int(count) * np.dtype(TYPES[kind]).itemsize
    elif text.startswith(".shared"):
        _, kind, name, count = re.match(r"\.shared\s+" + VARIABLE, text).groups()
        kernel.place_shared(name, kind, int(count))
    elif text and not text.startswith("."):
        kernel.program.append(_instruction(text))


def _instruction(text: str) -> Instruction:
    found = re.match(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
    negated, guard, opcode, rest = found.groups()
    name, *mods = opcode.replace("::", ".").split(".")
    return Instruction(text, guard, negated == "!", name, tuple(mods), tuple(split(rest)))


def split(text: str) -> list[str]:
    """The operands of ``text``; commas within brackets do not part them."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


@functools.cache
def vector(operand: str) -> tuple[str, ...]:
    """The elements of ``{%r1, %r2}``; one of a plain operand."""
    return tuple(part.strip() for part in operand.strip("{} ").split(","))


def immediate(text: str, kind: str) -> np.generic | None:
    """The number written as ``text``, as a scalar of the PTX type ``kind``; None when it is not a number."""
    dtype = np.dtype(TYPES[kind])
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return np.float32(struct.unpack(">f", bytes.fromhex(text[2:]))[0]).view(dtype)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return np.float64(struct.unpack(">d", bytes.fromhex(text[2:]))[0]).view(dtype)
    if not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return None
    value = int(text.rstrip("U"), 0)
    if dtype == np.bool_:
        return np.bool_(value)
    bits = np.dtype(f"u{dtype.itemsize}").type(value & (2 ** (8 * dtype.itemsize) - 1))
    return bits.view(dtype)
