"""``slice_accumulate_`` in CUDA C++: all slices in few launches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.cuda_kernels import available, operators
from slimkernels.reference import slice_accumulate as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = 5


def slice_accumulate_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """As the reference of this name; what the kernel does not take composes ATen."""
    kinds = {(t.dtype, s.dtype, t.device) for t, s in zip(targets, sources, strict=True)}
    fits = len(kinds) == 1 and all(_fits(*kind[:2]) for kind in kinds)
    if not (fits and available() and all(s.is_contiguous() and s.dim() <= DIMS for s in sources)):
        return reference.slice_accumulate_(targets, sources)
    operators().slice_accumulate(list(targets), list(sources))


def _fits(target: torch.dtype, source: torch.dtype) -> bool:
    return target in DTYPES and source in DTYPES and target in (source, torch.float32)
