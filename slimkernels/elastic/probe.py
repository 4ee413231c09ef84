"""Tries every width dimension out before it is believed.

The trace knows operations by name only: a reshape with sizes written into it, a channel shuffle, a sum over channels
would go wrong silently. So a converted copy runs at reduced width and must give what the plain network gives when
nothing takes the inactive channels in; and permuting the channels must not change the result. What fails is left alone,
with the reason.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.elastic.graph import Analysis
from slimkernels.elastic.slices import inverse, masked, permute
from slimkernels.elastic.trace import one_line, run
from slimkernels.elastic.transform import transform
from slimkernels.elastic.width import apply, assignments

# Relative to the norm of the output. Rounding of float32 stays below it through a hundred layers; a wrong channel is
# far above.
_TOLERANCE = 5e-5


class Prober:
    """Holds the plain analysis copy, its slimmable twin and the full output that all is compared with."""

    def __init__(self, model: nn.Module, example_inputs: Any, analysis: Analysis, permutes: bool) -> None:
        self.plain, self.example, self.analysis, self.permutes = model, example_inputs, analysis, permutes
        self.elastic = copy.deepcopy(model)
        transform(self.elastic, analysis.dims)
        self.dims = dict(analysis.dims)
        self.units = {name: group.units for name, group in analysis.groups.items()}
        with torch.no_grad():
            self.full = run(model, example_inputs)

    def reject_wrong(self) -> None:
        """Leave alone every group that gives a wrong result, alone or together with the others.

        Raises: ValueError when the model gives another output at every run, so that nothing can be compared.
        """
        for fractions in ((0.5,), (0.25, 0.75)):
            self._halve(list(self.analysis.groups), fractions)
            # Groups that are right one by one may be wrong together: the accepted ones once more, as a whole.
            while (names := list(self.analysis.groups)) and (reason := self._wrong(names, fractions)):
                self.analysis.reject({names[-1]}, reason)

    def _halve(self, names: list[str], fractions: Sequence[float]) -> None:
        reason = self._wrong(names, fractions) if names else None
        if reason is None:
            return
        if not self._repeatable():
            raise ValueError(
                "convert: expected a model in eval mode to give the same output twice, got two different ones"
            )
        if len(names) == 1:
            self.analysis.reject({names[0]}, reason)
            return
        self._halve(names[: len(names) // 2], fractions)
        self._halve(names[len(names) // 2 :], fractions)

    def _repeatable(self) -> bool:
        with torch.no_grad():
            return _difference(run(self.plain, self.example), self.full) is None

    @torch.no_grad()
    def _wrong(self, names: list[str], fractions: Sequence[float]) -> str | None:
        """Why the groups together are wrong, or None."""
        units = dict(self.units)
        for i, name in enumerate(names):
            units[name] = max(1, int(self.units[name] * fractions[i % len(fractions)]))
        try:
            apply(assignments(self.elastic, self.dims, units, None))
            actual = run(self.elastic, self.example)
        except Exception as error:
            return f"the network does not run when it is narrower ({one_line(error)})"
        with masked(self.plain, self.dims, units):
            expected = run(self.plain, self.example)
        difference = _difference(actual, expected)
        if difference is not None:
            return f"the narrower network is not a part of the full one ({difference})"
        return self._wrong_permuted(names) if self.permutes else None

    def _wrong_permuted(self, names: list[str]) -> str | None:
        generator = torch.Generator().manual_seed(0)
        orders = {name: torch.randperm(self.units[name], generator=generator).tolist() for name in names}
        permute(self.plain, self.dims, orders)
        try:
            difference = _difference(run(self.plain, self.example), self.full)
        finally:
            permute(self.plain, self.dims, {name: inverse(order) for name, order in orders.items()})
        return None if difference is None else f"the order of its channels matters ({difference})"


def _difference(actual: list[Tensor], expected: list[Tensor]) -> str | None:
    """What differs, or None when the outputs are the same up to rounding."""
    if len(actual) != len(expected):
        return f"{len(actual)} outputs instead of {len(expected)}"
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            return f"output of shape {tuple(a.shape)} instead of {tuple(e.shape)}"
        if e.numel() == 0:
            continue
        error = (a.double() - e.double()).norm().item()
        scale = e.double().norm().item()
        if not error <= _TOLERANCE * scale + 1e-12:
            return f"relative error {error / max(scale, 1e-300):.1g}"
    return None
