"""What the Triton norm kernels share: the gradient of the activation, parameters, and the sum of partial gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.triton_kernels._common import apply_activation, ceil_div, on_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def takes(x: Tensor) -> bool:
    """Whether the kernels take ``x``: the launchers give float64 and empty tensors to the reference."""
    return x.dtype in DTYPES and x.numel() > 0


def what_is_saved(output: Tensor | None, residual: Tensor | None) -> tuple[Tensor | None, str]:
    """The tensor that backward reads beside ``x`` to differentiate the activation, and its name in the kernels."""
    if output is not None:
        return output, "output"
    return residual, "none" if residual is None else "residual"


@triton.jit
def activation_backward(dy, saved, ACTIVATION: tl.constexpr):
    """Gradient at the activation's input; ``saved`` is its input for gelu, silu and hardswish, else its output."""
    if ACTIVATION == "relu":
        dy = tl.where(saved > 0, dy, 0.0)
    elif ACTIVATION == "relu6":
        dy = tl.where((saved > 0) & (saved < 6), dy, 0.0)
    elif ACTIVATION == "elu":
        dy = tl.where(saved > 0, dy, dy * (saved + 1))
    elif ACTIVATION == "tanh":
        dy = dy * (1 - saved * saved)
    elif ACTIVATION == "sigmoid":
        dy = dy * saved * (1 - saved)
    elif ACTIVATION == "silu":
        gate = tl.sigmoid(saved)
        dy = dy * gate * (1 + saved * (1 - gate))
    elif ACTIVATION == "hardswish":
        slope = tl.where(saved > 3, 1.0, saved / 3 + 0.5)
        dy = tl.where(saved < -3, 0.0, dy * slope)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * saved * saved)
        dy = dy * (0.5 * (1 + tl.erf(saved * 0.7071067811865476)) + saved * density)
    elif ACTIVATION == "gelu_tanh":
        gate = tl.sigmoid(1.5957691216057308 * (saved + 0.044715 * saved * saved * saved))
        slope = 1.5957691216057308 * (1 + 0.134145 * saved * saved)
        dy = dy * gate * (1 + saved * (1 - gate) * slope)
    return dy


@triton.jit
def before_activation(dy, xhat, weight, bias, saved, ACTIVATION: tl.constexpr, SAVED: tl.constexpr):
    """Gradient at the activation's input, of the normalised ``xhat`` and what forward saved."""
    if ACTIVATION != "none":
        if SAVED == "output":
            dy = activation_backward(dy, saved, ACTIVATION)
        else:
            z = xhat * weight + bias
            if SAVED == "residual":
                z += saved
            if (
                ACTIVATION != "gelu"
                and ACTIVATION != "gelu_tanh"
                and ACTIVATION != "silu"
                and ACTIVATION != "hardswish"
            ):
                z = apply_activation(z, ACTIVATION)
            dy = activation_backward(dy, z, ACTIVATION)
    return dy


@triton.jit
def load_parameter(ptr, offs, stride, mask, GIVEN: tl.constexpr, absent):
    """A parameter's active entries in float32, or ``absent`` for each where there is none."""
    if GIVEN:
        return tl.load(ptr + offs.to(tl.int64) * stride, mask=mask, other=0.0).to(tl.float32)
    return tl.zeros(offs.shape, tl.float32) + absent


@triton.jit
def load_statistics(mean_ptr, spread_ptr, at, stride_m, stride_s, mask, eps, INVERSE: tl.constexpr):
    """Mean and inverse standard deviation in float32."""
    mean = tl.load(mean_ptr + at.to(tl.int64) * stride_m, mask=mask, other=0.0).to(tl.float32)
    spread = tl.load(spread_ptr + at.to(tl.int64) * stride_s, mask=mask, other=1.0).to(tl.float32)
    return mean, spread if INVERSE else tl.rsqrt(spread + eps)


@triton.jit
def load_channels(
    mean_ptr,
    spread_ptr,
    weight_ptr,
    bias_ptr,
    group,  # of each channel, among those of all batches
    offs_c,
    mask_c,
    stride_m,
    stride_s,
    stride_w,
    stride_b,
    eps,
    INVERSE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Mean, inverse standard deviation, weight and bias of some channels, in float32."""
    mean, invstd = load_statistics(mean_ptr, spread_ptr, group, stride_m, stride_s, mask_c, eps, INVERSE)
    weight = load_parameter(weight_ptr, offs_c, stride_w, mask_c, HAS_WEIGHT, 1.0)
    bias = load_parameter(bias_ptr, offs_c, stride_b, mask_c, HAS_BIAS, 0.0)
    return mean, invstd, weight, bias


@triton.jit(do_not_specialize=["P", "FULL"])
def _norm_bwd_w_kernel(
    partial_ptr,  # (P, 2, C) in float32: of the weight's gradient, and of the bias's
    dw_ptr,  # (FULL,)
    db_ptr,  # (FULL,)
    P,
    C,
    FULL,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NEED_DW: tl.constexpr,
    NEED_DB: tl.constexpr,
):
    """Sums the partial gradients in a fixed order; entries outside the slice become zero."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dw = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    db = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        at = partial_ptr + offs_p.to(tl.int64)[:, None] * (2 * C) + offs_c[None, :]
        mask = (offs_p < P)[:, None] & (offs_c < C)[None, :]
        if NEED_DW:
            dw += tl.load(at, mask=mask, other=0.0)
        if NEED_DB:
            db += tl.load(at + C, mask=mask, other=0.0)
    if NEED_DW:
        tl.store(dw_ptr + offs_c, tl.sum(dw, 0).to(dw_ptr.dtype.element_ty), mask=offs_c < FULL)
    if NEED_DB:
        tl.store(db_ptr + offs_c, tl.sum(db, 0).to(db_ptr.dtype.element_ty), mask=offs_c < FULL)


def sum_partials(
    partials: Tensor | None,  # (p, 2, c) in float32
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    need_dw: bool,
    need_db: bool,
    dy: Tensor,
) -> tuple[Tensor, Tensor]:  # (C,), (C,); an empty tensor where not needed
    """Gradients of weight and bias from the partial sums of a backward kernel."""
    dw, db = empty_gradients(weight, bias, need_dw, need_db, dy)
    if partials is not None:
        p, _, c = partials.shape
        full = max(dw.numel(), db.numel())
        block_p = min(64, triton.next_power_of_2(p))
        block_c = 32
        with on_device(dy):
            _norm_bwd_w_kernel[(ceil_div(full, block_c),)](
                partials,
                dw if need_dw else None,
                db if need_db else None,
                p,
                c,
                full,
                BLOCK_P=block_p,
                BLOCK_C=block_c,
                NEED_DW=need_dw,
                NEED_DB=need_db,
                num_warps=4,
            )
    return dw, db


def empty_gradients(
    weight: Tensor | None, bias: Tensor | None, need_dw: bool, need_db: bool, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """Full-size, contiguous and not yet written; empty where not needed."""
    dw = dy.new_empty(weight.shape, dtype=weight.dtype) if need_dw and weight is not None else dy.new_empty(0)
    db = dy.new_empty(bias.shape, dtype=bias.dtype) if need_db and bias is not None else dy.new_empty(0)
    return dw, db
