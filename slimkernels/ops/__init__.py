"""The ops: one public function each, over the dispatcher (C++ on the CPU, kernels on GPUs, else plain PyTorch)."""

from slimkernels.ops.activation import activation
from slimkernels.ops.slim_linear import slim_linear

# Importing the extension registers its kernels; the schemas above must exist by then for its checks to see them.
from slimkernels import _extension  # noqa: E402, F401, I001

__all__ = ["activation", "slim_linear"]
