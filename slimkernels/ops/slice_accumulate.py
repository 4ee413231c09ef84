"""``slice_accumulate_``: many compact gradients added to the leading slices of full-size buffers, in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.ops._common import FLOAT_DTYPES, define, on_gpu
from slimkernels.reference import slice_accumulate as reference


def slice_accumulate_(
    targets: Sequence[Tensor],  # full-size buffers, of any strides; no memory twice
    sources: Sequence[Tensor],  # each of its target's number of dimensions, and nowhere larger
) -> None:
    """Adds each source to the leading slice of its target, in place.

    Equivalent to ``for t, s in zip(targets, sources): t[:s.shape[0], :s.shape[1], ...] += s``. On CUDA all slices go in one
    launch for 36 of them; nothing is read back. No gradient flows through it.

    Raises: ValueError when the counts, a shape or a device do not fit, TypeError when a dtype is not floating, or not
    the target's or float32 for the target.
    """
    if len(targets) != len(sources):
        raise ValueError(f"slice_accumulate_: expected sources of {len(targets)} tensors, got {len(sources)}")
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        fits = source.dim() == target.dim() and all(s <= t for s, t in zip(source.shape, target.shape, strict=True))
        if not fits:
            raise ValueError(
                f"slice_accumulate_: expected sources[{i}] of at most the shape {tuple(target.shape)} of its target, got"
                f" {tuple(source.shape)}"
            )
        if target.dtype not in FLOAT_DTYPES or source.dtype not in (target.dtype, *FLOAT_DTYPES[:3]):
            raise TypeError(
                f"slice_accumulate_: expected sources[{i}] of dtype {target.dtype} like its target, got {source.dtype}"
            )
        if source.dtype != target.dtype and target.dtype != torch.float32:
            raise TypeError(
                f"slice_accumulate_: expected sources[{i}] of dtype {target.dtype} like its target, got {source.dtype}"
            )
        if source.device != target.device:
            raise ValueError(
                f"slice_accumulate_: expected sources[{i}] on device {target.device} like its target, got {source.device}"
            )
    if targets:
        torch.ops.slimkernels.slice_accumulate_.default(list(targets), list(sources))


def _fake(targets, sources):
    return None


define(
    "slice_accumulate_(Tensor(a!)[] targets, Tensor[] sources) -> ()",
    fake=_fake,
    default=reference.slice_accumulate_,
)
on_gpu("slice_accumulate_", "cuda_kernels.slice_accumulate")
