"""A convolution and the batch norm after it as one node of autograd, where the CPU's kernels run both.

Inside ``gradient_slots`` only: the two ops are two nodes in Python there, with their checks, which cost more than the
kernels of a small layer.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels import _extension
from slimkernels.nn.batch_norm import SlimBatchNorm
from slimkernels.nn.conv import SlimConv1d, SlimConv2d, SlimConv3d
from slimkernels.ops import _recipes
from slimkernels.ops._common import autocast_dtype
from slimkernels.ops._slots import slot_of, stand_in

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_plain(conv: Any, norm: Any) -> bool:
    """Whether the layers' own forwards would run, and not one of a subclass."""
    return (
        isinstance(conv, (SlimConv1d, SlimConv2d, SlimConv3d))
        and type(conv).forward is SlimConv2d.forward
        and type(norm).forward is SlimBatchNorm.forward
        and type(norm)._run is SlimBatchNorm._run
        and not {"forward", "_run"} & (conv.__dict__.keys() | norm.__dict__.keys())
    )


@lru_cache(maxsize=1024)
def _options(stride: tuple, padding: tuple, dilation: tuple, eps: float, activation: str) -> Any:
    assert _extension._C is not None
    return _extension._C.ConvNormOptions(stride, padding, dilation, eps, activation)


def conv_norm(conv: Any, norm: Any, x: Tensor, residual: Any, activation: str) -> Tensor | None:
    """``activation(norm(conv(x)) + residual)``; None where the layers are to run one after another."""
    own, layer = conv._parameters, norm if norm._entry is None else norm._entry
    weight, parameters, buffers = own["weight"], layer._parameters, layer._buffers
    if (
        _extension._C is None
        or type(x) is not Tensor
        or not x.is_cpu
        or x.dim() != weight.dim()
        or not _is_ready(conv, norm)
        or own["bias"] is not None
        or torch._C._len_torch_dispatch_stack()
    ):
        return None
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    if x.dtype not in _DTYPES or weight.dtype not in (x.dtype, torch.float32 if dtype is not None else x.dtype):
        return None
    if residual is not None:
        if type(residual) is not Tensor or not residual.is_cpu:
            return None
        residual = residual.to(x.dtype) if dtype is not None else residual
        if residual.dtype != x.dtype:
            return None
    given = weight, parameters["weight"], parameters["bias"]
    slots = [slot_of(p) for p in given]
    if not all(_deposits(p, slot) for p, slot in zip(given, slots, strict=True)):
        return None
    keeps, momentum = norm._keeps_running, 0.0
    mean, var, count = (
        buffers[name] if keeps else None for name in ("running_mean", "running_var", "num_batches_tracked")
    )
    if count is not None:
        momentum = norm.momentum
    y = _extension._C.slim_conv_norm(
        x,
        *(stand_in(p) for p in given),
        residual,
        conv.width,
        conv._active_groups(x.shape[1]),
        _options(conv.stride, conv.padding, conv.dilation, norm.eps, activation),
        *slots,
        mean,
        var,
        momentum,
        _recipes._active > 0,
    )
    if y is not None and count is not None:
        count.add_(1)
    return y


def _deposits(parameter: Tensor | None, slot: Any) -> bool:
    """Whether the node can hand over the parameter's gradient: it has none, or a slot of the extension."""
    if slot is None:
        return parameter is None or (type(parameter) is nn.Parameter and not parameter.requires_grad)
    extension = _extension._C
    return extension is not None and type(slot) is extension.Slot


def _is_ready(conv: Any, norm: Any) -> bool:
    """Batch statistics, leading slices, and nothing between the convolution and the norm."""
    return (
        norm.training
        and not norm._collects
        and norm.momentum is not None
        and norm.in_index is None
        and conv.in_index is None
        and conv.out_index is None
        and conv.activation == "none"
        and conv.padding_mode == "zeros"
        and type(conv.padding) is tuple
        and (norm.mode == "shared" or norm.width == conv.width)
        and (norm._fixed_mean is None or not norm._keeps_running)
    )
