"""Ops whose GPU launchers run on CPU tensors: on the interpreter, or on the simulator of PTX."""

import contextlib
import importlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def launched_on_cpu(*stems: str) -> Iterator[None]:
    """Within it the ops of ``triton_kernels/<stem>.py`` and their backwards run those launchers for CPU tensors.

    Everything above the dispatcher is as in production: checks, autograd, saved tensors.
    """
    library = torch.library.Library("slimkernels", "IMPL")
    try:
        for stem in stems:
            module = importlib.import_module(f"slimkernels.triton_kernels.{stem}")
            for name in (stem, f"{stem}_backward"):
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*operators may also be overridden")
                    library.impl(name, getattr(module, name), "CPU", allow_override=True)
        yield
    finally:
        library._destroy()
