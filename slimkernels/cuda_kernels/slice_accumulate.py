"""``slice_accumulate_`` in CUDA C++: all slices in few launches."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.cuda_kernels import available, operators
from slimkernels.reference import slice_accumulate as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = 5


def slice_accumulate_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """As the reference of this name, one call of the kernel for each pair of dtypes; what it does not take composes ATen."""
    groups: dict[object, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for target, source in zip(targets, sources, strict=True):
        target, source = _in_order(target, source)
        taken = _fits(target.dtype, source.dtype) and source.is_contiguous() and source.dim() <= DIMS
        groups[(target.dtype, source.dtype, target.device) if taken and available() else None].append((target, source))
    for kind, pairs in groups.items():
        run = reference.slice_accumulate_ if kind is None else operators().slice_accumulate
        run([target for target, _ in pairs], [source for _, source in pairs])


def _in_order(target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Views of both with the dimensions in the order in which they lie in ``source``: channels-last becomes contiguous."""
    if source.is_contiguous():
        return target, source
    order = sorted(range(source.dim()), key=source.stride, reverse=True)
    return target.permute(order), source.permute(order)


def _fits(target: torch.dtype, source: torch.dtype) -> bool:
    return target in DTYPES and source in DTYPES and target in (source, torch.float32)
