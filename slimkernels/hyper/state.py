"""Whether a generator's checkpoint belongs to a target."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_ROUNDING = 4e-3  # of fingerprints of weights rounded to 16 bits


@torch.no_grad()
def fingerprint(originals: Mapping[str, Tensor]) -> list[float]:
    """Two numbers a tensor that tell weights apart, in whatever order their channels are: the norm, and the sum over it."""
    numbers = []
    for w in originals.values():
        wide = w.detach().double()
        norm = wide.norm().clamp(min=1e-30)
        numbers += [float(norm), float(wide.sum() / norm)]
    return numbers


def changed(ours: Sequence[float], theirs: Sequence[float], names: Sequence[str]) -> str | None:
    """The first tensor whose fingerprints differ by more than rounding explains."""
    for i, name in enumerate(names):
        norm, other = ours[2 * i], theirs[2 * i]
        if abs(norm - other) > _ROUNDING * norm or abs(ours[2 * i + 1] - theirs[2 * i + 1]) > _ROUNDING:
            return name
    return None


def difference(ours: Any, theirs: Any) -> str:
    """The first entry in which two descriptions differ."""
    if isinstance(ours, dict):
        ours, theirs = ([list(item) for item in d.items()] for d in (ours, theirs))
    if not isinstance(ours, list):
        return f"{ours}, got {theirs}"
    if len(ours) != len(theirs):
        return f"in number {len(ours)}, got {len(theirs)}"
    mine, other = next((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
    return f"{mine}, got {other}"
