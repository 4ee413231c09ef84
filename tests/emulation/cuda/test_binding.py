"""Rung C4: the library is built, imports on a PyTorch without a GPU, and offers the operators that Python calls."""

import os
import re
import subprocess
import sys

import pytest

from tests.emulation.cuda.compiled import skip_without_nvcc
from tests.emulation.cuda.library import BUILD, ROOT, SOURCES

LIBRARY = ROOT / "slimkernels" / "_cuda.abi3.so"
CHECK = """
import sys, torch
sys.path.insert(0, {root!r})
import slimkernels
assert not torch.cuda.is_initialized()
assert not any("_cuda.abi3" in line for line in open("/proc/self/maps")), "loaded before it is used"
torch.ops.load_library({library!r})
assert not torch.cuda.is_initialized()
for name in {names!r}:
    print(getattr(torch.ops.slimkernels_cuda, name).default._schema)
"""
# The kernels behind the dispatcher's key for CUDA, called with tensors of the CPU: arguments arrive as the schema says, and
# the kernel refuses them before it touches memory.
REFUSE = """
import torch
torch.ops.load_library({library!r})
ops, key = torch.ops.slimkernels_cuda, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
t, four = torch.zeros(64), torch.zeros(1, 2, 3, 3)
geometry, numbers = [1] * 6, [0] * 7
calls = {{
    "depthwise_forward": (four, four, None, four, four, geometry, 0),
    "depthwise_input_gradient": (four, four, four, geometry),
    "depthwise_weight_gradient": (four, four, four, geometry),
    "slice_accumulate": ([t, t], [t, t]),
    "inr_forward": ([t] * 7, t, [t], None, [0] * 18, numbers, 1.0, 0.5, t),
    "inr_backward": ([t] * 7, [t, t], None, t, [0] * 18, numbers, 1.0, 0.5, t, 1, [t] * 3),
}}
for name, arguments in calls.items():
    operator = getattr(ops, name).default
    for call in (operator, lambda *a: operator.redispatch(key, *a)):
        try:
            call(*arguments)
            print(name, "took tensors of the CPU")
        except (RuntimeError, NotImplementedError) as error:
            print(name, str(error).splitlines()[0])
assert not torch.cuda.is_initialized()
"""
REFUSALS = {
    "depthwise_forward": "slim_conv: expected CUDA tensors of 4 dimensions and 6 integers of geometry",
    "depthwise_input_gradient": "slim_conv_backward: expected CUDA tensors of 4 dimensions and 6 integers of geometry",
    "depthwise_weight_gradient": "slim_conv_backward: expected CUDA tensors of 4 dimensions and 6 integers of geometry",
    "slice_accumulate": "slice_accumulate: expected targets of the dtype and on the CUDA device of the first tensor",
    "inr_forward": "inr_weights: expected packed networks on a CUDA device",
    "inr_backward": "inr_weights_backward: expected packed networks on a CUDA device, 2 transposed matrices and 3 gradients",
}


@pytest.fixture(scope="module")
def library():
    """The one beside the package where it is newer than its sources, else one that is built now."""
    sources = [*SOURCES.glob("*.*"), ROOT / "setup.py"]
    newest = max(path.stat().st_mtime for path in sources)
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > newest:
        return LIBRARY
    skip_without_nvcc()
    made = BUILD / "binding" / "slimkernels" / "_cuda.abi3.so"
    if made.exists() and made.stat().st_mtime > newest:
        return made
    switches = {"SLIMKERNELS_CPP": "0", "SLIMKERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}
    switches["NVCC_APPEND_FLAGS"] = "-Xptxas -O0"  # no kernel runs here
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-lib={BUILD}/binding", f"--build-temp={BUILD}/binding-temp"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | switches,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return made


def defined() -> dict[str, str]:
    """name -> schema, as the binding's sources define them."""
    text = "".join(path.read_text() for path in sorted(SOURCES.glob("*.cpp")))
    schemas = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', text)
    joined = ["".join(re.findall(r'"([^"]*)"', schema)) for schema in schemas]
    return {schema.split("(", 1)[0]: schema for schema in joined}


def called() -> set[str]:
    """What Python calls of it."""
    text = "".join(path.read_text() for path in sorted((ROOT / "slimkernels" / "cuda_kernels").glob("*.py")))
    return set(re.findall(r"operators\(\)\.(\w+)", text))


@pytest.mark.slow_emulation
def test_cuda_library_imports_without_a_gpu_and_its_schemas_match(library):
    names = sorted(defined())
    code = CHECK.format(root=str(ROOT), library=str(library), names=names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    schemas = dict(zip(names, done.stdout.splitlines(), strict=True))
    assert schemas == {name: f"slimkernels_cuda::{schema}" for name, schema in defined().items()}


@pytest.mark.slow_emulation
def test_cuda_operators_refuse_tensors_of_the_cpu(library):
    done = subprocess.run(
        [sys.executable, "-c", REFUSE.format(library=str(library))], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert set(REFUSALS) == set(defined())
    for name, before, behind in zip(REFUSALS, lines[::2], lines[1::2], strict=True):
        assert before.startswith(
            f"{name} Could not run 'slimkernels_cuda::{name}' with arguments from the 'CPU' backend"
        )
        assert behind.startswith(f"{name} ")
        assert behind.endswith(REFUSALS[name]), behind


def test_cuda_library_has_what_python_calls():
    assert called() == set(defined())


def test_cuda_build_without_nvcc_names_the_switch():
    environment = {"PATH": "/nowhere", "SLIMKERNELS_CPP": "0", "SLIMKERNELS_CUDA": "1"}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-lib={BUILD}/none", f"--build-temp={BUILD}/none-temp"],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode
    assert "set SLIMKERNELS_CUDA=0 to install without it" in done.stderr
