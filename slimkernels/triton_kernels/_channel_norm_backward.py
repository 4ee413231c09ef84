"""Norms over channels on GPUs, backward: the kernels of batch norm and group norm (see ``_channel_norm``)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.triton_kernels._common import ceil_div, on_device
from slimkernels.triton_kernels._norm import (
    before_activation,
    empty_gradients,
    load_channels,
    load_parameter,
    sum_partials,
    what_is_saved,
)
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


@triton.jit
def load_gradient(
    dy_ptr,
    x_ptr,
    saved_ptr,
    offs_r,
    columns,
    mask,
    batch,
    inner,
    mean,
    invstd,
    weight,
    bias,
    stride_dn,
    stride_dl,
    stride_dc,
    stride_xn,
    stride_xl,
    stride_xc,
    stride_sn,
    stride_sl,
    stride_sc,
    FORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVED: tl.constexpr,
):
    """Of one tile: the gradient at the activation's input, and the normalised input; both zero outside the mask."""
    at = row_offsets(offs_r, batch, inner, stride_dn, stride_dl, FORM)
    dz = tl.load(dy_ptr + at[:, None] + columns * stride_dc, mask=mask, other=0.0).to(tl.float32)
    at = row_offsets(offs_r, batch, inner, stride_xn, stride_xl, FORM)
    x = tl.load(x_ptr + at[:, None] + columns * stride_xc, mask=mask, other=0.0).to(tl.float32)
    xhat = tl.where(mask, (x - mean[None, :]) * invstd[None, :], 0.0)
    saved = xhat
    if SAVED != "none":
        at = row_offsets(offs_r, batch, inner, stride_sn, stride_sl, FORM)
        saved = tl.load(saved_ptr + at[:, None] + columns * stride_sc, mask=mask, other=0.0).to(tl.float32)
    return before_activation(dz, xhat, weight[None, :], bias[None, :], saved, ACTIVATION, SAVED), xhat


@triton.jit(do_not_specialize=["splits", "steps"])
def _channel_norm_bwd_sums_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,  # (batches, groups)
    spread_ptr,
    weight_ptr,
    bias_ptr,
    saved_ptr,
    partial_ptr,  # (batches * splits, 2, C): sums of dz * xhat and of dz
    ROWS,
    C,
    inner,
    splits,
    steps,
    group_size,
    groups,
    stride_dn,
    stride_dl,
    stride_dc,
    stride_xn,
    stride_xl,
    stride_xc,
    stride_w,
    stride_b,
    stride_sn,
    stride_sl,
    stride_sc,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FORM: tl.constexpr,
    INDEX: tl.constexpr,
    INVERSE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVED: tl.constexpr,
):
    part, batch, split, offs_c, mask_c = place(C, splits, BLOCK_C)
    columns = offs_c.to(tl.int64)[None, :]
    group = batch * groups + offs_c // group_size
    mean, invstd, weight, bias = load_channels(
        *(mean_ptr, spread_ptr, weight_ptr, bias_ptr, group, offs_c, mask_c, 1, 1, stride_w, stride_b),
        *(eps, INVERSE, HAS_WEIGHT, HAS_BIAS),
    )
    sum_xhat = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_dz = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    start = split.to(INDEX) * steps * BLOCK_R
    for step in range(0, steps):
        offs_r = start + step * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (offs_r < ROWS)[:, None] & mask_c[None, :]
        dz, xhat = load_gradient(
            *(dy_ptr, x_ptr, saved_ptr, offs_r, columns, mask, batch, inner, mean, invstd, weight, bias),
            *(stride_dn, stride_dl, stride_dc, stride_xn, stride_xl, stride_xc, stride_sn, stride_sl, stride_sc),
            *(FORM, ACTIVATION, SAVED),
        )
        sum_xhat += dz * xhat
        sum_dz += dz
    out = partial_ptr + part.to(tl.int64) * (2 * C) + offs_c
    tl.store(out, tl.sum(sum_xhat, 0), mask=mask_c)
    tl.store(out + C, tl.sum(sum_dz, 0), mask=mask_c)


@triton.jit(do_not_specialize=["FULL", "all_groups", "splits"])
def _channel_norm_bwd_merge_kernel(
    partial_ptr,  # (batches * splits, 2, C)
    weight_ptr,
    moments_ptr,  # (2, batches, groups): means over a group of g * xhat and of g, for g = dz * weight
    dw_ptr,  # (FULL,), of groups that are single channels of one batch
    db_ptr,  # (FULL,)
    ROWS,
    C,
    FULL,
    all_groups,
    splits,
    group_size,
    groups,
    stride_w,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEED_DW: tl.constexpr,
    NEED_DB: tl.constexpr,
):
    offs_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    mask_g = offs_g < all_groups
    first_c = offs_g % groups * group_size
    count = tl.minimum(C - first_c, group_size).to(tl.float32) * ROWS
    sum_xhat = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    sum_dz = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    moment_xhat = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    moment_dz = tl.zeros((BLOCK_G, BLOCK_P), tl.float32)
    for first in range(0, splits * group_size, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        at, _, mask = group_parts(offs_g, offs_p, C, splits, group_size, groups)
        mask = mask & mask_g[:, None]
        channel = first_c[:, None] + (offs_p % group_size)[None, :]
        weight = load_parameter(weight_ptr, channel, stride_w, mask, HAS_WEIGHT, 1.0)
        xhat = tl.load(partial_ptr + at, mask=mask, other=0.0)
        dz = tl.load(partial_ptr + C + at, mask=mask, other=0.0)
        sum_xhat += xhat
        sum_dz += dz
        moment_xhat += xhat * weight
        moment_dz += dz * weight
    if NEED_DW:
        tl.store(dw_ptr + offs_g, tl.sum(sum_xhat, 1).to(dw_ptr.dtype.element_ty), mask=offs_g < FULL)
    if NEED_DB:
        tl.store(db_ptr + offs_g, tl.sum(sum_dz, 1).to(db_ptr.dtype.element_ty), mask=offs_g < FULL)
    tl.store(moments_ptr + offs_g, tl.sum(moment_xhat, 1) / count, mask=mask_g)
    tl.store(moments_ptr + all_groups + offs_g, tl.sum(moment_dz, 1) / count, mask=mask_g)


@triton.jit(do_not_specialize=["row_tiles", "batches"])
def _channel_norm_bwd_x_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,  # (batches, groups)
    spread_ptr,
    weight_ptr,
    bias_ptr,
    saved_ptr,
    moments_ptr,  # (2, batches, groups)
    dx_ptr,
    dresidual_ptr,
    ROWS,
    C,
    inner,
    row_tiles,
    group_size,
    groups,
    batches,
    stride_dn,
    stride_dl,
    stride_dc,
    stride_xn,
    stride_xl,
    stride_xc,
    stride_w,
    stride_b,
    stride_sn,
    stride_sl,
    stride_sc,
    stride_on,  # of dx and dresidual
    stride_ol,
    stride_oc,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FORM: tl.constexpr,
    INDEX: tl.constexpr,
    INVERSE: tl.constexpr,
    CENTRED: tl.constexpr,  # the statistics depend on x
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVED: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DRESIDUAL: tl.constexpr,
):
    _, batch, tile, offs_c, mask_c = place(C, row_tiles, BLOCK_C)
    offs_r = tile.to(INDEX) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (offs_r < ROWS)[:, None] & mask_c[None, :]
    columns = offs_c.to(tl.int64)[None, :]
    group = batch * groups + offs_c // group_size
    mean, invstd, weight, bias = load_channels(
        *(mean_ptr, spread_ptr, weight_ptr, bias_ptr, group, offs_c, mask_c, 1, 1, stride_w, stride_b),
        *(eps, INVERSE, HAS_WEIGHT, HAS_BIAS),
    )
    dz, xhat = load_gradient(
        *(dy_ptr, x_ptr, saved_ptr, offs_r, columns, mask, batch, inner, mean, invstd, weight, bias),
        *(stride_dn, stride_dl, stride_dc, stride_xn, stride_xl, stride_xc, stride_sn, stride_sl, stride_sc),
        *(FORM, ACTIVATION, SAVED),
    )
    out = row_offsets(offs_r, batch, inner, stride_on, stride_ol, FORM)[:, None] + columns * stride_oc
    if NEED_DRESIDUAL:
        tl.store(dresidual_ptr + out, dz.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if NEED_DX:
        dx = dz * weight[None, :]
        if CENTRED:
            along = tl.load(moments_ptr + group, mask=mask_c, other=0.0)
            level = tl.load(moments_ptr + batches * groups + group, mask=mask_c, other=0.0)
            dx -= level[None, :] + xhat * along[None, :]
        tl.store(dx_ptr + out, (dx * invstd[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)


def backward(
    dy: Tensor,  # (N, c, *)
    x: Tensor,  # (N, c, *)
    mean: Tensor,  # (batches, groups)
    spread: Tensor,  # (batches, groups)
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    residual: Tensor | None,
    group_size: int,
    eps: float,
    inverse: bool,  # spread is the inverse standard deviation, not the variance
    batched: bool,  # statistics of each image
    centred: bool,  # the statistics depend on x
    activation: str,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    need_dresidual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual; an empty tensor where not needed."""
    saved, saved_name = what_is_saved(output, residual)
    given = dy, x
    dy, x = one_stride(dy), one_stride(x)
    saved = None if saved is None else one_stride(saved)
    dx, dx_work = new_output(given[1]) if need_dx else (dy.new_empty(0), None)
    dresidual, dresidual_work = new_output(given[1]) if need_dresidual else (dy.new_empty(0), None)
    out = dx_work if dx_work is not None else dresidual_work
    rows = rows_of(x, dy, saved, out, batched=batched)
    tensors = (dy, x, mean.contiguous(), spread.contiguous(), weight, bias, saved)
    steady = [*row_strides(dy, rows), *row_strides(x, rows)]
    steady += [0 if t is None else t.stride(0) for t in (weight, bias)]
    steady += row_strides(saved, rows)
    # Three tensors' tiles and the sums are held at once: twice as many threads as forward share them.
    flags = rows.options(2 * rows.warps) | dict(
        INVERSE=inverse,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        SAVED=saved_name,
    )
    groups = ceil_div(rows.channels, group_size)
    moments, dw, db = None, *empty_gradients(weight, bias, need_dw, need_db, dy)
    if need_dw or need_db or (need_dx and centred):
        partial = _sums(tensors, rows, group_size, groups, steady, eps, flags)
        if not batched or (need_dx and centred):
            moments = _merge(partial, weight, dw, db, rows, group_size, groups, need_dw, need_db)
        if batched and (need_dw or need_db):
            dw, db = sum_partials(partial, weight, bias, need_dw, need_db, dy)
    if out is not None:
        with on_device(x):
            _channel_norm_bwd_x_kernel[(rows.batches * rows.row_tiles * rows.channel_tiles,)](
                *tensors,
                moments,
                dx_work,
                dresidual_work,
                rows.rows,
                rows.channels,
                rows.inner,
                rows.row_tiles,
                group_size,
                groups,
                rows.batches,
                *steady,
                *row_strides(out, rows),
                eps,
                CENTRED=centred,
                NEED_DX=need_dx,
                NEED_DRESIDUAL=need_dresidual,
                **flags,
            )
    for whole, work in ((dx, dx_work), (dresidual, dresidual_work)):
        if work is not None and work is not whole:
            whole.copy_(work)
    return dx, dw, db, dresidual


def _sums(
    tensors: tuple, rows: Rows, group_size: int, groups: int, steady: list[int], eps: float, flags: dict
) -> Tensor:  # (batches * splits, 2, c)
    splits, steps = rows.splits()
    x = tensors[1]
    partial = x.new_empty((rows.batches * splits, 2, rows.channels), dtype=torch.float32)
    with on_device(x):
        _channel_norm_bwd_sums_kernel[(rows.batches * splits * rows.channel_tiles,)](
            *tensors,
            partial,
            rows.rows,
            rows.channels,
            rows.inner,
            splits,
            steps,
            group_size,
            groups,
            *steady,
            eps,
            **flags,
        )
    return partial


def _merge(
    partial: Tensor,
    weight: Tensor | None,
    dw: Tensor,
    db: Tensor,
    rows: Rows,
    group_size: int,
    groups: int,
    need_dw: bool,
    need_db: bool,
) -> Tensor:  # (2, batches, groups)
    """Moments of the groups; where they are single channels of one batch also dw and db."""
    all_groups = rows.batches * groups
    moments = partial.new_empty((2, all_groups))
    single = group_size == 1 and rows.batches == 1
    full = max(dw.numel(), db.numel())
    splits = partial.shape[0] // rows.batches
    block_g, block_p = merge_tile(all_groups, splits * group_size)
    with on_device(partial):
        _channel_norm_bwd_merge_kernel[(ceil_div(max(full, all_groups) if single else all_groups, block_g),)](
            partial,
            weight,
            moments,
            dw if need_dw else None,
            db if need_db else None,
            rows.rows,
            rows.channels,
            full,
            all_groups,
            splits,
            group_size,
            groups,
            0 if weight is None else weight.stride(0),
            BLOCK_G=block_g,
            BLOCK_P=block_p,
            HAS_WEIGHT=weight is not None,
            NEED_DW=need_dw and single,
            NEED_DB=need_db and single,
            num_warps=4,
        )
    return moments
