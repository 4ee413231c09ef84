"""What a launcher launches, kept instead of run: so that rung T2 compiles what a GPU would be given, and nothing else.

The arguments decide what Triton compiles: which pointers and sizes are divisible by 16, which strides are 1, which tensors
are missing, which block sizes the launcher picked.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from tests.emulation.aot import Resources, compile_kernel, resources

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Captured:
    """One launch of one kernel."""

    kernel: Any
    grid: tuple[int, ...]
    signature: dict[str, str]  # of the run-time arguments
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    warps: int
    stages: int
    registers: int | None = None  # the most a thread may have

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def compile(self, target: str) -> Any:
        return compile_kernel(
            self.kernel,
            self.signature,
            self.constants,
            target,
            divisible=self.divisible,
            warps=self.warps,
            stages=self.stages,
            registers=self.registers,
        )

    def resources(self, target: str) -> Resources:
        return resources(self.compile(target), target)


def capture(call: Callable[[], Any]) -> list[Captured]:
    """The launches in ``call()``, which runs with CPU tensors and writes nothing."""
    found: list[Captured] = []
    with _recording(found):
        call()
    return found


@contextlib.contextmanager
def _recording(found: list[Captured]) -> Iterator[None]:
    original = triton.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(_captured(self, args, grid, kwargs))

    triton.JITFunction.run = run
    try:
        yield
    finally:
        triton.JITFunction.run = original


def _captured(kernel: Any, args: tuple, grid: Any, kwargs: dict[str, Any]) -> Captured:
    warps, stages = kwargs.pop("num_warps", 4), kwargs.pop("num_stages", 3)
    registers = kwargs.pop("maxnreg", None)
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or value is None:
            constants[name] = value
            continue
        specialised = not parameter.do_not_specialize
        if specialised and isinstance(value, int) and not isinstance(value, bool) and value == 1:
            constants[name] = 1
            continue
        signature[name] = _kind(value)
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if specialised and isinstance(number, int) and number % 16 == 0:
            divisible.append(name)
    return Captured(
        kernel,
        tuple(grid(given) if callable(grid) else grid),
        signature,
        constants,
        tuple(divisible),
        warps,
        stages,
        registers,
    )


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"capture: expected a tensor or a number, got {type(value).__name__}")
