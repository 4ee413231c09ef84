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
