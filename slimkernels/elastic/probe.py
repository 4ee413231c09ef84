"""Tries every width dimension out before it is believed.

The trace knows operations by name only: a reshape with sizes written into it, a channel shuffle, a sum over channels
would go wrong silently. So a converted copy runs at reduced width and must give what the plain network gives when
nothing takes the inactive channels in; and permuting the channels must not change the result. What fails is left alone,
with the reason.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from slimkernels._copy import deep_copy
from slimkernels.elastic.attention import ATTENTION, has_all_masks
from slimkernels.elastic.graph import Analysis
from slimkernels.elastic.layers import RECURRENT, kind_of
from slimkernels.elastic.parameters import unslice
from slimkernels.elastic.plan import Dim, Run
from slimkernels.elastic.recurrent import as_states, given_states, state_sizes
from slimkernels.elastic.slices import inverse, masked, number_side, permute
from slimkernels.elastic.trace import one_line, run
from slimkernels.elastic.transform import transform
from slimkernels.elastic.width import apply, assignments
from slimkernels.nn._base import SlimModule
from slimkernels.nn.attention import SlimMultiheadAttention

# Relative to the norm of the output. Beyond the first, which rounding seldom is, the same is done in float64.
_TOLERANCE = 1e-5
_DOUBLE_TOLERANCE = 1e-9
_STOPS = "the network does not run when it is narrower"
_SHAPE = "output of shape"


@dataclass
class _Pair:
    """The plain analysis copy, its slimmable twin, and the full output that all is compared with."""

    plain: nn.Module
    elastic: nn.Module
    example: Any
    full: list[Tensor]
    tolerance: float


class Prober:
    """Finds the groups that do not do what the trace says, and rejects them."""

    def __init__(self, model: nn.Module, example_inputs: Any, analysis: Analysis, permutes: bool) -> None:
        self.analysis, self.permutes = analysis, permutes
        self.dims = dict(analysis.dims)
        self.units = {name: group.units for name, group in analysis.groups.items()}
        elastic = deep_copy(model)
        transform(elastic, self.dims)
        with torch.no_grad():
            self.single = _Pair(model, elastic, example_inputs, run(model, example_inputs), _TOLERANCE)

    def reject_wrong(self) -> None:
        """Leave alone every group that gives a wrong result, alone or together with the others.

        Raises: ValueError when the model gives another output at every run, so that nothing can be compared.
        """
        for fractions in ((0.5,), (0.25, 0.75)):
            if self._fails(list(self.analysis.groups), fractions):
                self._reject_repeated(fractions)
                self._halve(list(self.analysis.groups), fractions)
            # Groups that are right one by one may be wrong together: the accepted ones once more, as a whole.
            while (names := list(self.analysis.groups)) and (reason := self._wrong(names, fractions)):
                self.analysis.reject({names[-1]}, reason)

    def find_numbers(self) -> None:
        """Whole numbers that modules keep of their size and use in a forward (``x.reshape(n, self.hidden_dim, -1)``): where
        the network does not run narrower without (or gives other shapes), and is right with one or all of that size, they
        follow the width."""
        names = list(self.analysis.groups)
        if not names or not self._stops(names):
            return
        for name in names:
            group = self.analysis.groups[name]
            found = self._kept(group.size)
            if not found or not self._stops([name]):
                continue
            runs = (Run(name, group.size, group.unit),)
            for some in [*([one] for one in found), *([found] if len(found) > 1 else [])]:
                tried = {key: Dim(*key, runs) for key in some}
                transform(self.single.elastic, tried)
                self.__dict__.pop("double", None)  # a copy of what was there before
                self.dims |= tried
                if not any(self._wrong([name], (fraction,)) for fraction in (0.5, 0.25, 0.75)):
                    self.analysis.dims |= tried
                    break
                for owner, side in tried:
                    del self.dims[owner, side]
                    unslice(self.single.elastic.get_submodule(owner), str(number_side(side)))
                self.__dict__.pop("double", None)

    def _stops(self, names: list[str]) -> bool:
        """Whether the network raises an exception when the groups are narrower, or gives outputs of other shapes."""
        reason = self._wrong(names, (0.5,)) or ""
        return reason.startswith(_STOPS) or _SHAPE in reason

    def _kept(self, size: int) -> list[tuple[str, str]]:
        """Numbers of that size in modules of the network's own, and in ``nn.Transformer``, which checks ``d_model``."""
        return [
            (name, f"number:{key}")
            for name, module in self.single.plain.named_modules()
            if isinstance(module, nn.Transformer) or not type(module).__module__.startswith("torch.nn.")
            if kind_of(module) is None
            for key, value in module.__dict__.items()
            if type(value) is int and value == size and (name, f"number:{key}") not in self.dims
        ]

    def _fails(self, names: list[str], fractions: Sequence[float]) -> str | None:
        reason = self._wrong(names, fractions) if names else None
        if reason is not None and not self._repeatable():
            raise ValueError("convert: expected a model in eval mode to give the same output twice, got different ones")
        return reason

    def _reject_repeated(self, fractions: Sequence[float]) -> None:
        """What fails in the first, the middle and the last of many equal blocks is taken to fail in all: a deep network would
        need a trial for each."""
        kinds: dict[tuple[str, int], list[str]] = {}
        for name in self.analysis.groups:
            kinds.setdefault((re.sub(r"\d+", "#", name), self.units[name]), []).append(name)
        for names in kinds.values():
            tried = (names[0], names[len(names) // 2], names[-1])
            if len(names) > 4 and all(reason := self._wrong([name], fractions) for name in tried):
                self.analysis.reject(set(names), f"{reason}, seen in {', '.join(tried)}")

    def _halve(self, names: list[str], fractions: Sequence[float]) -> None:
        reason = self._fails(names, fractions)
        if reason is None:
            return
        if len(names) == 1:
            self.analysis.reject({names[0]}, reason)
            return
        self._halve(names[: len(names) // 2], fractions)
        self._halve(names[len(names) // 2 :], fractions)

    @torch.no_grad()
    def _repeatable(self) -> bool:
        return _difference(run(self.single.plain, self.single.example), self.single.full, _TOLERANCE) is None

    @torch.no_grad()
    def _wrong(self, names: list[str], fractions: Sequence[float]) -> str | None:
        """Why the groups together are wrong, or None."""
        units = dict(self.units)
        for i, name in enumerate(names):
            units[name] = max(1, int(self.units[name] * fractions[i % len(fractions)]))
        try:
            reason = self._compare(self.single, names, units)
        except Exception as error:
            return f"{_STOPS} ({one_line(error)})"
        if reason is None or self.double is None:
            return reason
        # An ill-conditioned network can be that far off by rounding alone.
        return self._compare(self.double, names, units)

    @torch.no_grad()
    def states_of_full_size(self) -> list[str]:
        """Recurrent layers whose initial states the network writes at the full size, whatever the width, and attention layers
        whose masks it writes for all heads."""
        found: dict[str, None] = {}

        def listen(name: str, module: Any) -> Any:
            def hook(layer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
                if isinstance(layer, SlimMultiheadAttention):
                    found.update({name: None} if has_all_masks(layer, layer.heads, args, kwargs) else {})
                    return
                active = (
                    (layer.proj_width or layer.width, layer.width)
                    if hasattr(layer, "proj_width")
                    else (layer.width,) * 2
                )
                for state, full, n in zip(
                    as_states(given_states(args, kwargs)), state_sizes(layer), active, strict=False
                ):
                    if state.shape[-1] == full != n:
                        found[name] = None

            return module.register_forward_pre_hook(hook, with_kwargs=True)

        elastic = self.single.elastic
        layers = (*RECURRENT, *ATTENTION)
        hooks = [
            listen(n, m) for n, m in elastic.named_modules() if isinstance(m, layers) and isinstance(m, SlimModule)
        ]
        if hooks:
            units = {name: max(1, self.units[name] // 2) for name in self.analysis.groups}
            apply(assignments(elastic, self.analysis.dims, self.units | units, None))
            run(elastic, self.single.example)
        for hook in hooks:
            hook.remove()
        return list(found)

    @cached_property
    def double(self) -> _Pair | None:
        """The same in float64, or None where the model cannot."""
        plain, elastic = (deep_copy(model).double() for model in (self.single.plain, self.single.elastic))

        def to_double(t: Any) -> Any:
            return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t

        example = tree_map(to_double, self.single.example)
        try:
            apply(assignments(elastic, self.dims, self.units, None))
            run(elastic, example)
            return _Pair(plain, elastic, example, run(plain, example), _DOUBLE_TOLERANCE)
        except Exception:
            return None

    def _compare(self, pair: _Pair, names: list[str], units: dict[str, int]) -> str | None:
        apply(assignments(pair.elastic, self.dims, units, None))
        actual = run(pair.elastic, pair.example)
        spots = self.analysis.spots
        with masked(pair.plain, self.dims, units) if spots is None else spots.without(pair.plain, self.dims, units):
            expected = run(pair.plain, pair.example)
        difference = _difference(actual, expected, pair.tolerance)
        if difference is not None and spots is not None and spots.of:
            # The scale of an attention, or what a sum is divided by.
            with spots.numbers(pair.elastic) as numbers:
                run(pair.elastic, pair.example)
            with spots.without(pair.plain, self.dims, units, numbers):
                expected = run(pair.plain, pair.example)
            difference = _difference(actual, expected, pair.tolerance)
        if difference is not None:
            return f"the narrower network is not a part of the full one ({difference})"
        return self._compare_permuted(pair, names) if self.permutes else None

    def _compare_permuted(self, pair: _Pair, names: list[str]) -> str | None:
        generator = torch.Generator().manual_seed(0)
        orders = {name: torch.randperm(self.units[name], generator=generator).tolist() for name in names}
        permute(pair.plain, self.dims, orders)
        try:
            difference = _difference(run(pair.plain, pair.example), pair.full, pair.tolerance)
        finally:
            permute(pair.plain, self.dims, {name: inverse(order) for name, order in orders.items()})
        return None if difference is None else f"the order of its channels matters ({difference})"


def _difference(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> str | None:
    """What differs, or None when the outputs are the same up to rounding."""
    if len(actual) != len(expected):
        return f"{len(actual)} outputs instead of {len(expected)}"
    for a, e in zip(actual, expected, strict=True):
        if a.shape != e.shape:
            return f"{_SHAPE} {tuple(a.shape)} instead of {tuple(e.shape)}"
        if e.numel() == 0:
            continue
        error = (a.double() - e.double()).norm().item()
        scale = e.double().norm().item()
        if not error <= tolerance * scale + 1e-12:
            return f"relative error {error / max(scale, 1e-300):.1g}"
    return None
