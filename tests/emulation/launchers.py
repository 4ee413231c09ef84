"""Ops whose GPU launchers run on CPU tensors: on the interpreter, on the simulator of PTX, or with stand-ins below them."""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch


@contextlib.contextmanager
def launched_on_cpu(*stems: str) -> Iterator[None]:
    """Within it the ops of ``triton_kernels/<stem>.py`` and their backwards run those launchers for CPU tensors.

    Everything above the dispatcher is as in production: checks, autograd, saved tensors.
    """
    modules = {stem: importlib.import_module(f"slimkernels.triton_kernels.{stem}") for stem in stems}
    names = {name: module for stem, module in modules.items() for name in (stem, f"{stem}_backward")}
    with registered({name: getattr(module, name) for name, module in names.items()}):
        yield


@contextlib.contextmanager
def registered(kernels: Mapping[str, Callable]) -> Iterator[None]:
    """Within it the ops of these names run these functions for CPU tensors."""
    library = torch.library.Library("slimkernels", "IMPL")
    try:
        for name, run in kernels.items():
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*operators may also be overridden")
                library.impl(name, run, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()
