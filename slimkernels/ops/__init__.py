"""The ops: one public function each, over the dispatcher (C++ on the CPU, kernels on GPUs, else plain PyTorch)."""

# Importing the extension registers its kernels; the schemas above must exist by then for its checks to see them.
from slimkernels import _extension  # noqa: F401
from slimkernels.ops.activation import activation
from slimkernels.ops.inr_weights import InrParameters, InrTensor, inr_weights
from slimkernels.ops.slice_accumulate import slice_accumulate_
from slimkernels.ops.slim_batch_norm import slim_batch_norm
from slimkernels.ops.slim_conv import slim_conv
from slimkernels.ops.slim_conv_transpose import slim_conv_transpose
from slimkernels.ops.slim_group_norm import slim_group_norm
from slimkernels.ops.slim_gru import slim_gru
from slimkernels.ops.slim_layer_norm import slim_layer_norm
from slimkernels.ops.slim_linear import slim_linear
from slimkernels.ops.slim_lstm import slim_lstm
from slimkernels.ops.slim_rms_norm import slim_rms_norm

__all__ = [
    "InrParameters",
    "InrTensor",
    "activation",
    "inr_weights",
    "slice_accumulate_",
    "slim_batch_norm",
    "slim_conv",
    "slim_conv_transpose",
    "slim_group_norm",
    "slim_gru",
    "slim_layer_norm",
    "slim_linear",
    "slim_lstm",
    "slim_rms_norm",
]
