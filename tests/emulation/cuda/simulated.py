"""Rung C3's launcher: what nvcc made of ``csrc/cuda``, the host's code run as it is, the PTX executed by ``ptx_sim``.

    kernels = Simulated("slice_accumulate", "ahead").allow(target, source)
    kernels.launch("sk_slice_accumulate", ...)

A launcher in C++ plans and launches as on a GPU; ``runtime.cpp`` stands in the place of NVIDIA's runtime.
"""

import ctypes
import functools
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tests.emulation.cuda.compiled import readable, run
from tests.emulation.cuda.library import BUILD, HERE, SOURCES
from tests.emulation.ptx_memory import HostMemory, place
from tests.emulation.ptx_parse import Kernel, parse
from tests.emulation.ptx_sim import Machine

TARGET = "80"
FLAGS = "-std=c++20 -O3 -cudart=none -shared -Xcompiler -fPIC -Xlinker -Bsymbolic"
CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t
)


@dataclass(frozen=True)
class Launch:
    kernel: str
    blocks: int
    threads: int  # a block
    shared: int  # bytes of it that the launch asked for
    steps: int
    moved: int  # bytes, see Machine


@functools.cache
def build(stems: tuple[str, ...]) -> tuple[Path, tuple[str, ...]]:
    """The library of the ``.cu`` files with the runtime, and the PTX that goes with each."""
    parts = [HERE / "runtime.cpp", *(SOURCES / f"{stem}.cu" for stem in stems)]
    headers = [path for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cuh")]
    content = [path.read_text() for path in [*parts, *headers]]
    key = hashlib.sha256(repr((FLAGS, TARGET, run("nvcc", "--version"), content)).encode()).hexdigest()[:16]
    folder = BUILD / f"simulated-{stems[0]}-{key}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}-{os.getpid()}")
        partial.mkdir(parents=True)
        code = f"arch=compute_{TARGET},code=compute_{TARGET}"  # PTX only
        kept = ["--keep", "--keep-dir", str(partial), "-gencode", code]
        run("nvcc", *FLAGS.split(), *kept, *map(str, parts), "-o", str(partial / "kernels.so"))
        if folder.exists():
            shutil.rmtree(partial)
        else:
            partial.rename(folder)
    return folder / "kernels.so", tuple((folder / f"{stem}.ptx").read_text() for stem in stems)


@functools.lru_cache(32)
def parsed(ptx: str, name: str) -> Kernel:
    return parse(ptx, name)


class Simulated:
    """The launchers of some sources, as ``library.Kernels`` offers them; a call raises what the simulator found."""

    def __init__(
        self,
        stems: str | tuple[str, ...],
        order: str = "together",
        edit: Callable[[str], str] | None = None,
        execute: bool = True,  # or only list what is launched
    ) -> None:
        path, texts = build((stems,) if isinstance(stems, str) else stems)
        self.library = ctypes.CDLL(str(path), os.RTLD_LAZY)  # launchers of other sources may be missing
        self.edit = edit or (lambda ptx: ptx)
        self.texts = texts
        self.order, self.execute = order, execute
        self.tensors: list[Tensor] = []
        self.launches: list[Launch] = []
        self.error: Exception | None = None

    def allow(self, *tensors: Tensor | None) -> "Simulated":
        """Only what these hold may be touched."""
        self.tensors = [t for t in tensors if t is not None and t.numel()]
        return self

    def size(self, name: str, *arguments) -> int:
        function = getattr(self.library, name)
        function.restype = ctypes.c_int64
        return function(*arguments)

    def launch(self, name: str, *arguments) -> None:
        callback = CALLBACK(self._launched)
        self.library.simulated_on_launch(callback)
        code = getattr(self.library, name)(*arguments, None)  # the stream comes last
        error, self.error = self.error, None
        if error is not None:
            raise error
        assert code == 0, f"{name} returned {code}"

    def _launched(self, name, sizes, arguments, shared) -> None:
        """Called from C++, through which no exception may pass."""
        if self.error is not None:
            return
        try:
            self._run(name.decode(), tuple(sizes[:3]), tuple(sizes[3:6]), arguments, shared)
        except Exception as error:
            self.error = error

    def _run(self, name, grid, block, arguments, shared) -> None:
        steps = moved = 0
        if self.execute:
            ptx = next(text for text in self.texts if f".entry {name}(" in text)
            kernel, memory = parsed(self.edit(ptx), name), HostMemory()
            place(self.tensors, memory)
            values = [ctypes.string_at(arguments[k], size) for k, (_, _, size) in enumerate(kernel.parameters)]
            machine = Machine(kernel, values, memory, block, grid, shared, self.order)
            machine.run()
            memory.write_back()
            steps, moved = machine.steps, machine.moved
        blocks, threads = (x * y * z for x, y, z in (grid, block))
        self.launches.append(Launch(readable(name), blocks, threads, shared, steps, moved))
