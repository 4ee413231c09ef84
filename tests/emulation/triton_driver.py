"""Rung T3: ``kernel[grid](cpu_tensors...)`` through Triton's real pipeline, its PTX executed on the CPU by ``ptx_sim``.

    with simulated("sm_90") as launches:
        kernel[(4,)](x, y, 100, BLOCK=32)

Triton specialises the arguments, lowers the kernel to PTX and assembles it exactly as for a GPU; only the launch is ours.
In a process without ``TRITON_INTERPRET=1``. ``launches`` lists what ran.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.compiler.compiler as compiler
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from tests.emulation.aot import LIMITS
from tests.emulation.ptx_memory import DeviceMemory, place
from tests.emulation.ptx_parse import TYPES, PTXError, parse
from tests.emulation.ptx_sim import Machine

__all__ = ["TARGETS", "Launch", "PTXError", "simulated"]

TARGETS = ("sm_80", "sm_90")
SCALARS = {"i1": "u8", "fp32": "f32", "fp64": "f64", **{f"{s}{w}": f"{s}{w}" for s in "iu" for w in (8, 16, 32, 64)}}


@dataclass
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    shared: int  # bytes a block
    steps: int
    ptx: str


@dataclass
class Settings:
    """Of the simulation that is on: ``edit`` changes the PTX before it runs (to plant a bug)."""

    target: str
    order: str
    edit: Callable[[str], str] | None
    launches: list[Launch]


class SimulatedDriver(DriverBase):
    """What Triton asks its driver for, without one."""

    def __init__(self, target: str):
        self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        limit = LIMITS[target].shared_per_block
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": limit, "multiprocessor_count": 108, "warpSize": 32},
            load_binary=lambda *args: (object(), 0, 0, 0, 1024),
            unload_module=lambda module: None,
        )
        self.launcher_cls = None
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_current_stream = lambda device=0: 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return SimpleNamespace(synchronize=lambda: None)

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_benchmarker(self) -> Callable:
        raise NotImplementedError("nothing is timed in a simulation")

    def get_empty_cache_for_benchmark(self) -> Tensor:
        raise NotImplementedError("nothing is timed in a simulation")

    def clear_cache(self, cache: Any) -> None:
        pass

    @staticmethod
    def is_active() -> bool:
        return True


@contextlib.contextmanager
def simulated(target: str, order: str = "together", edit: Callable[[str], str] | None = None) -> Iterator[list[Launch]]:
    """Within it Triton kernels take CPU tensors and run as ``target`` would run them; ``order``: see ``ptx_sim``."""
    if target not in TARGETS:
        raise ValueError(f"simulated: expected target to be one of {TARGETS}, got {target!r}")
    settings = Settings(target, order, edit, [])
    kernel = compiler.CompiledKernel
    before = kernel._init_handles, triton.runtime.driver._active
    loaded: list[Any] = []

    def init_handles(self):
        limit = LIMITS[target].shared_per_block
        if self.metadata.shared > limit:
            raise triton.runtime.errors.OutOfResources(self.metadata.shared, limit, "shared memory")
        loaded.append(self)
        self.module, self.function, self.n_regs, self.n_spills, self.n_max_threads = object(), 0, 0, 0, 1024
        self._run = lambda x, y, z, stream, function, m, lm, h0, h1, *args: _launch(self, (x, y, z), args, settings)

    kernel._init_handles = init_handles
    triton.runtime.driver.set_active(SimulatedDriver(target))
    try:
        yield settings.launches
    finally:
        triton.runtime.driver._active = before[1]
        kernel._init_handles = before[0]
        for one in loaded:  # there is nothing to unload
            one.module = None
        _forget_kernels()


def _launch(compiled: Any, grid: tuple[int, int, int], arguments: Sequence[Any], settings: Settings) -> None:
    memory = DeviceMemory()
    kinds = [compiled.src.signature[name] for name in compiled.src.signature]
    tensors = [a for a in arguments if isinstance(a, Tensor) and a.numel()]
    bases = place(tensors, memory)
    values: list[Any] = []
    for argument, kind in zip(arguments, kinds, strict=True):
        if kind == "constexpr":
            continue
        if isinstance(argument, Tensor):
            at = argument.storage_offset() * argument.element_size()
            values.append(np.uint64(bases[argument.untyped_storage().data_ptr()] + at if argument.numel() else 0))
        else:
            values.append(_scalar(argument, kind))
    ptx = compiled.asm["ptx"] if settings.edit is None else settings.edit(compiled.asm["ptx"])
    kernel = parse(ptx)
    values += [np.uint64(0)] * (len(kernel.parameters) - len(values))  # scratch memory, of which there is none
    shared = compiled.metadata.shared
    threads = compiled.metadata.num_warps * 32
    machine = Machine(kernel, values, memory, (threads, 1, 1), grid, shared, settings.order)
    machine.run()
    memory.write_back()
    settings.launches.append(Launch(compiled.name, grid, shared, machine.steps, ptx))


def _scalar(value: Any, kind: str) -> np.generic:
    if kind not in SCALARS:
        raise NotImplementedError(f"an argument of type {kind} in the simulator")
    dtype = np.dtype(TYPES[SCALARS[kind].replace("i", "s")])
    return np.array(value).astype(dtype).view(f"u{dtype.itemsize}")[()]


def _forget_kernels() -> None:
    """Kernels that are loaded for the simulator must not be launched after it."""
    for function in gc.get_objects():
        if type(function) is triton.JITFunction:
            function.device_caches.clear()
