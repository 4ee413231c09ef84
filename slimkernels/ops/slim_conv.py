"""``slim_conv``: a convolution with the active slice of a full-width weight."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from slimkernels.ops._common import (
    OUTPUT_ACTIVATIONS,
    autocast_dtype,
    autograd,
    check_activation,
    check_float,
    check_same_dtype_device,
    check_shape,
    define,
    grad_needed,
    on_gpu,
)
from slimkernels.ops._eager import eager
from slimkernels.ops._recipes import recipe_of
from slimkernels.ops._slots import cast_slice, deposit, slot_of, stand_in
from slimkernels.ops.activation import activation as apply_activation
from slimkernels.ops.activation import activation_grad
from slimkernels.reference import slim_conv as reference

_eager = eager("slim_conv")


def slim_conv(
    x: Tensor,  # (B, c, *spatial) or (c, *spatial), 1 to 3 spatial dimensions
    weight: Tensor,  # (N, C / groups, *kernel), read through its strides
    bias: Tensor | None = None,  # (N,) or None
    out_channels: int | None = None,  # n <= N; None means N
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,  # "same" and "valid" too
    dilation: int | Sequence[int] = 1,
    groups: int = 1,  # the ACTIVE number of groups; depthwise: c
    activation: str = "none",
    residual: Tensor | None = None,  # the output's shape, added before the activation
) -> Tensor:  # (B, n, *spatial) or (n, *spatial); channels-last when x or weight is
    """Convolution (1d, 2d or 3d by the weight's rank) with the first ``n`` filters and the first channels of a weight.

    Equivalent to ``act(F.conv(x, weight[:n, :c // groups], bias[:n], stride, padding, dilation, groups) + residual)``.

    On the CPU, 2d and channels-last, our own kernels read the weight in place and fuse bias, residual and activation:
    1x1 with stride 1; at most 24 output channels; little work (small batches); float16 up to 64 Ki weights. The
    gradient of ``x`` likewise and with a stride; that of the weight when 1x1, 3x3 with images that stay in cache,
    little work, or depthwise above 3x3 (any layout). In bfloat16 only little work, and the gradient of ``x`` under a
    depthwise stride. All else (contiguous tensors, 1d, 3d, groups, wide layers) is oneDNN through PyTorch on the
    strided slice, then residual and activation in one pass. float64 runs the reference.

    On a GPU, 1d and 2d, dense and grouped: Triton kernels that read the weight in place and fuse bias, residual and
    activation. They work on channels-last tensors (others are copied into that order, and back), and load 16 bytes at once
    where the weight is channels-last too, as a module's is once it was moved to a GPU, and active channels are multiples
    of 16. Depthwise 1d and 2d: CUDA C++.
    3d and float64 are PyTorch's.

    Raises: ValueError when a shape, a width or a name does not fit, TypeError when dtypes differ.
    Numerics: 16-bit inputs are multiplied and summed in float32; our kernels round once, at the store, oneDNN's also
    before the residual is added. On a GPU float32 is multiplied in tf32 unless
    ``torch.backends.cudnn.conv.fp32_precision`` says "ieee", as in PyTorch.
    Source: Yu et al., Slimmable Neural Networks (arXiv 1812.08928), section 3.
    """
    op = "slim_conv"
    y = _eager(x, weight, bias, out_channels, stride, padding, dilation, groups, activation, residual)
    if y is not None:
        return y
    spatial = check_ranks(op, x, weight, activation)
    n = weight.shape[0] if out_channels is None else out_channels
    channels = x.shape[-spatial - 1]
    check_groups(op, "x's channels", channels, groups)
    check_range(op, "x's channels / groups", channels // groups, weight.shape[1])
    check_range(op, "out_channels", n, weight.shape[0])
    check_groups(op, "out_channels", n, groups)
    strides = per_dimension(op, "stride", stride, spatial, 1)
    dilations = per_dimension(op, "dilation", dilation, spatial, 1)
    kernel = weight.shape[2:]
    if isinstance(padding, str):
        x, paddings = resolve_padding(op, padding, x, kernel, strides, dilations)
    else:
        paddings = per_dimension(op, "padding", padding, spatial, 0)
    out = conv_output_size(x.shape[-spatial:], kernel, strides, paddings, dilations)
    for size in out:
        if size < 1:
            raise ValueError(
                f"{op}: expected x to be at least as large as the dilated kernel {tuple(kernel)} after padding,"
                f" got shape {tuple(x.shape)}"
            )
    check_shape(op, "bias", bias, weight.shape[:1])
    if residual is not None:
        check_shape(op, "residual", residual, (*x.shape[: -spatial - 1], n, *out))
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), cast_slice(weight, dtype, n, channels // groups)
        bias, residual = cast_slice(bias, dtype, n), None if residual is None else residual.to(dtype)
    check_same_dtype_device(op, x, weight=weight, bias=bias, residual=residual)
    weight, bias = stand_in(weight), stand_in(bias)
    return run_batched(
        torch.ops.slimkernels.slim_conv.default,
        (x, weight, bias, n, strides, paddings, dilations, groups),
        activation,
        residual,
        spatial,
    )


def check_ranks(op: str, x: Tensor, weight: Tensor, activation: str) -> int:
    """The number of spatial dimensions."""
    check_float(op, x)
    check_activation(op, activation)
    spatial = weight.dim() - 2
    if not 1 <= spatial <= 3:
        raise ValueError(f"{op}: expected weight to have 3 to 5 dimensions, got shape {tuple(weight.shape)}")
    if x.dim() not in (spatial + 1, spatial + 2):
        raise ValueError(
            f"{op}: expected x to have {spatial + 1} or {spatial + 2} dimensions for a weight of"
            f" {spatial + 2}, got shape {tuple(x.shape)}"
        )
    return spatial


def check_range(op: str, name: str, active: int, full: int) -> None:
    if active < 1 or active > full:
        raise ValueError(f"{op}: expected {name} between 1 and {full}, got {active}")


def check_groups(op: str, name: str, channels: int, groups: int) -> None:
    if groups != 1 and (groups < 1 or channels % groups):
        raise ValueError(f"{op}: expected {name} to be a multiple of groups={groups}, got {channels}")


def per_dimension(op: str, name: str, value: int | Sequence[int], spatial: int, low: int) -> list[int]:
    """``value`` as one integer a spatial dimension."""
    values = [value] * spatial if isinstance(value, int) else list(value)
    if len(values) == 1:
        values *= spatial
    if len(values) != spatial or min(values) < low:
        raise ValueError(f"{op}: expected {name} to be {spatial} integers of at least {low}, got {value}")
    return values


def resolve_padding(
    op: str, padding: str, x: Tensor, kernel: Sequence[int], strides: list[int], dilations: list[int]
) -> tuple[Tensor, list[int]]:
    """``x`` and the symmetric padding that give "same" or "valid"; an odd total pads ``x`` by one more at the end."""
    if padding == "valid":
        return x, [0] * len(kernel)
    if padding != "same":
        raise ValueError(f"{op}: expected padding to be integers, 'same' or 'valid', got {padding!r}")
    if max(strides) > 1:
        raise ValueError(f"{op}: expected stride 1 with padding='same', got {strides}")
    totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    if any(total % 2 for total in totals):
        x = F.pad(x, [end for total in reversed(totals) for end in (0, total % 2)])
    return x, [total // 2 for total in totals]


def conv_output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    return [
        (s + 2 * p - d * (k - 1) - 1) // step + 1
        for s, k, step, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def same_dtype(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple:
    """The arguments in the dtype that autocast asks for, checked to agree."""
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias, residual = (None if t is None else t.to(dtype) for t in (bias, residual))
    check_same_dtype_device(op, x, weight=weight, bias=bias, residual=residual)
    return x, weight, bias, residual


def run_batched(run, args: tuple, activation: str, residual: Tensor | None, spatial: int) -> Tensor:
    """``run(*args, activation, residual)`` with a batch dimension lent to an unbatched ``args[0]``.

    An activation whose derivative needs its input is a node of its own when a gradient is needed: backward then has
    the input without computing the convolution twice.
    """
    x, weight, bias = args[:3]
    apart = activation not in OUTPUT_ACTIVATIONS and grad_needed(x, weight, bias, residual)
    fused = "none" if apart else activation
    if x.dim() == spatial + 2:
        y = run(*args, fused, residual)
    else:
        y = run(x.unsqueeze(0), *args[1:], fused, None if residual is None else residual.unsqueeze(0)).squeeze(0)
    return apply_activation(y, activation) if apart else y


def _fake(x, weight, bias, out_channels, stride, padding, dilation, groups, activation, residual):
    size = conv_output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    memory_format = reference.conv_memory_format(x, weight)
    shape = (x.shape[0], out_channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def conv_backward_fake(dy, x, weight, full_bias, need_dx, need_dw, need_db):
    dx = torch.empty(
        x.shape if need_dx else (0,) * x.dim(),
        dtype=x.dtype,
        device=x.device,
        memory_format=reference.conv_memory_format(x, weight),
    )
    return (
        dx if need_dx else dy.new_empty(0),
        torch.empty_like(weight) if need_dw else dy.new_empty(0),
        weight.new_empty(full_bias) if need_db else dy.new_empty(0),
    )


def _backward_fake(dy, x, weight, stride, padding, dilation, groups, need_dx, need_dw, need_db):
    return conv_backward_fake(dy, x, weight, weight.shape[0], need_dx, need_dw, need_db)


def _backward_slice_fake(dy, x, weight, stride, padding, dilation, groups, need_dx, need_dw, need_db):
    active = weight.narrow(0, 0, dy.shape[1]).narrow(1, 0, x.shape[1] // groups)
    dx, _, db = conv_backward_fake(dy, x, weight, dy.shape[1], need_dx, False, need_db)
    dw = active.clone(memory_format=suggest_memory_format(weight)) if need_dw else dy.new_empty(0)
    return dx, dw, db


def _backward_slice(dy, x, weight, stride, padding, dilation, groups, need_dx, need_dw, need_db):
    """Gradients of weight and bias of the active slice alone, by cutting the full ones of any device's kernel."""
    run = torch.ops.slimkernels.slim_conv_backward.default
    dx, dw, db = run(dy, x, weight, stride, padding, dilation, groups, need_dx, need_dw, need_db)
    if need_dw:
        dw = dw[: dy.shape[1], : x.shape[1] // groups].clone(memory_format=suggest_memory_format(weight))
    return dx, dw, db[: dy.shape[1]].clone() if need_db else db


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.out_channels, *ctx.geometry, ctx.activation, residual = inputs
    ctx.weight_slot, ctx.bias_slot = slot_of(weight), slot_of(bias)
    ctx.recipe = recipe_of(x)
    recompute = ctx.activation not in OUTPUT_ACTIVATIONS
    saved_output = None if recompute or ctx.activation == "none" else output
    # The gradient of x takes its sizes only: under a weight that is not trained x is not kept.
    ctx.layout = None if recompute or weight.requires_grad else (x.shape, x.stride())
    saved_x = None if ctx.recipe or ctx.layout else x
    ctx.save_for_backward(saved_x, weight, saved_output, *((bias, residual) if recompute else (None, None)))


def _backward(ctx, dy):
    x, weight, output, bias, residual = ctx.saved_tensors
    need_dx, need_dw, need_db, *_, need_dresidual = ctx.needs_input_grad
    if ctx.layout is not None:
        x = dy.new_empty_strided(*ctx.layout)
    elif ctx.recipe is not None:
        x = ctx.recipe.value()
    if ctx.activation not in OUTPUT_ACTIVATIONS:
        output = torch.ops.slimkernels.slim_conv.default(
            x, weight, bias, ctx.out_channels, *ctx.geometry, "none", residual
        )
    dz = activation_grad(dy, output, ctx.activation)
    slots = ctx.weight_slot, ctx.bias_slot
    run = torch.ops.slimkernels.slim_conv_backward.default
    if slots != (None, None):
        run = torch.ops.slimkernels.slim_conv_backward_slice.default
    dx, dw, db = run(dz, x, weight, *ctx.geometry, need_dx, need_dw, need_db)
    if slots != (None, None):
        dw = deposit(ctx.weight_slot, dw, weight.shape) if need_dw else None
        db = deposit(ctx.bias_slot, db, weight.shape[:1]) if need_db else None
    gradients = (dx if need_dx else None, dw if need_dw else None, db if need_db else None)
    return *gradients, *([None] * 6), dz if need_dresidual else None


define(
    "slim_conv(Tensor x, Tensor weight, Tensor? bias, SymInt out_channels, SymInt[] stride, SymInt[] padding,"
    " SymInt[] dilation, SymInt groups, str activation, Tensor? residual) -> Tensor",
    fake=_fake,
    default=reference.slim_conv,
)
define(
    "slim_conv_backward(Tensor dy, Tensor x, Tensor weight, SymInt[] stride, SymInt[] padding, SymInt[] dilation,"
    " SymInt groups, bool need_dx, bool need_dw, bool need_db) -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    default=reference.slim_conv_backward,
)
define(
    "slim_conv_backward_slice(Tensor dy, Tensor x, Tensor weight, SymInt[] stride, SymInt[] padding, SymInt[] dilation,"
    " SymInt groups, bool need_dx, bool need_dw, bool need_db) -> (Tensor, Tensor, Tensor)",
    fake=_backward_slice_fake,
    default=_backward_slice,
)
autograd("slim_conv", _backward, _setup_context)
on_gpu("slim_conv", "cuda_kernels.slim_conv_depthwise", "triton_kernels.slim_conv")
on_gpu("slim_conv_backward", "cuda_kernels.slim_conv_depthwise", "triton_kernels.slim_conv")
