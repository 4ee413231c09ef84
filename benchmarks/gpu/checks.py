"""The steps of ``make gpu`` that prove: ceilings and recompilations here, build, tests and sanitizer as processes."""

import os
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.runner import ROOT, Job
from benchmarks.gpu.session import Session

# The test files, each with the number of parts that run beside each other: those with the CUDA C++ ops come first.
TEST_PARTS = {
    "tests/ops/test_inr_weights.py": 3,
    "tests/ops/test_slim_conv.py": 8,
    "tests/ops/test_slim_linear.py": 4,
    "tests/ops/test_slim_batch_norm.py": 5,
    "tests/ops/test_slice_accumulate.py": 1,
    "tests/ops/test_large_tensors.py": 1,
}
# Processes that talk to each other on the CPU, and the memory of the C++ kernel.
NOT_ON_A_GPU = ("tests/nn/test_sync_batch_norm.py", "tests/ops/test_inr_weights_memory.py")
TF32_OPS = ("slim_linear", "slim_conv", "slim_conv_transpose", "inr_weights")
SANITIZED = "odd_widths or odd_sizes or slice_accumulate or depthwise or depths"


def test_files() -> list[str]:
    found = sorted(
        p.relative_to(ROOT).as_posix() for name in ("ops", "nn") for p in (ROOT / "tests" / name).glob("test_*")
    )
    return [*TEST_PARTS, *(name for name in found if name not in (*TEST_PARTS, *NOT_ON_A_GPU))]


def pytest_job(
    out: Path, name: str, words: list[str], seconds: float, before: tuple[str, ...] = (), **environment
) -> Job:
    progress = out / "items" / f"{name.replace('/', '-').replace(' ', '-')}.jsonl"
    command = [*before, sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.outcomes", "-p", "no:cacheprovider"]
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # whatever else is installed there
    return Job(name, [*command, f"--progress={progress}", *words], seconds, environment)


def test_jobs(out: Path, dry: bool, seconds: float) -> list[Job]:
    """Every test of the ops and modules with its tensors on the GPU; what multiplies float32 once more in tf32, with the
    tolerance of its ten bits. Dry: a few, on the CPU."""
    device = {"SLIMKERNELS_TEST_DEVICE": "cpu" if dry else "cuda", "OMP_NUM_THREADS": "1"}
    if dry:
        few = ["tests/ops/test_slim_rms_norm.py", "tests/ops/test_large_tensors.py", "-k", "empty or large"]
        return [pytest_job(out, "tests", few, seconds, **device)]
    jobs = []
    for file in test_files():
        parts = TEST_PARTS.get(file, 2)
        for part in range(parts):
            name = f"tests {Path(file).stem.removeprefix('test_')}" + (f" {part + 1} of {parts}" if parts > 1 else "")
            jobs.append(pytest_job(out, name, [file, f"--part={part}/{parts}"], seconds, **device))
    for op in TF32_OPS:
        words = [f"tests/ops/test_{op}.py", "-k", "f32"]
        jobs.append(pytest_job(out, f"tests {op} in tf32", words, seconds, **device, SLIMKERNELS_TEST_TF32="1"))
    return jobs


def sanitizer_jobs(out: Path, seconds: float) -> list[Job]:
    """Each allocation by itself: within PyTorch's pools an address out of bounds is a valid one."""
    found = shutil.which("compute-sanitizer")
    if found is None:
        return []
    environment = {"SLIMKERNELS_TEST_DEVICE": "cuda", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    jobs = []
    for tool in ("memcheck", "racecheck"):
        before = (found, "--tool", tool, "--target-processes", "all", "--error-exitcode", "9")
        words = ["tests/ops/test_inr_weights.py", "tests/ops/test_slice_accumulate.py", "tests/ops/test_slim_conv.py"]
        words += ["tests/ops/test_slim_linear.py", "tests/ops/test_slim_batch_norm.py", "-k", SANITIZED]
        job = pytest_job(out, f"sanitizer {tool}", words, seconds, before, **environment)
        job.red, job.silence = {9: f"{tool} found errors"}, seconds  # the first kernel alone takes it long
        jobs.append(job)
    return jobs


def build(session: Session) -> str:
    """The CUDA extension for this GPU, where nvcc is; else the one that was carried along."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or ""
    nvcc, told = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin")), carried()
    if session.dry:
        return f"dry: {'nvcc would build it' if nvcc else 'no nvcc'}; carried along: {told}"
    if nvcc is None:
        return f"{'' if told == 'built from these sources' else 'red: '}no nvcc; carried along: {told}"
    major, minor = torch.cuda.get_device_capability()
    environment = {"SLIMKERNELS_CUDA": "1", "SLIMKERNELS_CPP": "0", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}+PTX"}
    words = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(words, cwd=ROOT, env=os.environ | environment, check=False)
    if done.returncode == 0:
        return f"built for sm_{major}{minor}"
    return f"red: nvcc's build ended with exit status {done.returncode}; carried along: {told}"


def carried() -> str:
    """What ``slimkernels/_cuda.abi3.so`` is, asked of a process that loads it."""
    if not list((ROOT / "slimkernels").glob("_cuda*.so")):
        return "nothing, CUDA C++ ops run the reference"
    words = [sys.executable, "-c", "import torch, slimkernels._cuda as cuda; print(getattr(cuda, 'sources', ''))"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"a library that does not load: {done.stderr.strip().splitlines()[-1]}"
    here = runpy.run_path(str(ROOT / "csrc/cuda/fingerprint.py"))["fingerprint"]()
    return "built from these sources" if done.stdout.strip() == here else "built from other sources than these"


def ceilings(session: Session) -> str:
    """What this GPU reaches: a copy of 2 GiB for bytes/s, square products for FLOP/s of each dtype, float32 in tf32 too."""
    size = 2**10 if session.dry else 2**29
    source = torch.zeros(size, device=session.device)
    target = torch.empty_like(source)
    ceiling(session, "memory", 2 * source.numel() * 4, partial(target.copy_, source))
    del source, target
    n = 16 if session.dry else 8192
    for name in ("bfloat16", "float16", "tf32", "float32"):
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        a, b = (torch.randn(n, n, device=session.device, dtype=dtype) for _ in range(2))
        ceiling(session, name, 2 * n**3, partial(torch.matmul, a, b))
    return "dry: no ceilings" if session.dry else torch.cuda.get_device_name()


def ceiling(session: Session, name: str, amount: int, call) -> None:
    if session.todo(name):
        with session.item(name):
            ms = session.timing(call, 0.5)[0]
            session.row("ceilings", what=name, per_second="dry" if session.dry else f"{amount / ms * 1e3:.4g}")


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
    for name in compiled:
        print(name)
    return f"{'red: ' if compiled else ''}{len(compiled)} kernels compiled for 30 random widths"
