"""Builds the C++ and the CUDA extension.

Switches: SLIMKERNELS_CPP=0 (no C++), SLIMKERNELS_CUDA=1 or 0 (CUDA or not; without it: where torch is built for CUDA and
nvcc is found), TORCH_CUDA_ARCH_LIST, DEBUG=1 (no optimisation, symbols).
"""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

NEEDS_TORCH = {"build_ext", "build", "bdist_wheel", "install", "develop", "editable_wheel"}


def cpu_extension():
    from torch.utils.cpp_extension import CppExtension

    debug = os.environ.get("DEBUG") == "1"
    compile_args = [
        "-std=c++20",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-Wno-unknown-pragmas",
        "-Wno-uninitialized",  # GCC 12 warns of its own AVX-512 headers, hundreds of times
        "-Wno-maybe-uninitialized",
        "-fopenmp",
        "-fvisibility=hidden",
    ]
    # at::parallel_for is silently serial without -fopenmp. No ISA flag and no fast-math: each kernel file is compiled once
    # per instruction set (csrc/cpu/foreach_isa.h) and the right copy is picked when it runs. These three change no result
    # that C++ defines, and let sqrt, comparisons and a * b + c become single vector instructions.
    compile_args += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
    compile_args += ["-O0", "-g"] if debug else ["-O3", "-DNDEBUG", "-g0"]
    return CppExtension(
        "slimkernels._C",
        sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc/cpu").glob("*.h")),
        extra_compile_args=compile_args,
        extra_link_args=["-fopenmp"] + ([] if debug else ["-s"]),
    )


def nvcc():
    """The compiler's path, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    beside = Path(home) / "bin" / "nvcc" if home else None
    return str(beside) if beside and beside.exists() else shutil.which("nvcc")


def wants_cuda():
    switch = os.environ.get("SLIMKERNELS_CUDA")
    if switch is not None:
        return switch == "1"
    import torch

    return torch.version.cuda is not None and nvcc() is not None


def cuda_extension():
    return Extension(
        "slimkernels._cuda",
        sorted(str(path) for path in Path("csrc/cuda").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc/cuda").glob("*.*") if path.suffix != ".cpp"),
        py_limited_api=True,
    )


def architectures():
    """What nvcc is told: machine code for each architecture, and PTX of the newest for those to come."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0;12.0+PTX").replace(" ", ";")
    flags = []
    for entry in filter(None, listed.split(";")):
        number = entry.removesuffix("+PTX").replace(".", "")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if entry.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def compile_cuda(extension, target, folder):
    """The kernels by nvcc, the binding by the C++ compiler, against libtorch's stable ABI: the result runs on any torch
    from 2.10 on, and CUDA's runtime is part of it."""
    import torch
    from torch.utils.cpp_extension import include_paths

    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc is not found; put it on the PATH or set CUDA_HOME")
    told = subprocess.run([compiler, "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True).stderr
    top = next(line.split("=", 1)[1].strip() for line in told.splitlines() if line.startswith("#$ TOP="))
    libraries = Path(top, "lib64") if Path(top, "lib64").exists() else Path(top, "lib")
    optimise = ["-O0", "-g"] if os.environ.get("DEBUG") == "1" else ["-O3", "-DNDEBUG"]
    cxx = os.environ.get("CXX", "c++")
    includes = [f for path in [*include_paths(), sysconfig.get_paths()["include"]] for f in ("-isystem", path)]
    stable = ["-DTORCH_TARGET_VERSION=0x020A000000000000", "-DPy_LIMITED_API=0x030B0000"]
    stable.append(f'-DSK_SOURCES="{runpy.run_path("csrc/cuda/fingerprint.py")["fingerprint"]()}"')
    Path(folder).mkdir(parents=True, exist_ok=True)

    def compile_one(source):
        made = str(Path(folder, Path(source).name).with_suffix(".o"))
        if source.endswith(".cu"):
            command = [compiler, "-std=c++20", *optimise, *architectures(), "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        else:
            command = [cxx, "-std=c++20", *optimise, "-fPIC", "-fvisibility=hidden", "-Wall", *stable, *includes]
        subprocess.run([*command, "-c", source, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        kernels = [path for path in extension.depends if path.endswith(".cu")]
        objects = list(pool.map(compile_one, [*kernels, *extension.sources]))
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = [f"-L{torch_libraries}", "-ltorch", "-ltorch_cpu", "-lc10", f"-L{libraries}", "-lcudart_static"]
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([cxx, "-shared", "-o", target, *objects, *link, "-lrt", "-ldl", "-lpthread"], check=True)


def arguments():
    if not NEEDS_TORCH & set(sys.argv):
        return {}
    cpp = os.environ.get("SLIMKERNELS_CPP", "1") != "0"
    if not cpp and os.environ.get("SLIMKERNELS_CUDA") != "1":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError:
        sys.exit(
            "slimkernels: building the C++ extension needs torch in this environment; type 'pip install torch==2.13.0 ninja'"
            " and then 'pip install --no-build-isolation .', or set SLIMKERNELS_CPP=0 for pure Python"
        )

    class Build(BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                raise SystemExit(
                    f"slimkernels: compiling the C++ extension failed ({error}); set SLIMKERNELS_CPP=0 to install without it"
                ) from error

        def build_extension(self, extension):
            if extension.name != "slimkernels._cuda":
                return super().build_extension(extension)
            try:
                compile_cuda(extension, self.get_ext_fullpath(extension.name), Path(self.build_temp, "cuda"))
            except Exception as error:
                raise SystemExit(
                    f"slimkernels: compiling the CUDA extension failed ({error}); set SLIMKERNELS_CUDA=0 to install"
                    " without it, or TORCH_CUDA_ARCH_LIST to your GPU's architecture (9.0) where nvcc does not know them all"
                ) from error

        def get_ext_filename(self, name):
            # It has no symbol of one Python version, whatever BuildExtension makes of the others' names.
            is_cuda = name.rpartition(".")[2] == "_cuda"
            return f"{os.path.join(*name.split('.'))}.abi3.so" if is_cuda else super().get_ext_filename(name)

    extensions = [cpu_extension()] if cpp else []
    if wants_cuda():
        extensions.append(cuda_extension())
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build}}


setup(**arguments())
