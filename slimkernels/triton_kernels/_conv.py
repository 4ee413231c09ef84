"""Convolutions as implicit matrix products on channels-last tensors: the kernels, and how they are launched.

1d is 2d of height 1. Rows are positions, columns channels, and the sum runs over taps of the kernel and input channels:
tap after tap where a group has at least 16 channels, all of them in one line (``FLAT``) where it has fewer.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.triton_kernels._common import (
    aligned,
    apply_activation,
    ceil_div,
    conv_precision,
    launch_options,
    on_device,
    pick_blocks,
    pick_splits,
    strides,
    tile_of,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POSITIONS = ["B", "ROWS_H", "ROWS_W", "SRC_H", "SRC_W", "DST_H", "DST_W", "pad_h", "pad_w"]
# Which of these a width makes multiples of 16 says nothing where rows are not loaded 16 bytes at once: there Triton does
# not look, or it would compile for each combination.
RAGGED = ["N", "C", "stride_wg", *(f"stride_{tensor}{part}" for tensor in "srdy" for part in "bhw")]


@triton.jit
def taps_of_phase(phase, K, pad, dilation, stride, step, MOST: tl.constexpr):
    """The taps that reach positions ``phase`` modulo ``stride`` of a transposed convolution: the first, and how many."""
    taps = tl.arange(0, MOST)
    reaches = (taps < K) & ((phase + pad - taps * dilation) % stride == 0)
    first = tl.min(tl.where(reaches, taps, K), 0)
    return first, tl.cdiv(K - first, step)


@triton.jit(do_not_specialize=POSITIONS)
def _slim_conv_kernel(
    src_ptr,  # (B, groups * C, SRC_H, SRC_W)
    weight_ptr,  # the parent, read through its strides
    bias_ptr,
    residual_ptr,  # like dst
    dst_ptr,  # (B, groups * N, DST_H, DST_W)
    B,
    ROWS_H,  # positions that one phase computes; without TRANSPOSED there is one phase, of all positions
    ROWS_W,
    SRC_H,
    SRC_W,
    DST_H,
    DST_W,
    N,
    C,
    KH,
    KW,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    step_h,  # distance of the taps of one phase
    step_w,
    delta_h,  # how far apart in src two such taps reach
    delta_w,
    stride_sb,
    stride_sc,
    stride_sh,
    stride_sw,
    stride_wg,
    stride_wn,
    stride_wc,
    stride_wh,
    stride_ww,
    stride_bn,
    stride_rb,
    stride_rn,
    stride_rh,
    stride_rw,
    stride_db,
    stride_dn,
    stride_dh,
    stride_dw,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MOST_TAPS: tl.constexpr,
    FLAT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of ``dst = act(conv(src, W) + bias + residual)``.

    ``TRANSPOSED`` gathers what a transposed convolution (the gradient of the input) scatters. Positions that are equal
    modulo the stride, a *phase*, are reached by the same taps: a program computes one phase and no tap in vain.
    """
    M = B * ROWS_H * ROWS_W
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    group = tl.program_id(1).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_w = offs_m % ROWS_W
    row_h = offs_m // ROWS_W % ROWS_H
    batch = (offs_m // ROWS_W // ROWS_H).to(tl.int64)
    if TRANSPOSED:
        phase_h = tl.program_id(2) // stride_w
        phase_w = tl.program_id(2) % stride_w
        first_h, count_h = taps_of_phase(phase_h, KH, pad_h, dilation_h, stride_h, step_h, MOST_TAPS)
        first_w, count_w = taps_of_phase(phase_w, KW, pad_w, dilation_w, stride_w, step_w, MOST_TAPS)
        dst_h, dst_w = row_h * stride_h + phase_h, row_w * stride_w + phase_w
        base_h = row_h + (phase_h + pad_h - first_h * dilation_h) // stride_h
        base_w = row_w + (phase_w + pad_w - first_w * dilation_w) // stride_w
    else:
        first_h, count_h, first_w, count_w = 0, KH, 0, KW
        dst_h, dst_w = row_h, row_w
        base_h, base_w = row_h * stride_h - pad_h, row_w * stride_w - pad_w
    mask_m = (offs_m < M) & (dst_h < DST_H) & (dst_w < DST_W)
    mask_n = offs_n < N
    at = batch * stride_sb + base_h.to(tl.int64) * stride_sh + base_w.to(tl.int64) * stride_sw
    src_rows = src_ptr + group * C * stride_sc + at
    w_columns = weight_ptr + group * stride_wg + offs_n.to(tl.int64) * stride_wn

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    taps = count_h * count_w
    line = tl.cdiv(C, BLOCK_K)
    for step in range(0, tl.cdiv(taps * C, BLOCK_K) if FLAT else taps * line):
        if FLAT:
            offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            tap = offs_k // C
            c = offs_k - tap * C
            mask_k = tap < taps
        else:
            tap = step // line
            c = (step - tap * line) * BLOCK_K + tl.arange(0, BLOCK_K)
            mask_k = c < C
        tap_h, tap_w = tap // count_w, tap % count_w
        kh, kw = first_h + tap_h * step_h, first_w + tap_w * step_w
        to_h, to_w = tap_h * delta_h, tap_w * delta_w
        src_k = c.to(tl.int64) * stride_sc + (to_h.to(tl.int64) * stride_sh + to_w.to(tl.int64) * stride_sw)
        w_k = c.to(tl.int64) * stride_wc + (kh.to(tl.int64) * stride_wh + kw.to(tl.int64) * stride_ww)
        if FLAT:
            src_h, src_w = base_h[:, None] + to_h[None, :], base_w[:, None] + to_w[None, :]
            inside = mask_m[:, None] & (src_h >= 0) & (src_h < SRC_H) & (src_w >= 0) & (src_w < SRC_W)
        else:
            src_h, src_w = base_h + to_h, base_w + to_w
            inside = (mask_m & (src_h >= 0) & (src_h < SRC_H) & (src_w >= 0) & (src_w < SRC_W))[:, None]
        src = tl.load(src_rows[:, None] + src_k[None, :], mask=inside & mask_k[None, :], other=0.0)
        w = tl.load(w_columns[None, :] + w_k[:, None], mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(src, w, acc, input_precision=PRECISION)

    mask = mask_m[:, None] & mask_n[None, :]
    channel = group * N + offs_n
    row_h, row_w = dst_h.to(tl.int64), dst_w.to(tl.int64)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + channel * stride_bn, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        at = batch * stride_rb + row_h * stride_rh + row_w * stride_rw
        residual = residual_ptr + at[:, None] + (channel * stride_rn)[None, :]
        acc += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    acc = apply_activation(acc, ACTIVATION)
    at = batch * stride_db + row_h * stride_dh + row_w * stride_dw
    tl.store(dst_ptr + at[:, None] + (channel * stride_dn)[None, :], acc.to(dst_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*POSITIONS, "rows_per_split"])
def _slim_conv_bwd_w_kernel(
    dy_ptr,  # (B, groups * N, ROWS_H, ROWS_W)
    src_ptr,  # (B, groups * C, SRC_H, SRC_W)
    dw_ptr,  # (splits, groups * N, C, KH, KW)
    B,
    ROWS_H,
    ROWS_W,
    SRC_H,
    SRC_W,
    N,
    C,
    KH,
    KW,
    rows_per_split,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    stride_yb,
    stride_yn,
    stride_yh,
    stride_yw,
    stride_sb,
    stride_sc,
    stride_sh,
    stride_sw,
    stride_ds,
    stride_dn,
    stride_dc,
    stride_dh,
    stride_dw,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the weight's gradient, ``BLOCK_N`` filters by ``BLOCK_C`` channels of a tap, over one split's rows."""
    taps = KH * KW
    line = tl.cdiv(C, BLOCK_C)
    columns = tl.cdiv(taps * C, BLOCK_C) if FLAT else taps * line
    pid_n, pid_c = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), columns, 8)
    split, group = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if FLAT:
        offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
        tap = offs_c // C
        c = offs_c - tap * C
        mask_c = tap < taps
    else:
        tap = pid_c // line
        c = (pid_c - tap * line) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = c < C
    kh, kw = tap // KW, tap % KW
    from_h, from_w = kh * dilation_h - pad_h, kw * dilation_w - pad_w
    channel = group * N + offs_n
    dy_columns = dy_ptr + channel * stride_yn
    src_c = (group * C + c) * stride_sc
    src_columns = src_ptr + src_c + (from_h.to(tl.int64) * stride_sh + from_w.to(tl.int64) * stride_sw)

    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    M = B * ROWS_H * ROWS_W
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    for step in range(0, tl.cdiv(rows_per_split, BLOCK_M)):
        offs_m = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < last
        row_w = offs_m % ROWS_W
        row_h = offs_m // ROWS_W % ROWS_H
        batch = (offs_m // ROWS_W // ROWS_H).to(tl.int64)
        base_h, base_w = row_h * stride_h, row_w * stride_w
        if FLAT:
            src_h, src_w = base_h[:, None] + from_h[None, :], base_w[:, None] + from_w[None, :]
            inside = mask_m[:, None] & (src_h >= 0) & (src_h < SRC_H) & (src_w >= 0) & (src_w < SRC_W)
        else:
            src_h, src_w = base_h + from_h, base_w + from_w
            inside = (mask_m & (src_h >= 0) & (src_h < SRC_H) & (src_w >= 0) & (src_w < SRC_W))[:, None]
        at = batch * stride_yb + row_h.to(tl.int64) * stride_yh + row_w.to(tl.int64) * stride_yw
        dy = tl.load(dy_columns[:, None] + at[None, :], mask=mask_n[:, None] & mask_m[None, :], other=0.0)
        at = batch * stride_sb + base_h.to(tl.int64) * stride_sh + base_w.to(tl.int64) * stride_sw
        src = tl.load(src_columns[None, :] + at[:, None], mask=inside & mask_c[None, :], other=0.0)
        acc = tl.dot(dy, src, acc, input_precision=PRECISION)

    dw_c = c.to(tl.int64) * stride_dc + (kh.to(tl.int64) * stride_dh + kw.to(tl.int64) * stride_dw)
    dw = dw_ptr + split.to(tl.int64) * stride_ds + (channel * stride_dn)[:, None] + dw_c[None, :]
    tl.store(dw, acc.to(dw_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_c[None, :])


def _ragged(kernel, *more: str):
    """The same kernel where nothing is aligned."""
    return triton.jit(do_not_specialize=[*POSITIONS, *RAGGED, *more])(kernel.fn)


_ragged_conv = _ragged(_slim_conv_kernel)
_ragged_bwd_w = _ragged(_slim_conv_bwd_w_kernel, "rows_per_split", "stride_ds", "stride_dn")


def takes(x: Tensor, dy: Tensor) -> bool:
    """Whether the kernels take a convolution from ``x`` to ``dy`` (or back): 1d and 2d, positions counted in 32 bits."""
    positions = max(t.numel() // max(t.shape[1], 1) for t in (x, dy))
    return x.dtype in DTYPES and x.dim() < 5 and x.numel() > 0 and dy.numel() > 0 and positions < 2**31 - 2**10


def as_2d(t: Tensor) -> Tensor:
    """A view with two spatial dimensions."""
    return t if t.dim() == 4 else t.unsqueeze(2)


def channels_dense(t: Tensor) -> Tensor:
    """``t`` in 2d with channels next to each other: itself, or a channels-last copy."""
    t = as_2d(t)
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous(memory_format=torch.channels_last)


def geometry_2d(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Stride, padding and dilation, each for height and width."""
    if len(stride) == 1:
        return 1, stride[0], 0, padding[0], 1, dilation[0]
    return stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]


def launch_conv(
    src: Tensor,  # (B, c, H, W)
    weight: Tensor,  # 2d; the parent
    dst: Tensor,  # (B, n, H, W), written
    geometry: tuple[int, ...],
    groups: int,
    transposed: bool,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> None:
    """``dst = act(conv(src) + residual)``: a convolution by ``weight[:n, :c / groups]``, or a transposed one by
    ``weight[:c, :n / groups]``."""
    c, n = src.shape[1] // groups, dst.shape[1] // groups
    kh, kw = weight.shape[2:]
    stride_h, stride_w, _, _, dilation_h, dilation_w = geometry
    steps, deltas = (1, 1), (dilation_h, dilation_w)
    if transposed:
        steps = stride_h // math.gcd(stride_h, dilation_h), stride_w // math.gcd(stride_w, dilation_w)
        deltas = -steps[0] * dilation_h // stride_h, -steps[1] * dilation_w // stride_w
    rows = (ceil_div(dst.shape[2], stride_h), ceil_div(dst.shape[3], stride_w)) if transposed else dst.shape[2:]
    along_n, along_c = (weight.stride(1), weight.stride(0)) if transposed else weight.stride()[:2]
    m = src.shape[0] * rows[0] * rows[1]
    flat = c < 16
    precision = conv_precision(src.dtype)
    vectors = not flat and aligned(src, weight, dst, residual, sizes=(c, n))
    most_n = 64 if src.element_size() == 4 else 128  # with the addresses of taps, larger float32 tiles would spill
    blocks = pick_blocks(m, n, c * kh * kw if flat else c, src.element_size(), precision, vectors, most_n)
    if src.element_size() == 4:  # as would larger parts of a tile a thread, and products that have two stages only
        blocks = blocks._replace(warps=8 if blocks.m * blocks.n > 64 * 64 else blocks.warps, stages=3)
    grid = (ceil_div(m, blocks.m) * ceil_div(n, blocks.n), groups, stride_h * stride_w if transposed else 1)
    with on_device(src):
        (_slim_conv_kernel if vectors else _ragged_conv)[grid](
            *(src, weight, bias, residual, dst, src.shape[0]),
            *rows,
            *src.shape[2:],
            *dst.shape[2:],
            *(n, c, kh, kw),
            *geometry,
            *steps,
            *deltas,
            *strides(src),
            (c if transposed else n) * weight.stride(0),
            along_n,
            along_c,
            *strides(weight)[2:],
            0 if bias is None else bias.stride(0),
            *((0, 0, 0, 0) if residual is None else strides(residual)),
            *strides(dst),
            BLOCK_M=blocks.m,
            BLOCK_N=blocks.n,
            BLOCK_K=blocks.k,
            MOST_TAPS=triton.next_power_of_2(max(kh, kw)),
            FLAT=flat,
            TRANSPOSED=transposed,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            ACTIVATION=activation,
            PRECISION=precision,
            **launch_options(blocks),
        )


def launch_weight_gradient(
    dy: Tensor,  # (B, n, H, W); of a transposed convolution: its input
    src: Tensor,  # (B, c, H, W); of a transposed convolution: its output's gradient
    dw: Tensor,  # the active slice (n, c / groups, kh, kw) of the gradient, written
    geometry: tuple[int, ...],
    groups: int,
) -> None:
    n, c = dy.shape[1] // groups, src.shape[1] // groups
    kh, kw = dw.shape[2:]
    m = dy.shape[0] * dy.shape[2] * dy.shape[3]
    flat = c < 16
    width = c * kh * kw if flat else c
    precision = conv_precision(src.dtype)
    vectors = not flat and aligned(dy, src, sizes=(c, n))
    blocks = pick_blocks(n, width, m, src.element_size(), precision, vectors)
    tiles = ceil_div(n, blocks.m) * ceil_div(width, blocks.n) * (1 if flat else kh * kw)
    splits = pick_splits(tiles * groups, m, blocks.k)
    rows = ceil_div(ceil_div(m, splits), blocks.k) * blocks.k
    target = dw.unsqueeze(0)
    if splits > 1:
        target = dw.new_empty((splits, dw.shape[0], kh, kw, c), dtype=torch.float32).permute(0, 1, 4, 2, 3)
    with on_device(src):
        (_slim_conv_bwd_w_kernel if vectors else _ragged_bwd_w)[(tiles, splits, groups)](
            *(dy, src, target, dy.shape[0], *dy.shape[2:], *src.shape[2:]),
            *(n, c, kh, kw, rows),
            *geometry,
            *strides(dy),
            *strides(src),
            *strides(target),
            BLOCK_M=blocks.k,
            BLOCK_N=blocks.m,
            BLOCK_C=blocks.n,
            FLAT=flat,
            PRECISION=precision,
            **launch_options(blocks),
        )
    if splits > 1:
        dw.copy_(target.sum(0))
