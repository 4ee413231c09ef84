"""Builds ``csrc/cuda`` with g++ on the CPU emulator and calls its launchers.

The launchers, the kernels and their plans are the very sources that nvcc compiles. ``SLIMKERNELS_EMULATION=asan`` builds
with the address and undefined-behaviour sanitizers: pytest must then run with libasan preloaded (see test_sanitizers.py).
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
SOURCES = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "emulation"
FLAGS = (
    "-std=c++20 -g -mf16c -fPIC -fno-strict-aliasing -fno-gnu-unique"
    " -Wall -Wextra -Wno-unknown-pragmas -Wno-unused-parameter -Wno-sign-compare -Werror"
)
SANITIZERS = "-O0 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "elu", "relu6", "hardswish", "tanh", "sigmoid")
SCHEDULES = (0, 1, 7)


class EmulationError(RuntimeError):
    """What the emulator found wrong with a kernel."""


def sanitized() -> bool:
    return os.environ.get("SLIMKERNELS_EMULATION") == "asan"


def skip_unless_possible() -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"the emulator switches stacks in x86-64 assembly, this is {platform.machine()}")
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")


def planted(text: str, old: str, new: str) -> str:
    """``text`` with a bug: ``old``, which must be there, becomes ``new``."""
    assert text.count(old) >= 1, f"nothing to break: {old!r} is not in the source"
    return text.replace(old, new)


def included(name: str, texts: Mapping[str, str]) -> dict[str, str]:
    """Of the sources ``texts`` the one of this name and those that it includes, through others too."""
    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name in texts and name not in found:
            found[name] = texts[name]
            waiting += re.findall(r'#include "([^"]+)"', texts[name])
    return dict(sorted(found.items()))


def key_of(*content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def build(stems: tuple[str, ...], bug: tuple[str, str, str] | None = None) -> Path:
    """The shared library of the ``.cu`` files; ``bug`` is (file, old, new), replaced in a copy of the sources.

    What a bug does not reach is compiled once for all of them.
    """
    flags = f"{FLAGS} {SANITIZERS if sanitized() else '-O1'}".split()
    texts = {
        path.name: path.read_text() for path in sorted(SOURCES.glob("*.*")) if path.suffix in (".cu", ".cuh", ".h")
    }
    emulator = [path.read_text() for path in sorted([*HERE.glob("*.h"), *HERE.glob("include/*.h")])]
    if bug is not None:
        texts[bug[0]] = planted(texts[bug[0]], bug[1], bug[2])
    parts = {stem: included(f"{stem}.cu", texts) for stem in stems}
    library = BUILD / f"{stems[0]}-{key_of(flags, parts, emulator)}.so"
    if library.exists():
        return library

    def compile_one(stem: str) -> str:
        target = BUILD / "objects" / f"{stem}-{key_of(flags, parts[stem], emulator)}.o"
        if not target.exists():
            folder = target.with_suffix(f".{os.getpid()}")
            folder.mkdir(parents=True)
            for name, text in parts[stem].items():
                (folder / name).write_text(text)
            made = folder / target.name
            run(["g++", *flags, f"-I{HERE}/include", "-x", "c++", "-c", str(folder / f"{stem}.cu"), "-o", str(made)])
            made.rename(target)
            shutil.rmtree(folder)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, stems))
    partial = library.with_suffix(f".{os.getpid()}")
    run(["g++", *flags, "-shared", "-Wl,-Bsymbolic", *objects, "-o", str(partial)])
    partial.rename(library)
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


class Kernels:
    """The launchers of one library; every call raises what the emulator found."""

    execute = True

    def __init__(self, stems: tuple[str, ...], schedule: int = 0, bug: tuple[str, str, str] | None = None) -> None:
        self.library = ctypes.CDLL(str(build(stems, bug)), os.RTLD_LAZY)  # launchers of other stems may be missing
        self.library.emulator_take_error.restype = ctypes.c_char_p
        self.schedule = schedule

    def size(self, name: str, *arguments) -> int:
        function = getattr(self.library, name)
        function.restype = ctypes.c_int64
        return function(*arguments)

    def allow(self, *tensors: Tensor | None) -> "Kernels":
        """For launchers that watch which memory is touched; here a sanitizer does."""
        return self

    def launch(self, name: str, *arguments) -> None:
        self.library.emulator_set_schedule(self.schedule)
        code = getattr(self.library, name)(*arguments, None)  # the stream comes last
        message = self.library.emulator_take_error().decode()
        if code or message:
            raise EmulationError(message or f"{name} returned {code}")


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def guarded(shape, dtype: torch.dtype, strides=None, fill: float = float("nan")) -> Tensor:
    """A tensor in an allocation of its own and exactly its size, so that a sanitizer sees every access beyond it."""
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if strides is not None else None
    numel = extent if extent is not None else int(torch.Size(shape).numel())
    flat = torch.full((numel,), fill, dtype=dtype)
    return flat.as_strided(shape, strides) if strides is not None else flat.view(shape)
