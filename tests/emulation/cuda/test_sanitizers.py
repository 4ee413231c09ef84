"""Rung C2 once more under the address and undefined-behaviour sanitizers, in a process with libasan preloaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulation.cuda import library
from tests.emulation.cuda.library import skip_unless_possible

HERE = Path(__file__).parent


def compiler_file(name: str) -> str:
    return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def run(code: list[str]) -> subprocess.CompletedProcess:
    skip_unless_possible()
    # Without the second, exceptions of libraries that are loaded later end in the sanitizer instead of where they are caught.
    found = [compiler_file(name) for name in ("libasan.so", "libstdc++.so.6")]
    if not all(os.path.isabs(path) for path in found):
        pytest.skip("libasan is not installed")
    environment = os.environ | {
        "SLIMKERNELS_EMULATION": "asan",
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0,detect_stack_use_after_return=0,alloc_dealloc_mismatch=0",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, *code], capture_output=True, text=True, env=environment, cwd=library.ROOT)


def run_tests(*arguments: str) -> None:
    done = run(["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *arguments])
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert " passed" in done.stdout


def test_sanitizers_find_nothing():
    run_tests(str(HERE / "test_slice_accumulate.py"), "-k", "equals_pytorch and f32-bf16-0")


@pytest.mark.slow_emulation
@pytest.mark.parametrize("file", ["test_depthwise.py", "test_slice_accumulate.py"])
def test_sanitizers_find_nothing_in_any_dtype(file):
    run_tests(str(HERE / file), "-k", "not planted")


@pytest.mark.slow_emulation
def test_sanitizers_find_nothing_in_inr_weights():
    run_tests(
        str(HERE / "test_inr_weights.py"),
        "-k",
        "(f32 or noise or waves or outputs) and not planted and not hidden_sizes",
    )


INR_BUGS = {
    "too little shared memory": ("inr_weights.cuh", "? room : other) + kRows * outputs * 4", "? room : other)"),
    "weights beyond the tensor": ("inr_coordinates.cuh", "return out < job.c_out && in <", "return out <= job.c_out && in <"),
    "rows beyond the tables": ("inr_weights_sums.cu", "if (k0 + k < count) load", "if (true) load"),
}  # fmt: skip


@pytest.mark.slow_emulation
@pytest.mark.parametrize("name", INR_BUGS)
def test_sanitizers_find_planted_bugs_in_inr_weights(name):
    code = f"""
import torch
from tests.emulation.cuda import inr
from tests.emulation.cuda.library import Kernels
from tests.emulation.cuda.test_inr_weights import TENSORS, check, check_backward
torch.set_num_threads(1)
kernels = Kernels(inr.STEMS_OF[0], 0, {INR_BUGS[name]!r})
check(kernels, 33, 1, 0, tensors=TENSORS[3:4])
check_backward(kernels, 33, 1, 0, tensors=TENSORS[3:4])
"""
    done = run(["-c", code])
    assert done.returncode, "the sanitizers let a planted bug through"
    assert "AddressSanitizer" in done.stderr, done.stderr[-3000:]


@pytest.mark.slow_emulation
@pytest.mark.parametrize(
    ("bug", "case", "report"),
    [
        (("slim_conv_depthwise.cu", "column + V <= width", "column < width"), "c33-5x3-d2", "heap-buffer-overflow"),
        # Of eight planes that a block works on at once; beyond the poisoned bytes no memory is allocated.
        (
            ("slim_conv_depthwise.cu", "bytes = t.planes * (rows", "bytes = (rows"),
            "3x3",
            "use-after-poison|heap-buffer",
        ),
    ],
    ids=["read beyond the row", "too little shared memory"],
)
def test_sanitizers_find_planted_bugs(bug, case, report):
    code = f"""
import torch
from tests.emulation.cuda import depthwise
from tests.emulation.cuda.library import Kernels
from tests.emulation.cuda.test_depthwise import check
torch.set_num_threads(1)
check(Kernels(depthwise.STEMS, 0, {bug!r}), {case!r}, torch.float32, False)
"""
    done = run(["-c", code])
    assert done.returncode, "the sanitizers let a planted bug through"
    assert any(word in done.stderr for word in report.split("|")), done.stderr[-3000:]
