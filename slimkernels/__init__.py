"""slimkernels: run, train and generate neural networks at any width and depth, chosen at run time."""

import importlib

from slimkernels import nn, ops
from slimkernels._extension import empty_cache
from slimkernels._version import __version__

# Imported on first use, so that `import slimkernels` adds little to `import torch`.
_LAZY = ("elastic", "hyper", "models", "recipes", "train")

__all__ = ["__version__", "compile", "elastic", "empty_cache", "models", "nn", "ops", "train"]


def __getattr__(name: str):
    if name in _LAZY:
        return importlib.import_module(f"slimkernels.{name}")
    if name == "compile":
        return importlib.import_module("slimkernels.elastic").compile
    raise AttributeError(f"module 'slimkernels' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
