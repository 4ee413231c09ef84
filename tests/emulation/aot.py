"""Rung T2: kernels compiled to machine code for GPUs that are not here, and what the compilers say about them.

In a process without ``TRITON_INTERPRET=1``. Triton's wheel brings ptxas, cuobjdump and AMD's back end along.
"""

import math
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

POINTERS = {"f32": "*fp32", "bf16": "*bf16", "f16": "*fp16"}

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Instructions by the beginning of their name in SASS.
MIX = {
    "HMMA": r"HMMA",
    "WGMMA": r"[HQI]GMMA",
    "TCGEN05": r"UTC\w*MMA|TCGEN|UT[CH]",
    "FFMA": r"FFMA",
    "LDG": r"LDG",
    "LDG128": r"LDG\.E\.(\w+\.)*128",
    "STG": r"STG",
    "STG128": r"STG\.E\.(\w+\.)*128",
    "LDGSTS": r"LDGSTS",
    "LDGSTS128": r"LDGSTS\.E\.(\w+\.)*128",
    "LDS": r"LDS",
    "BAR": r"BAR",
    "ATOM": r"ATOMG|RED|ATOM",
}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes."""

    target: str
    registers: int
    spills: int  # bytes stored and loaded because the registers did not suffice
    stack: int  # bytes of stack frame a thread
    shared: int  # bytes a block
    warps: int
    stages: int
    mix: Mapping[str, int] = field(default_factory=dict)  # of instructions; on gfx942: MFMA and the 16-byte loads
    occupancy: float = math.nan  # of a multiprocessor's warps, an upper bound
    limiter: str = ""  # what bounds it

    @property
    def tensor_core_instructions(self) -> int:
        return sum(self.mix.get(name, 0) for name in ("HMMA", "WGMMA", "TCGEN05", "MFMA"))


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],  # of the run-time arguments: {"x_ptr": "*fp32", "M": "i32", ...}
    constants: Mapping[str, Any],  # of the constexpr arguments
    target: str,
    *,
    divisible: Sequence[str] = (),  # arguments that a real launch finds divisible by 16: aligned pointers, strides
    ones: Sequence[str] = (),  # run-time arguments that a real launch finds to be 1, and makes constants of
    warps: int = 4,
    stages: int = 3,
    registers: int | None = None,  # the most a thread may have; NVIDIA only
) -> Any:
    """Triton's compiled kernel. An error of the compilers becomes RuntimeError with their first words."""
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn  # heuristics and the like
    constants = {**constants, **dict.fromkeys(ones, 1)}
    kinds = {**signature, **dict.fromkeys(constants, "constexpr")}
    missing = set(kernel.arg_names) - set(kinds)
    if missing:
        raise ValueError(f"compile_kernel: expected every argument of {kernel.__name__}, got none for {missing}")
    at = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        {name: kinds[name] for name in kernel.arg_names},
        {at[name]: value for name, value in constants.items()},
        {at[name]: [["tt.divisibility", 16]] for name in divisible if name not in constants},
    )
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if registers is not None and TARGETS[target].backend == "cuda":
        options["maxnreg"] = registers
    try:
        return triton.compile(source, target=TARGETS[target], options=options)
    except Exception as error:
        name = type(error).__name__
        raise RuntimeError(f"{kernel.__name__} does not compile for {target}: {name}: {str(error)[:600]}") from error


def resources(compiled: Any, target: str) -> Resources:
    """Registers, spills, shared memory and instructions of what ``compile_kernel`` gave."""
    common = {
        "target": target,
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
    }
    if "cubin" not in compiled.asm:
        return Resources(**common, **_amd(compiled.asm["amdgcn"]))
    found = _nvidia(compiled, TARGETS[target].arch)
    occupancy, limiter = occupancy_bound(found["registers"], common["shared"], common["warps"], target)
    return Resources(**common, **found, occupancy=occupancy, limiter=limiter)


def _nvidia(compiled: Any, arch: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        named = _search(r"\.target\s+(\w+)", compiled.asm["ptx"])[1]
        usage = _output([str(BIN / "cuobjdump"), "-res-usage", str(cubin)])
        sass = _output([str(BIN / "cuobjdump"), "-sass", str(cubin)])
        told = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
        if not re.search(r"STACK:0 .*LOCAL:0 ", usage):
            # How much of the stack is spills only ptxas tells, so it runs once more.
            told = _output([get_ptxas(arch).path, "-v", f"-arch={named}", str(ptx), "-o", str(Path(folder, "again"))])
    spills = _search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", told)
    return {
        "registers": int(_search(r"REG:(\d+)", usage)[1]),
        "spills": int(spills[2]) + int(spills[3]),
        "stack": int(spills[1]),
        "mix": instruction_mix(sass),
    }


def instruction_mix(sass: str) -> dict[str, int]:
    """How many instructions of each kind of ``MIX``, and all of them, stand in a disassembly."""
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)
    return {"all": len(names)} | {
        kind: sum(bool(re.match(rf"(?:{pattern})(?![A-Z0-9])", name)) for name in names)
        for kind, pattern in MIX.items()
    }


def _amd(assembly: str) -> dict[str, Any]:
    def number(name: str) -> int:
        return int(_search(rf"\.{name}:\s+(\d+)", assembly)[1])

    return {
        "registers": number("vgpr_count"),
        "spills": 4 * (number("vgpr_spill_count") + number("sgpr_spill_count")),
        "stack": number("private_segment_fixed_size"),
        "mix": {
            "MFMA": len(re.findall(r"\bv_mfma_", assembly)),
            "LDG": len(re.findall(r"\b(?:global|buffer)_load_", assembly)),
            "LDG128": len(re.findall(r"\b(?:global|buffer)_load_dwordx4", assembly)),
        },
    }


def _search(pattern: str, text: str) -> re.Match[str]:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in what the compiler said: {text[:400]}")
    return found


def _output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {result.stderr[:400]}")
    return result.stdout + result.stderr


@dataclass(frozen=True)
class Multiprocessor:
    """The limits of CUDA's occupancy calculation for one multiprocessor."""

    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    registers: int = 65536
    registers_per_thread: int = 255
    shared_reserved: int = 1024  # a block


LIMITS = {
    "sm_80": Multiprocessor(warps=64, blocks=32, shared=167936, shared_per_block=166912),
    "sm_90": Multiprocessor(warps=64, blocks=32, shared=233472, shared_per_block=232448),
    "sm_100": Multiprocessor(warps=64, blocks=32, shared=233472, shared_per_block=232448),
    "sm_120": Multiprocessor(warps=48, blocks=24, shared=102400, shared_per_block=101376),
}


def occupancy_bound(registers: int, shared: int, warps: int, target: str) -> tuple[float, str]:
    """Fraction of a multiprocessor's warps that can be resident at once, and what bounds it.

    Registers are given out a warp at a time in units of 256, shared memory in units of 128 bytes.
    """
    limit = LIMITS[target]
    if shared > limit.shared_per_block:
        return 0.0, "shared memory of one block"
    warp_registers = -(-max(registers, 1) * 32 // 256) * 256
    block_shared = -(-shared // 128) * 128 + limit.shared_reserved
    blocks = {
        "warps": limit.warps // warps,
        "blocks": limit.blocks,
        "registers": limit.registers // warp_registers // 4 * 4 // warps,
        "shared memory": limit.shared // block_shared,
    }
    limiter = min(blocks, key=lambda name: blocks[name])
    return round(blocks[limiter] * warps / limit.warps, 3), limiter
