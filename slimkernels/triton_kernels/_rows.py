"""Tensors ``(N, c, *)`` as rows of channels, in any layout, and how rows and channels are cut into tiles."""

import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.triton_kernels._common import MULTIPROCESSORS, ceil_div


class Rows(NamedTuple):
    """How tensors of one shape are cut into batches of rows, and rows and channels into tiles."""

    batches: int
    rows: int  # of a batch
    channels: int
    inner: int  # places of an image
    form: str  # where row r of batch b begins: "flat" r * stride_l, "batch" b * stride_n + r * stride_l, or
    # "split" (r // inner) * stride_n + (r % inner) * stride_l
    block_r: int
    block_c: int
    warps: int

    @property
    def row_tiles(self) -> int:
        return ceil_div(self.rows, self.block_r)

    @property
    def channel_tiles(self) -> int:
        return ceil_div(self.channels, self.block_c)

    def splits(self) -> tuple[int, int]:
        """Into how many parts the rows of a batch are cut for a reduction, and how many tiles each part has."""
        wanted = ceil_div(4 * MULTIPROCESSORS, self.batches * self.channel_tiles)
        steps = ceil_div(self.row_tiles, min(wanted, 256))
        return ceil_div(self.row_tiles, steps), steps

    @property
    def index(self) -> tl.dtype:
        """Type of a row's number: a division of 64-bit numbers takes a hundred instructions."""
        return tl.int32 if self.rows + self.block_r < 2**31 else tl.int64

    def options(self, warps: int) -> dict[str, Any]:
        """What every kernel over tiles of rows and channels is launched with. Left to itself ptxas spills a few bytes of a
        ragged tile to fit one block more on a multiprocessor."""
        tiles = dict(BLOCK_R=self.block_r, BLOCK_C=self.block_c, FORM=self.form, INDEX=self.index, num_warps=warps)
        return tiles if torch.version.hip else tiles | {"maxnreg": min(255, 2048 // warps)}


def strides(t: Tensor | None) -> tuple[int, int, int]:
    """Of the image, of the place in it and of the channel; ``t`` is one of ``one_stride``'s."""
    if t is None:
        return 0, 0, 0
    places = [stride for size, stride in zip(t.shape[2:], t.stride()[2:], strict=True) if size > 1]
    return t.stride(0), places[-1] if places else 0, t.stride(1)


def has_one_stride(t: Tensor) -> bool:
    """Whether the places of an image, counted through, are one stride apart."""
    dims = [(size, stride) for size, stride in zip(t.shape[2:], t.stride()[2:], strict=True) if size > 1]
    return all(a[1] == b[1] * b[0] for a, b in itertools.pairwise(dims))


def one_stride(t: Tensor) -> Tensor:
    """``t``, or a contiguous copy where its layout is no order of images, places and channels."""
    return t if has_one_stride(t) else t.contiguous()


def new_output(x: Tensor) -> tuple[Tensor, Tensor]:
    """An output with the layout of ``x`` and what the kernel writes: the same, or a tensor to copy from."""
    y = torch.empty_like(x)
    return y, y if has_one_stride(y) else torch.empty_like(x, memory_format=torch.contiguous_format)


def rows_of(x: Tensor, *others: Tensor | None, batched: bool) -> Rows:
    """``batched``: statistics for each image (group norm), else for all together."""
    n, c = x.shape[:2]
    inner = x.numel() // (n * c)
    if batched:
        form = "batch"
    else:
        known = [strides(t) for t in (x, *others) if t is not None]
        flat = n == 1 or inner == 1 or all(image == inner * place for image, place, _ in known)
        form = "flat" if flat else "split"
    rows = inner if batched else n * inner
    # 2048 values are 16 a thread: several 16-byte loads at once.
    if x.stride(1) == 1:
        block_c = min(triton.next_power_of_2(c), 128 // x.element_size())  # a line of the cache
        block_r = min(triton.next_power_of_2(rows), 2048 // block_c)
    else:
        block_r = min(triton.next_power_of_2(rows), 2048)
        block_c = min(triton.next_power_of_2(c), 2048 // block_r)
    warps = max(1, min(4, block_r * block_c // 512))
    return Rows(n if batched else 1, rows, c, inner, form, block_r, block_c, warps)


def row_strides(t: Tensor | None, rows: Rows) -> tuple[int, int, int]:
    """Of the image, the row and the channel, as the kernels want them in this form."""
    image, place, channel = strides(t)
    if rows.form == "flat" and rows.inner == 1:
        place = image
    return image, place, channel


@triton.jit
def row_offsets(offs_r, batch, inner, stride_n, stride_l, FORM: tl.constexpr):
    if FORM == "flat":
        return offs_r.to(tl.int64) * stride_l
    if FORM == "batch":
        return batch.to(tl.int64) * stride_n + offs_r.to(tl.int64) * stride_l
    return (offs_r // inner).to(tl.int64) * stride_n + (offs_r % inner).to(tl.int64) * stride_l


@triton.jit
def place(C, parts, BLOCK_C: tl.constexpr):
    """Of this program: its part of all rows, the batch and the part of that batch, its channels and their mask."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    part = tl.program_id(0) // tiles_c
    offs_c = (tl.program_id(0) % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    return part, part // parts, part % parts, offs_c, offs_c < C


@triton.jit
def group_parts(offs_g, offs_p, C, splits, group_size, groups):
    """Of the groups ``offs_g`` of all batches, the parts ``offs_p`` (splits times channels): where, which split, and mask."""
    batch, first = offs_g // groups, offs_g % groups * group_size
    split = offs_p // group_size
    channel = first[:, None] + (offs_p % group_size)[None, :]
    at = (batch.to(tl.int64) * splits)[:, None] + split[None, :]
    return at * (2 * C) + channel, split, (split < splits)[None, :] & (channel < C)


def merge_tile(groups: int, parts: int) -> tuple[int, int]:
    """Groups and parts of a tile of a merging kernel: as many parts as there are, up to 64, and groups to fill it."""
    block_p = min(64, triton.next_power_of_2(parts))
    return min(1024 // block_p, 32, triton.next_power_of_2(groups)), block_p
