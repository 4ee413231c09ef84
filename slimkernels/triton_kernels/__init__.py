"""Triton kernels of the ops: one module an op, its launchers named as the ops they run.

``ops/_common.py: on_gpu`` registers them. Importing this package imports no Triton and touches no driver.
"""

import functools
import importlib.metadata
import importlib.util
import os

OLDEST_TRITON = (3, 6)


@functools.cache
def reason_missing() -> str:
    """Why the Triton kernels cannot run here, or "" when they can (given a GPU)."""
    if os.environ.get("SLIMKERNELS_DISABLE") == "1":
        return "switched off by SLIMKERNELS_DISABLE=1"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed ('pip install triton' on Linux)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""  # torch for ROCm brings its own Triton under another name
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return ""
