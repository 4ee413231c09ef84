"""Builds the C++ extension. Switches: SLIMKERNELS_CPP=0 (pure Python), DEBUG=1 (no optimisation, symbols)."""

import os
import sys
from pathlib import Path

from setuptools import setup

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


def arguments():
    if os.environ.get("SLIMKERNELS_CPP", "1") == "0" or not NEEDS_TORCH & set(sys.argv):
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

    return {"ext_modules": [cpu_extension()], "cmdclass": {"build_ext": Build}}


setup(**arguments())
