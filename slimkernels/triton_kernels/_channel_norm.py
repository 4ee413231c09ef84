"""Norms over channels on GPUs, forward: the kernels of batch norm and group norm, in any layout.

A tensor ``(N, c, *)`` is seen as rows of channels: batch norm has one batch of ``N * L`` rows (``L`` places of an image),
group norm ``N`` batches of ``L`` rows. Statistics belong to a batch and a group of channels; batch norm's groups are
single channels. They are made in two passes with no atomics: each program reduces some rows of some channels, then the
parts are merged in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.triton_kernels._common import apply_activation, ceil_div, on_device
from slimkernels.triton_kernels._norm import load_channels
from slimkernels.triton_kernels._rows import (
    Rows,
    group_parts,
    merge_tile,
    new_output,
    one_stride,
    place,
    row_offsets,
    row_strides,
    rows_of,
)


@triton.jit(do_not_specialize=["splits", "steps"])
def _channel_norm_statistics_kernel(
    x_ptr,
    partial_ptr,  # (batches * splits, 2, C): mean and sum of squares around it
    ROWS,
    C,
    inner,
    splits,
    steps,  # tiles of rows a split
    stride_xn,
    stride_xl,
    stride_xc,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FORM: tl.constexpr,
    INDEX: tl.constexpr,
):
    part, batch, split, offs_c, mask_c = place(C, splits, BLOCK_C)
    columns = x_ptr + offs_c.to(tl.int64) * stride_xc
    start = split.to(INDEX) * steps * BLOCK_R
    # Everything is taken relative to the first row, so that values far from zero keep their digits.
    pivot = tl.load(columns + row_offsets(start, batch, inner, stride_xn, stride_xl, FORM), mask=mask_c, other=0.0)
    pivot = pivot.to(tl.float32)
    mean = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in range(0, steps):  # Welford's update, of each place of the tile for itself
        offs_r = start + step * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (offs_r < ROWS)[:, None] & mask_c[None, :]
        at = row_offsets(offs_r, batch, inner, stride_xn, stride_xl, FORM)
        x = tl.load(columns[None, :] + at[:, None], mask=mask, other=0.0).to(tl.float32) - pivot[None, :]
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / (step + 1))
        square += delta * (x - mean)
    here = tl.minimum(ROWS - start, steps * BLOCK_R)
    count = tl.maximum((here - tl.arange(0, BLOCK_R) + BLOCK_R - 1) // BLOCK_R, 0).to(tl.float32)[:, None]
    total = tl.sum(mean * count, 0) / here
    apart = mean - total[None, :]
    out = partial_ptr + part.to(tl.int64) * (2 * C) + offs_c
    tl.store(out, pivot + total, mask=mask_c)
    tl.store(out + C, tl.sum(square + count * apart * apart, 0), mask=mask_c)


@triton.jit(do_not_specialize=["all_groups", "splits", "rows_per_split"])
def _channel_norm_merge_kernel(
    partial_ptr,  # (batches * splits, 2, C)
    mean_ptr,  # (batches, groups)
    spread_ptr,  # (batches, groups): variance, or inverse standard deviation
    ROWS,
    C,
    all_groups,  # batches * groups
    splits,
    rows_per_split,
    group_size,
    groups,
    eps,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INVERSE: tl.constexpr,
):
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    mask_g = offs_g < all_groups
    count = tl.minimum(C - offs_g % groups * group_size, group_size).to(tl.float32) * ROWS
    first_at, _, first_mask = group_parts(offs_g, tl.arange(0, 1), C, splits, group_size, groups)
    pivot = tl.load(partial_ptr + first_at, mask=first_mask & mask_g[:, None], other=0.0)  # (BLOCK_G, 1)
    total = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    for first in range(0, splits * group_size, BLOCK_P):
        at, split, mask = group_parts(offs_g, first + tl.arange(0, BLOCK_P), C, splits, group_size, groups)
        mask = mask & mask_g[:, None]
        here = tl.minimum(ROWS - split.to(tl.int64) * rows_per_split, rows_per_split).to(tl.float32)[None, :]
        total += tl.where(mask, (tl.load(partial_ptr + at, mask=mask, other=0.0) - pivot) * here, 0.0)
    mean = pivot + (tl.sum(total, 1) / count)[:, None]
    square = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    for first in range(0, splits * group_size, BLOCK_P):
        at, split, mask = group_parts(offs_g, first + tl.arange(0, BLOCK_P), C, splits, group_size, groups)
        mask = mask & mask_g[:, None]
        here = tl.minimum(ROWS - split.to(tl.int64) * rows_per_split, rows_per_split).to(tl.float32)[None, :]
        apart = tl.load(partial_ptr + at, mask=mask, other=0.0) - mean
        square += tl.where(mask, tl.load(partial_ptr + C + at, mask=mask, other=0.0) + here * apart * apart, 0.0)
    spread = tl.sum(square, 1) / count
    if INVERSE:
        spread = tl.rsqrt(spread + eps)
    tl.store(mean_ptr + offs_g, tl.sum(mean, 1), mask=mask_g)
    tl.store(spread_ptr + offs_g, spread, mask=mask_g)


@triton.jit(do_not_specialize=["row_tiles"])
def _channel_norm_fwd_kernel(
    x_ptr,
    mean_ptr,  # (batches, groups), or running statistics
    spread_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    mean_copy_ptr,  # (C,): what backward reads when running statistics were used
    spread_copy_ptr,
    ROWS,
    C,
    inner,
    row_tiles,
    group_size,
    groups,
    stride_xn,
    stride_xl,
    stride_xc,
    stride_m,
    stride_s,
    stride_w,
    stride_b,
    stride_rn,
    stride_rl,
    stride_rc,
    stride_yn,
    stride_yl,
    stride_yc,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FORM: tl.constexpr,
    INDEX: tl.constexpr,
    INVERSE: tl.constexpr,
    COPY_STATISTICS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    part, batch, tile, offs_c, mask_c = place(C, row_tiles, BLOCK_C)
    offs_r = tile.to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (offs_r < ROWS)[:, None] & mask_c[None, :]
    columns = offs_c.to(tl.int64)[None, :]
    at = row_offsets(offs_r, batch, inner, stride_xn, stride_xl, FORM)
    x = tl.load(x_ptr + at[:, None] + columns * stride_xc, mask=mask, other=0.0).to(tl.float32)
    group = batch * groups + offs_c // group_size
    mean, invstd, weight, bias = load_channels(
        *(mean_ptr, spread_ptr, weight_ptr, bias_ptr, group, offs_c, mask_c, stride_m, stride_s, stride_w, stride_b),
        *(eps, INVERSE, HAS_WEIGHT, HAS_BIAS),
    )
    if COPY_STATISTICS and part == 0:
        tl.store(mean_copy_ptr + offs_c, mean, mask=mask_c)
        spread = tl.load(spread_ptr + group.to(tl.int64) * stride_s, mask=mask_c, other=1.0).to(tl.float32)
        tl.store(spread_copy_ptr + offs_c, spread, mask=mask_c)
    z = (x - mean[None, :]) * (weight * invstd)[None, :] + bias[None, :]
    if HAS_RESIDUAL:
        at = row_offsets(offs_r, batch, inner, stride_rn, stride_rl, FORM)
        z += tl.load(residual_ptr + at[:, None] + columns * stride_rc, mask=mask, other=0.0).to(tl.float32)
    at = row_offsets(offs_r, batch, inner, stride_yn, stride_yl, FORM)
    y = apply_activation(z, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at[:, None] + columns * stride_yc, y, mask=mask)


def forward(
    x: Tensor,  # (N, c, *)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    residual: Tensor | None,  # (N, c, *)
    running: tuple[Tensor, Tensor] | None,  # mean and variance, used in place of those of x
    group_size: int,
    eps: float,
    inverse: bool,  # the second statistic is the inverse standard deviation, not the variance
    batched: bool,  # statistics of each image
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # (N, c, *); the statistics (batches, groups), or (c,) of the running ones
    y, y_work = new_output(x)
    x = one_stride(x)
    residual = None if residual is None else one_stride(residual)
    rows = rows_of(x, residual, y_work, batched=batched)
    if running is None:
        used, copies = statistics(x, rows, group_size, eps, inverse), None
        saved = used
    else:
        used = running
        saved = copies = (
            x.new_empty(rows.channels, dtype=torch.float32),
            x.new_empty(rows.channels, dtype=torch.float32),
        )
    normalize(x, *used, weight, bias, residual, y_work, copies, rows, group_size, eps, inverse, activation)
    return y if y_work is y else y.copy_(y_work), *saved


def statistics(x: Tensor, rows: Rows, group_size: int, eps: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """Mean, and variance or inverse standard deviation, each (batches, groups) in float32."""
    c = rows.channels
    groups = ceil_div(c, group_size)
    splits, steps = rows.splits()
    partial = x.new_empty((rows.batches * splits, 2, c), dtype=torch.float32)
    mean, spread = (x.new_empty((rows.batches, groups), dtype=torch.float32) for _ in range(2))
    with on_device(x):
        _channel_norm_statistics_kernel[(rows.batches * splits * rows.channel_tiles,)](
            x,
            partial,
            rows.rows,
            c,
            rows.inner,
            splits,
            steps,
            *row_strides(x, rows),
            **rows.options(rows.warps),
        )
        block_g, block_p = merge_tile(rows.batches * groups, splits * group_size)
        _channel_norm_merge_kernel[(ceil_div(rows.batches * groups, block_g),)](
            partial,
            mean,
            spread,
            rows.rows,
            c,
            rows.batches * groups,
            splits,
            steps * rows.block_r,
            group_size,
            groups,
            eps,
            BLOCK_G=block_g,
            BLOCK_P=block_p,
            INVERSE=inverse,
            num_warps=4,
        )
    return mean, spread


def normalize(
    x: Tensor,
    mean: Tensor,  # (batches, groups), or (C,) of running statistics
    spread: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,  # written
    copies: tuple[Tensor, Tensor] | None,  # (c,) each: written where given
    rows: Rows,
    group_size: int,
    eps: float,
    inverse: bool,
    activation: str,
) -> None:
    """``y = act((x - mean) * invstd * weight + bias + residual)``."""
    mean_copy, spread_copy = copies or (None, None)
    with on_device(x):
        _channel_norm_fwd_kernel[(rows.batches * rows.row_tiles * rows.channel_tiles,)](
            x,
            mean,
            spread,
            weight,
            bias,
            residual,
            y,
            mean_copy,
            spread_copy,
            rows.rows,
            rows.channels,
            rows.inner,
            rows.row_tiles,
            group_size,
            ceil_div(rows.channels, group_size),
            *row_strides(x, rows),
            mean.stride(-1),
            spread.stride(-1),
            0 if weight is None else weight.stride(0),
            0 if bias is None else bias.stride(0),
            *row_strides(residual, rows),
            *row_strides(y, rows),
            eps,
            INVERSE=inverse,
            COPY_STATISTICS=copies is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            ACTIVATION=activation,
            **rows.options(rows.warps),
        )
