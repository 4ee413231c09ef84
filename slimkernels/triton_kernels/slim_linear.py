"""``slim_linear`` on GPUs: forward and gradients of a linear layer on the active block slice of a full-width weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.reference import slim_linear as reference
from slimkernels.triton_kernels._common import (
    aligned,
    apply_activation,
    block_index,
    ceil_div,
    launch_options,
    matmul_precision,
    on_device,
    pick_blocks,
    pick_splits,
    tile_of,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["M"])
def _slim_linear_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # the parent, read through its strides
    bias_ptr,
    residual_ptr,  # (M, N)
    y_ptr,  # (M, N)
    M,
    N,
    n_part,  # active entries of an out block
    n_full,  # all entries of an out block
    k_part,
    k_full,
    in_blocks,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bn,
    stride_rm,
    stride_rn,
    stride_ym,
    stride_yn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OUT_BLOCKED: tl.constexpr,
    IN_BLOCKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of ``y = act(x @ W.T + b + residual)``.

    The gradient of ``x`` is the same product, ``dx = dy @ W``: the launcher swaps the weight's strides and blocks.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    rows = block_index(offs_n, n_part, n_full, OUT_BLOCKED).to(tl.int64)
    offs_n = offs_n.to(tl.int64)
    x_rows = x_ptr + offs_m[:, None] * stride_xm
    w_rows = weight_ptr + rows[None, :] * stride_wn

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(k_part, BLOCK_K)
    for step in range(0, steps * in_blocks):
        block = step // steps if IN_BLOCKED else 0
        offs_k = (step - block * steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < k_part
        x_k = (block * k_part + offs_k).to(tl.int64)
        w_k = (block * k_full + offs_k).to(tl.int64)
        x = tl.load(x_rows + x_k[None, :] * stride_xk, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_rows + w_k[:, None] * stride_wk, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    mask = mask_m[:, None] & mask_n[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows * stride_bn, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        residual = residual_ptr + offs_m[:, None] * stride_rm + offs_n[None, :] * stride_rn
        acc += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    acc = apply_activation(acc, ACTIVATION)
    y = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def _slim_linear_bwd_w_kernel(
    dy_ptr,  # (M, N)
    x_ptr,  # (M, K)
    dw_ptr,  # the full-size gradient, or (splits, N, K) in float32
    M,
    N,
    K,
    rows_per_split,
    n_part,
    n_full,
    k_part,
    k_full,
    stride_dm,
    stride_dn,
    stride_xm,
    stride_xk,
    stride_ws,
    stride_wn,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OUT_BLOCKED: tl.constexpr,
    IN_BLOCKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of ``dW = dy.T @ x`` over the rows of one split."""
    pid_n, pid_k = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), 8)
    split = tl.program_id(1).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n, mask_k = offs_n < N, offs_k < K
    dy_columns = dy_ptr + offs_n.to(tl.int64)[:, None] * stride_dn
    x_columns = x_ptr + offs_k.to(tl.int64)[None, :] * stride_xk

    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    for step in range(0, tl.cdiv(rows_per_split, BLOCK_M)):
        offs_m = first + step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < last
        dy = tl.load(dy_columns + offs_m[None, :] * stride_dm, mask=mask_n[:, None] & mask_m[None, :], other=0.0)
        x = tl.load(x_columns + offs_m[:, None] * stride_xm, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)

    rows = block_index(offs_n, n_part, n_full, OUT_BLOCKED).to(tl.int64)
    columns = block_index(offs_k, k_part, k_full, IN_BLOCKED).to(tl.int64)
    dw = dw_ptr + split * stride_ws + rows[:, None] * stride_wn + columns[None, :] * stride_wk
    tl.store(dw, acc.to(dw_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_k[None, :])


def slim_linear(
    x: Tensor,  # (*, k)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,
    out_features: int,
    in_blocks: int,
    out_blocks: int,
    activation: str,
    residual: Tensor | None,  # (*, out_features)
) -> Tensor:  # (*, out_features)
    """Launcher of the forward kernel; what it cannot take (float64) composes ATen."""
    if x.dtype not in DTYPES:
        return reference.slim_linear(x, weight, bias, out_features, in_blocks, out_blocks, activation, residual)
    y = x.new_empty((*x.shape[:-1], out_features))
    x2 = x.reshape(-1, x.shape[-1])
    residual2 = None if residual is None else residual.reshape(-1, out_features)
    launch_product(
        x2,
        weight,
        y.view(-1, out_features),
        in_blocks,
        out_blocks,
        bias=bias,
        activation=activation,
        residual=residual2,
    )
    return y


def slim_linear_backward(
    dy: Tensor,  # (*, n)
    x: Tensor,  # (*, k)
    weight: Tensor,  # (N, K)
    in_blocks: int,
    out_blocks: int,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of the gradients; those of weight and bias have the full size, with zeros outside the slice."""
    if x.dtype not in DTYPES:
        return reference.slim_linear_backward(dy, x, weight, in_blocks, out_blocks, need_dx, need_dw, need_db)
    n, k = dy.shape[-1], x.shape[-1]
    dy2 = dy.reshape(-1, n)
    dx = dy.new_empty(0)
    if need_dx:
        dx = x.new_empty(x.shape)
        launch_product(dy2, weight.t(), dx.view(-1, k), out_blocks, in_blocks)
    dw = dy.new_empty(0)
    if need_dw:
        dw = weight.new_empty(weight.shape) if (n, k) == weight.shape else weight.new_zeros(weight.shape)
        launch_weight_gradient(dy2, x.reshape(-1, k), dw, in_blocks, out_blocks)
    db = dy.new_empty(0)
    if need_db:
        db = reference.block_unslice(dy2.sum(0), 0, weight.shape[0], out_blocks)
    return dx, dw, db


def launch_product(
    x: Tensor,  # (m, k)
    weight: Tensor,  # (N, K), any strides
    y: Tensor,  # (m, n), written
    in_blocks: int,
    out_blocks: int,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> None:
    (m, k), n = x.shape, y.shape[1]
    if m == 0:
        return
    precision = matmul_precision(x.dtype)
    vectors = aligned(x, weight, y, residual, sizes=(n // out_blocks, k // in_blocks))
    blocks = pick_blocks(m, n, k // in_blocks, x.element_size(), precision, vectors)
    with on_device(x):
        _slim_linear_kernel[(ceil_div(m, blocks.m) * ceil_div(n, blocks.n),)](
            x,
            weight,
            bias,
            residual,
            y,
            m,
            n,
            n // out_blocks,
            weight.shape[0] // out_blocks,
            k // in_blocks,
            weight.shape[1] // in_blocks,
            in_blocks,
            *x.stride(),
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            *((0, 0) if residual is None else residual.stride()),
            *y.stride(),
            BLOCK_M=blocks.m,
            BLOCK_N=blocks.n,
            BLOCK_K=blocks.k,
            OUT_BLOCKED=out_blocks > 1,
            IN_BLOCKED=in_blocks > 1,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            ACTIVATION=activation,
            PRECISION=precision,
            **launch_options(blocks),
        )


def launch_weight_gradient(
    dy: Tensor,  # (m, n)
    x: Tensor,  # (m, k)
    dw: Tensor,  # (N, K), the slice is written
    in_blocks: int,
    out_blocks: int,
) -> None:
    (m, n), k = dy.shape, x.shape[1]
    if m == 0:
        dw.zero_()
        return
    precision = matmul_precision(x.dtype)
    blocks = pick_blocks(n, k, m, x.element_size(), precision, aligned(dy, x, dw, sizes=(n, k)))
    tiles = ceil_div(n, blocks.m) * ceil_div(k, blocks.n)
    splits = pick_splits(tiles, m, blocks.k)
    rows = ceil_div(ceil_div(m, splits), blocks.k) * blocks.k
    parts = (n // out_blocks, dw.shape[0] // out_blocks, k // in_blocks, dw.shape[1] // in_blocks)
    target = dw.unsqueeze(0) if splits == 1 else x.new_empty((splits, n, k), dtype=torch.float32)
    with on_device(x):
        _slim_linear_bwd_w_kernel[(tiles, splits)](
            dy,
            x,
            target,
            m,
            n,
            k,
            rows,
            *parts,
            *dy.stride(),
            *x.stride(),
            *target.stride(),
            BLOCK_M=blocks.k,
            BLOCK_N=blocks.m,
            BLOCK_K=blocks.n,
            OUT_BLOCKED=splits == 1 and out_blocks > 1,
            IN_BLOCKED=splits == 1 and in_blocks > 1,
            PRECISION=precision,
            **launch_options(blocks),
        )
    if splits > 1:
        n_part, n_full, k_part, k_full = parts
        active = dw.view(out_blocks, n_full, in_blocks, k_full)[:, :n_part, :, :k_part]
        active.copy_(target.sum(0).view(out_blocks, n_part, in_blocks, k_part))
