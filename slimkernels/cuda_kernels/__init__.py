"""CUDA C++ kernels of the ops: one module an op. The operators behind them come from ``slimkernels/_cuda.abi3.so``.

Importing this package loads no library and touches no driver. The library is loaded when it is asked for, by the first call
of an op on a CUDA tensor or ``slimkernels info``.
"""

import functools
import importlib
import importlib.util
import os

import torch


@functools.cache
def reason_missing() -> str:
    """Why the CUDA kernels cannot run here, or "" when they can (given a GPU)."""
    if os.environ.get("SLIMKERNELS_DISABLE") == "1":
        return "switched off by SLIMKERNELS_DISABLE=1"
    if importlib.util.find_spec("slimkernels._cuda") is None:
        return "not built (install with nvcc, and SLIMKERNELS_CUDA=1 where torch has no CUDA)"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        importlib.import_module("slimkernels._cuda")
    except ImportError as error:
        return f"built for another machine or torch ({error}); rebuild with nvcc and SLIMKERNELS_CUDA=1"
    return ""


@functools.cache
def operators():
    """The operators of the library, which is loaded now."""
    importlib.import_module("slimkernels._cuda")
    return torch.ops.slimkernels_cuda


def available() -> bool:
    return not reason_missing()
