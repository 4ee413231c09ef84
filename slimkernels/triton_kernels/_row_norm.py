"""Norms over the last dimension on GPUs: layer norm, and RMS norm as the same without a mean."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.triton_kernels._common import MULTIPROCESSORS, aligned, apply_activation, ceil_div, on_device
from slimkernels.triton_kernels._norm import before_activation, load_parameter, sum_partials, what_is_saved

# A row up to this size stays in registers from the statistics to the store; a longer one is read again in pieces.
WIDEST = 8192
# Backward keeps the sums of dw and db in registers too: rows wider than this would spill.
WIDEST_BACKWARD = 4096


def pick_tile(rows: int, c: int) -> tuple[int, int, int]:
    """Rows and features of a tile, and warps."""
    block_c = min(WIDEST, triton.next_power_of_2(c))
    # 2048 values are 16 a thread: several 16-byte loads at once, and registers for a few tiles of float32.
    block_m = min(max(1, 2048 // block_c), triton.next_power_of_2(rows))
    return block_m, block_c, max(4, block_c // 512)


@triton.jit(do_not_specialize=["M"])
def _row_norm_fwd_kernel(
    x_ptr,  # (M, C)
    weight_ptr,
    bias_ptr,
    residual_ptr,  # (M, C)
    y_ptr,  # (M, C), contiguous
    mean_ptr,  # (M,)
    invstd_ptr,  # (M,)
    M,
    C,
    stride_xm,
    stride_xc,
    stride_w,
    stride_b,
    stride_rm,
    stride_rc,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WHOLE: tl.constexpr,  # a row is one tile wide
    HAS_MEAN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x_rows = x_ptr + offs_m[:, None] * stride_xm
    mean = tl.zeros((BLOCK_M,), tl.float32)
    square = tl.zeros((BLOCK_M,), tl.float32)
    if WHOLE:
        offs_c = tl.arange(0, BLOCK_C)
        mask = mask_m[:, None] & (offs_c < C)[None, :]
        x = tl.load(x_rows + offs_c.to(tl.int64)[None, :] * stride_xc, mask=mask, other=0.0).to(tl.float32)
        if HAS_MEAN:
            mean = tl.sum(x, 1) / C
            # The mean is far from exact where it is large against the spread: what is left of it is taken off too.
            mean += tl.sum(tl.where(mask, x - mean[:, None], 0.0), 1) / C
        centred = tl.where(mask, x - mean[:, None], 0.0)
        square = tl.sum(centred * centred, 1)
    else:
        if HAS_MEAN:
            for _ in range(0, 2):  # the second takes what is left of the mean
                total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
                for first in range(0, C, BLOCK_C):
                    offs_c = first + tl.arange(0, BLOCK_C)
                    mask = mask_m[:, None] & (offs_c < C)[None, :]
                    x = tl.load(x_rows + offs_c.to(tl.int64)[None, :] * stride_xc, mask=mask, other=0.0)
                    total += tl.where(mask, x.to(tl.float32) - mean[:, None], 0.0)
                mean += tl.sum(total, 1) / C
        total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for first in range(0, C, BLOCK_C):
            offs_c = first + tl.arange(0, BLOCK_C)
            mask = mask_m[:, None] & (offs_c < C)[None, :]
            x = tl.load(x_rows + offs_c.to(tl.int64)[None, :] * stride_xc, mask=mask, other=0.0)
            centred = tl.where(mask, x.to(tl.float32) - mean[:, None], 0.0)
            total += centred * centred
        square = tl.sum(total, 1)
    invstd = tl.rsqrt(square / C + eps)
    if HAS_MEAN:
        tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(invstd_ptr + offs_m, invstd, mask=mask_m)

    for first in range(0, BLOCK_C if WHOLE else C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        mask = mask_m[:, None] & mask_c[None, :]
        if not WHOLE:
            x = tl.load(x_rows + offs_c.to(tl.int64)[None, :] * stride_xc, mask=mask, other=0.0).to(tl.float32)
        weight = load_parameter(weight_ptr, offs_c, stride_w, mask_c, HAS_WEIGHT, 1.0)
        bias = load_parameter(bias_ptr, offs_c, stride_b, mask_c, HAS_BIAS, 0.0)
        z = (x - mean[:, None]) * invstd[:, None] * weight[None, :] + bias[None, :]
        if HAS_RESIDUAL:
            residual = residual_ptr + offs_m[:, None] * stride_rm + offs_c.to(tl.int64)[None, :] * stride_rc
            z += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
        y = apply_activation(z, ACTIVATION).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs_m[:, None] * C + offs_c[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["M", "steps"])
def _row_norm_bwd_kernel(
    dy_ptr,  # (M, C)
    x_ptr,  # (M, C)
    mean_ptr,  # (M,)
    invstd_ptr,  # (M,)
    weight_ptr,
    bias_ptr,
    saved_ptr,  # (M, C): the output or the residual of forward
    dx_ptr,  # (M, C), contiguous
    dresidual_ptr,  # (M, C), contiguous
    partial_ptr,  # (programs, 2, C)
    M,
    C,
    steps,  # tiles of rows a program
    stride_dm,
    stride_dc,
    stride_xm,
    stride_xc,
    stride_w,
    stride_b,
    stride_sm,
    stride_sc,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVED: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DW: tl.constexpr,
    NEED_DB: tl.constexpr,
    NEED_DRESIDUAL: tl.constexpr,
):
    """Everything in one pass over rows that fit a tile: dx, dresidual, and this program's part of dw and db."""
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    weight = load_parameter(weight_ptr, offs_c, stride_w, mask_c, HAS_WEIGHT, 1.0)
    bias = load_parameter(bias_ptr, offs_c, stride_b, mask_c, HAS_BIAS, 0.0)
    dw = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for step in range(0, steps):
        offs_m = (tl.program_id(0).to(tl.int64) * steps + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_c[None, :]
        rows, columns = offs_m[:, None], offs_c.to(tl.int64)[None, :]
        x = tl.load(x_ptr + rows * stride_xm + columns * stride_xc, mask=mask, other=0.0).to(tl.float32)
        dz = tl.load(dy_ptr + rows * stride_dm + columns * stride_dc, mask=mask, other=0.0).to(tl.float32)
        invstd = tl.load(invstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        if HAS_MEAN:
            x -= tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        xhat = tl.where(mask, x * invstd, 0.0)
        saved = xhat
        if SAVED != "none":
            saved = tl.load(saved_ptr + rows * stride_sm + columns * stride_sc, mask=mask, other=0.0).to(tl.float32)
        dz = before_activation(dz, xhat, weight[None, :], bias[None, :], saved, ACTIVATION, SAVED)
        if NEED_DRESIDUAL:
            tl.store(dresidual_ptr + rows * C + columns, dz.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if NEED_DW:
            dw += dz * xhat
        if NEED_DB:
            db += dz
        if NEED_DX:
            g = dz * weight[None, :]
            dx = g - xhat * (tl.sum(g * xhat, 1) / C)[:, None]
            if HAS_MEAN:
                dx -= (tl.sum(g, 1) / C)[:, None]
            tl.store(dx_ptr + rows * C + columns, (dx * invstd).to(dx_ptr.dtype.element_ty), mask=mask)
    at = tl.program_id(0).to(tl.int64) * (2 * C) + offs_c
    if NEED_DW:
        tl.store(partial_ptr + at, tl.sum(dw, 0), mask=mask_c)
    if NEED_DB:
        tl.store(partial_ptr + C + at, tl.sum(db, 0), mask=mask_c)


def forward(
    x: Tensor,  # (*, c)
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
    has_mean: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # (*, c); mean and inverse standard deviation (*)
    c = x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32) if has_mean else None
    invstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    x2 = x.reshape(-1, c)
    residual2 = None if residual is None else residual.reshape(-1, c)
    m = x2.shape[0]
    block_m, block_c, warps = pick_tile(m, c)
    with on_device(x):
        _row_norm_fwd_kernel[(ceil_div(m, block_m),)](
            x2,
            weight,
            bias,
            residual2,
            y,
            mean,
            invstd,
            m,
            c,
            *x2.stride(),
            0 if weight is None else weight.stride(0),
            0 if bias is None else bias.stride(0),
            *((0, 0) if residual2 is None else residual2.stride()),
            eps,
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            WHOLE=c <= block_c,
            HAS_MEAN=has_mean,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            ACTIVATION=activation,
            num_warps=warps,
        )
    return y, mean, invstd


def backward(
    dy: Tensor,  # (*, c)
    x: Tensor,  # (*, c)
    mean: Tensor | None,  # (*)
    invstd: Tensor,  # (*)
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    residual: Tensor | None,
    activation: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``reference.slim_layer_norm.row_norm_backward``, for rows of at most ``WIDEST_BACKWARD`` features."""
    c = x.shape[-1]
    saved, saved_name = what_is_saved(output, residual)
    dy2, x2 = dy.reshape(-1, c), x.reshape(-1, c)
    saved2 = None if saved is None else saved.reshape(-1, c)
    m = x2.shape[0]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else dy.new_empty(0)
    dresidual = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dresidual else dy.new_empty(0)
    block_m, block_c, warps = pick_tile(m, c)
    # The sums of dw and db take as many registers again, and addresses of elements that are loaded one by one too: twice
    # the threads share the widest rows, and rows of ragged widths.
    warps = max(warps if aligned(dy2, x2, saved2, sizes=(c,)) else 8, block_c // 256)
    tiles = ceil_div(m, block_m)
    # Few partial sums: a program walks over many rows. Without them there is a program a tile.
    steps = ceil_div(tiles, 2 * MULTIPROCESSORS) if need_dw or need_db else 1
    programs = ceil_div(tiles, steps)
    partials = x.new_empty((programs, 2, c), dtype=torch.float32) if need_dw or need_db else None
    with on_device(x):
        _row_norm_bwd_kernel[(programs,)](
            dy2,
            x2,
            mean,
            invstd,
            weight,
            bias,
            saved2,
            dx if need_dx else None,
            dresidual if need_dresidual else None,
            partials,
            m,
            c,
            steps,
            *dy2.stride(),
            *x2.stride(),
            0 if weight is None else weight.stride(0),
            0 if bias is None else bias.stride(0),
            *((0, 0) if saved2 is None else saved2.stride()),
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            HAS_MEAN=mean is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            SAVED=saved_name,
            NEED_DX=need_dx,
            NEED_DW=need_dw,
            NEED_DB=need_db,
            NEED_DRESIDUAL=need_dresidual,
            num_warps=warps,
        )
    return dx, *sum_partials(partials, weight, bias, need_dw, need_db, dy), dresidual
