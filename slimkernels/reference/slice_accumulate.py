"""``slice_accumulate_`` in plain PyTorch: the specification, the fallback and the test oracle."""

from collections.abc import Sequence

import torch
from torch import Tensor


def slice_accumulate_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Adds every source to the leading slice of its target."""
    views = [t[tuple(slice(0, n) for n in s.shape)] for t, s in zip(targets, sources, strict=True)]
    torch._foreach_add_(views, [s.to(v.dtype) for v, s in zip(views, sources, strict=True)])
