"""What nvcc and ptxas make of ``csrc/cuda``: registers, spills, shared memory, instructions."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.emulation.cuda.library import BUILD, SOURCES, included, key_of

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
FLAGS = "-std=c++20 -O3 -Werror all-warnings"
STEMS = tuple(sorted(path.stem for path in SOURCES.glob("*.cu")))


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target."""

    name: str  # as it is written in the source, with its template arguments
    registers: int
    spills: int  # bytes stored and loaded
    stack: int  # bytes
    shared: int  # bytes, static
    sass: str


def skip_without_nvcc() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")


def tool(name: str) -> str:
    """A binary utility of the CUDA toolkit; Triton's wheel brings them along."""
    spec = importlib.util.find_spec("triton")
    beside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name if spec and spec.origin else None
    found = shutil.which(name) or (str(beside) if beside and beside.exists() else None)
    if found is None:
        pytest.skip(f"{name} is neither installed nor part of Triton")
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def built(stem: str, target: str) -> tuple[Path, str]:
    """The cubin of ``stem``.cu, and what ptxas said; kept for as long as the sources stay as they are."""
    texts = {path.name: path.read_text() for path in SOURCES.glob("*.*")}
    key = key_of(FLAGS, run("nvcc", "--version"), included(f"{stem}.cu", texts))
    folder = BUILD / "cubin"
    folder.mkdir(parents=True, exist_ok=True)
    cubin, told = (folder / f"{stem}-{target}-{key}.{suffix}" for suffix in ("cubin", "txt"))
    if not told.exists():
        partial = cubin.with_suffix(f".{os.getpid()}")
        flags = [*FLAGS.split(), "-cubin", f"-arch={target}", "-Xptxas", "-v"]
        text = run("nvcc", *flags, f"{SOURCES}/{stem}.cu", "-o", str(partial))
        partial.rename(cubin)
        told.write_text(text)
    return cubin, told.read_text()


@functools.cache
def compile_file(stem: str, target: str) -> dict[str, Compiled]:
    """Every kernel of ``stem``.cu by its readable name. A warning is an error."""
    return kernels_of(*built(stem, target))


def compile_text(text: str, target: str) -> dict[str, Compiled]:
    """As ``compile_file``, of a source that is given."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "text.cu"), Path(folder, "text.cubin")
        source.write_text(text)
        told = run("nvcc", *FLAGS.split(), "-cubin", f"-arch={target}", "-Xptxas", "-v", str(source), "-o", str(cubin))
        return kernels_of(cubin, told)


def kernels_of(cubin: Path, told: str) -> dict[str, Compiled]:
    sass = disassembled(cubin)
    kernels = {}
    for part in told.split("Compiling entry function '")[1:]:
        mangled = part.split("'", 1)[0]

        def number(pattern: str, text: str = part) -> int:
            return sum(int(n) for n in re.findall(pattern, text))

        name = readable(mangled)
        kernels[name] = Compiled(
            name,
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes smem"),
            sass[mangled],
        )
    assert kernels, told
    return kernels


def disassembled(cubin: Path) -> dict[str, str]:
    parts = run(tool("cuobjdump"), "-sass", str(cubin)).split("Function : ")[1:]
    return {part.split("\n", 1)[0].strip(): part for part in parts}


def readable(mangled: str) -> str:
    """``kernel<float, 4>`` out of the mangled name."""
    name = run("c++filt", mangled).strip()
    name = re.sub(r"slimkernels::|\(anonymous namespace\)::|_GLOBAL__N__\w+::|\((int|bool)\)", "", name)
    return re.sub(r"^void ", "", name).split("(", 1)[0].strip()
