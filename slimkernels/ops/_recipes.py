"""Batch norm outputs that backward computes again instead of keeping.

A batch norm keeps its input; the convolution after it would keep its output, which is an affine function of that input and
an activation. Inside ``recomputed_outputs`` a batch norm leaves a ``Recipe`` on its output, and the ops that read the output
in backward keep the recipe. The value is the same to the bit: the same loop runs on the same statistics.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MOST_NORMS = 2  # that one recipe may run: outputs of residual sums need the output before
_active = 0


@contextmanager
def recomputed_outputs() -> Iterator[None]:
    """Inside it batch norms leave recipes. Leave it only when backward is over: it then frees what recipes hold."""
    global _active
    _active += 1
    try:
        yield
    finally:
        _active -= 1


class Recipe:
    """How a batch norm's output comes from its input ``x``, and from an output before it that was added."""

    __slots__ = ("cached", "keep", "norms", "options", "residual", "version", "versions", "x")

    def __init__(self, x: Tensor, options: tuple, residual: "Tensor | Recipe | None") -> None:
        self.x: Tensor | None = x.detach()
        self.options, self.residual = options, residual
        self.norms: int = 1 + (residual.norms if isinstance(residual, Recipe) else 0)
        self.keep = residual is not None  # its own norm reads the output too
        self.cached: Tensor | None = None
        self.version = -1  # of the output
        self.versions = [t._version for t in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        tensors = (self.x, self.residual, *self.options[:4])
        return [t for t in tensors if isinstance(t, Tensor)]

    def input(self) -> Tensor:
        """Has the sizes and strides of the output."""
        if self.x is None:
            raise RuntimeError("slim_batch_norm: expected one backward through the graph, got a second one")
        return self.x

    def value(self) -> Tensor:
        if self.cached is not None:
            return self.cached
        x = self.input()
        if self.versions != [t._version for t in self._tensors()]:
            raise RuntimeError(
                "slim_batch_norm: expected tensors needed for backward as they were, got one changed in place"
            )
        mean, var, weight, bias, eps, activation = self.options
        residual = self.residual.value() if isinstance(self.residual, Recipe) else self.residual
        run = torch.ops.slimkernels.slim_batch_norm.default
        y, _, _ = run(x, mean, var, weight, bias, False, eps, activation, residual)
        if self.keep:
            self.cached = y
        return y

    def release(self) -> None:
        """Its norm's backward is over, and with it every other use of the output."""
        self.cached = None
        if _active:
            self.x = self.residual = None


def leave_recipe(x: Tensor, y: Tensor, options: tuple, residual: Tensor | None) -> Recipe | None:
    """Leaves a recipe on ``y``, unless it would keep another tensor alive or run more than ``MOST_NORMS`` norms.

    ``options``: mean, variance, weight, bias, epsilon and activation.
    """
    if not _active or type(y) is not Tensor:  # a tracer's tensor
        return None
    if residual is None:
        found = Recipe(x, options, None)
    else:
        before = recipe_of(residual)
        if before is not None and before.norms < MOST_NORMS:
            found = Recipe(x, options, before)
        elif getattr(residual, "_slimkernels_kept", None) == residual._version:
            found = Recipe(x, options, residual.detach())
        else:
            y._slimkernels_kept = y._version  # type: ignore[attr-defined]
            return None
    found.version = y._version
    y._slimkernels_recipe = found  # type: ignore[attr-defined]
    return found


def recipe_of(t: Tensor) -> Recipe | None:
    """What a batch norm left on this very tensor, if nothing has changed it since."""
    found = getattr(t, "_slimkernels_recipe", None) if _active else None
    return found if found is not None and t._version == found.version else None
