"""The steps of ``make gpu`` that prove: build, tests on the GPU, the sanitizer, ceilings, recompilations."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.session import Session

ROOT = Path(__file__).parent.parent.parent


def command(session: Session, name: str, words: list[str], **environment: str) -> tuple[int, str]:
    """Runs ``words`` while there is time; the output goes to ``<name>.txt``. Status and last line."""
    log = session.out / f"{name}.txt"
    with log.open("w") as opened:
        try:
            done = subprocess.run(
                words,
                cwd=ROOT,
                env=os.environ | environment,
                stdout=opened,
                stderr=subprocess.STDOUT,
                timeout=max(session.left(), 1),
                check=False,
            )
        except subprocess.TimeoutExpired:
            return -1, "cut off: no time left"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return done.returncode, lines[-1] if lines else ""


def build(session: Session) -> str:
    """The CUDA extension, where nvcc is; else the one that was carried along."""
    carried = sorted((ROOT / "slimkernels").glob("_cuda*.so"))
    nvcc = shutil.which("nvcc")
    if session.dry:
        return f"dry: {'nvcc would build it' if nvcc else 'no nvcc'}, {len(carried)} carried along"
    if nvcc is None:
        return f"no nvcc; carried along: {', '.join(p.name for p in carried) or 'none, CUDA C++ ops run the reference'}"
    words = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    status, told = command(session, "build", words, SLIMKERNELS_CUDA="1", SLIMKERNELS_CPP="0")
    return "built" if status == 0 else f"red: {told}"


def tests(session: Session) -> str:
    """Every test of the ops and modules with its tensors on the GPU."""
    words = [sys.executable, "-m", "pytest", "-q", "-x" if session.dry else "--maxfail=50"]
    words += ["tests/ops/test_slim_rms_norm.py", "-k", "empty"] if session.dry else ["tests/ops", "tests/nn"]
    status, told = command(session, "tests", words, SLIMKERNELS_TEST_DEVICE=session.device.type)
    return told if status == 0 else f"red: {told}"


def tests_tf32(session: Session) -> str:
    """What multiplies float32, once more in tf32, with the tolerance of its ten bits."""
    words = [sys.executable, "-m", "pytest", "-q", "-k", "f32", "--collect-only" if session.dry else "--maxfail=50"]
    ops = ["slim_linear"] if session.dry else ["slim_linear", "slim_conv", "inr_weights"]
    words += [f"tests/ops/test_{op}.py" for op in ops]
    environment = {"SLIMKERNELS_TEST_DEVICE": session.device.type, "SLIMKERNELS_TEST_TF32": "1"}
    status, told = command(session, "tests_tf32", words, **environment)
    return told if status == 0 else f"red: {told}"


def sanitizer(session: Session) -> str:
    found = shutil.which("compute-sanitizer")
    if session.dry or found is None:
        return "compute-sanitizer is not installed" if found is None else "dry: compute-sanitizer would run"
    words = [found, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"]
    status, told = command(
        session, "sanitizer", [*words, "tests/ops", "-k", "odd_widths"], SLIMKERNELS_TEST_DEVICE="cuda"
    )
    return told if status in (0, -1) else f"red: {told}"


def ceilings(session: Session) -> str:
    """What this GPU reaches: a copy of 2 GiB for bytes/s, square products for FLOP/s of each dtype."""
    size = 2**10 if session.dry else 2**29
    source = torch.zeros(size, device=session.device)
    target = torch.empty_like(source)
    ms = session.milliseconds(partial(target.copy_, source), 1.0)
    session.ceilings["memory"] = 2 * source.numel() * 4 / ms * 1e3
    del source, target
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        n = 16 if session.dry else 8192
        a, b = (torch.randn(n, n, device=session.device, dtype=dtype) for _ in range(2))
        ms = session.milliseconds(partial(torch.matmul, a, b), 1.0)
        session.ceilings[str(dtype).removeprefix("torch.")] = 2 * n**3 / ms * 1e3
    for name, value in session.ceilings.items():
        session.row("ceilings", what=name, per_second="dry" if session.dry else f"{value:.4g}")
    return "dry: no ceilings" if session.dry else f"{session.ceilings['memory'] / 1e12:.2f} TB/s"


def recompiles(session: Session) -> str:
    """How many kernels Triton compiles for 30 random widths after widths of every kind were seen."""
    from slimkernels.nn import SlimConv2d, SlimLinear, SlimRMSNorm

    full = 64 if session.dry else 1024
    batch = 4 if session.dry else 256
    linear, norm = SlimLinear(full, full).to(session.device), SlimRMSNorm(full).to(session.device)
    conv = SlimConv2d(full, full, 3, padding=1).to(session.device)

    def use(width: int) -> None:
        linear.set_width(width)
        conv.set_width(width)
        norm(linear(torch.randn(batch, width, device=session.device))).sum().backward()
        conv(torch.randn(2, width, 8, 8, device=session.device)).sum().backward()

    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(1, full + 1, (60,), generator=generator).tolist()
    seen = [2**i for i in range(full.bit_length())] + [2**i + 1 for i in range(full.bit_length() - 1)] + draw[:30]
    for width in seen:
        use(min(width, full))
    compiled: list[str] = []
    if session.dry:
        for width in draw[30:33]:
            use(width)
        return "dry: no kernel is compiled on the CPU"
    from triton import knobs

    hook = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda *args, **kwargs: compiled.append(str(kwargs.get("repr", "")))
    try:
        for width in draw[30:]:
            use(width)
    finally:
        knobs.runtime.jit_post_compile_hook = hook
    session.row("recompiles", widths=30, kernels_compiled=len(compiled))
    return f"{'red: ' if compiled else ''}{len(compiled)} kernels compiled for 30 random widths"
