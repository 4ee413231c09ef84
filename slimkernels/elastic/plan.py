"""The plan of an elastic model: its width dimensions, which slices of which layers they are, and what a width means."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

Width = float | Mapping[str, float]
Depth = float | Mapping[str, float] | None


def make_divisible(value: float, divisor: int, full: int) -> int:
    """``value`` rounded to a multiple of ``divisor``: at least one divisor, never over 10 % below ``value``, at most
    ``full``."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    if rounded < 0.9 * value:
        rounded += divisor
    return min(rounded, full)


@dataclass(frozen=True)
class WidthGroup:
    """One width dimension: ``units`` groups of channels that are switched on together, first ones first.

    A unit is one channel, or several where a grouped convolution or a group norm holds them together.
    """

    name: str  # of the layer that produces the channels (the first, where several are coupled)
    units: int
    unit: int  # channels a unit in the naming layer
    members: tuple[tuple[str, str], ...]  # (module, side) of every coupled dimension

    @property
    def size(self) -> int:
        return self.units * self.unit

    def step(self, divisor: int) -> int:
        """What a number of channels has to be a multiple of."""
        step = math.lcm(divisor, self.unit)
        return step if step <= self.size else self.unit

    def active_units(self, ratio: float, divisor: int) -> int:
        """Active units at ``ratio`` of the full width."""
        if ratio == 1.0:
            return self.units
        return make_divisible(ratio * self.size, self.step(divisor), self.size) // self.unit


@dataclass(frozen=True)
class Run:
    """Consecutive positions of one dimension: all units of a group in order, ``per_unit`` positions each; or, without
    group, fixed."""

    group: str | None
    size: int
    per_unit: int = 1

    def active(self, units: Mapping[str, int]) -> int:
        return self.size if self.group is None else units[self.group] * self.per_unit


@dataclass(frozen=True)
class Dim:
    """One sliced dimension of a module, as runs from the first position to the last."""

    module: str
    side: str
    runs: tuple[Run, ...]

    @property
    def size(self) -> int:
        return sum(run.size for run in self.runs)

    @property
    def groups(self) -> set[str]:
        return {run.group for run in self.runs if run.group is not None}

    @property
    def blocks(self) -> int:
        """Number of equal parts, each a leading slice; 0 when the dimension is no block slice (a gather is needed)."""
        return len(self.runs) if len(set(self.runs)) == 1 else 0

    def active(self, units: Mapping[str, int]) -> int:
        return sum(run.active(units) for run in self.runs)

    def positions(self, units: Mapping[str, int]) -> list[int]:
        """Active positions in the full dimension."""
        found: list[int] = []
        start = 0
        for run in self.runs:
            found.extend(range(start, start + run.active(units)))
            start += run.size
        return found

    def without(self, rejected: set[str]) -> "Dim":
        """The same dimension with the runs of rejected groups fixed."""
        runs = tuple(Run(None, r.size) if r.group in rejected else r for r in self.runs)
        return Dim(self.module, self.side, runs)


@dataclass(frozen=True)
class LayerCost:
    """What the closed form of ``cost`` needs of one layer: MACs at the active sizes = out x (in, without groups) x
    factor."""

    module: str
    size_in: int
    size_out: int
    grouped: bool
    factor: int
    sides: tuple[str, str] = ("in", "out")


@dataclass(frozen=True)
class ParameterCost:
    """Full number of elements of a parameter, and the dimensions it shrinks with."""

    numel: int
    dims: tuple[tuple[str, str], ...]
    owners: tuple[str, ...] = ()  # modules that have it


@dataclass(frozen=True)
class Stage:
    """A run of blocks of which the first ``d`` can be run alone: one depth dimension."""

    name: str  # of the container, or of the first block where a container has several stages
    blocks: tuple[str, ...]  # modules in order; the first is always run
    removable: bool = True  # whether the forward runs when skipped blocks are not there

    def active_blocks(self, ratio: float) -> int:
        """Blocks at ``ratio`` of the full depth: the nearest number, halves up, at least the first."""
        return max(1, int(ratio * len(self.blocks) + 0.5))


@dataclass
class Plan:
    """Everything the functions of ``slimkernels.elastic`` know of a model, by module names."""

    widths: tuple[float, ...] | list[float]  # (low, high) of a range, or the list of widths; ascending
    divisor: int
    norm: str  # shared | switchable | universal
    sort: str
    groups: dict[str, WidthGroup]
    dims: dict[tuple[str, str], Dim]
    left_alone: dict[str, str]  # module -> reason
    gathers: list[str]  # modules of which a width takes no leading slice (after a concat, before a gate)
    ignored: list[str] = field(default_factory=list)  # modules left alone as asked
    layers: list[LayerCost] = field(default_factory=list)
    parameters: list[ParameterCost] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stages: dict[str, Stage] = field(default_factory=dict)
    projections: dict[str, int] = field(default_factory=dict)  # LSTM with a projection -> its full size
    # Recurrent layers given states of the full size at every width, attention layers given masks for all heads.
    states: list[str] = field(default_factory=list)
    current: Any = 1.0
    current_depth: Any = None
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __deepcopy__(self, memo: dict) -> "Plan":
        # Only ``current``, ``current_depth`` and ``cache`` ever change; a cache holds modules of the tree it was made for.
        copied = Plan(**{k: v for k, v in self.__dict__.items() if k != "cache"})
        memo[id(self)] = copied
        return copied

    def __getstate__(self) -> dict:
        return self.__dict__ | {"cache": {}}

    @property
    def listed(self) -> bool:
        return isinstance(self.widths, list)

    @property
    def legal(self) -> str:
        """The widths a float may have, in words."""
        if self.listed and self.norm == "switchable":
            return "one of " + ", ".join(f"{w:g}" for w in sorted({*self.widths, 1.0}))
        low, high = self.widths[0], self.widths[-1]
        return f"between {low:g} and {high:g}" + ("" if high == 1.0 else ", or 1")

    def check_ratio(self, where: str, ratio: Any, of: str = "") -> float:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
            raise ValueError(f"{where}: expected a width{of} to be a number, {self.legal}, got {ratio!r}")
        ratio = float(ratio)
        if ratio == 1.0:
            return ratio
        if self.listed and self.norm == "switchable":
            for known in self.widths:
                if abs(known - ratio) < 1e-6:
                    return known
        elif self.widths[0] - 1e-9 <= ratio <= self.widths[-1] + 1e-9:
            return ratio
        raise ValueError(f"{where}: expected width{of} {self.legal}, got {ratio:g}")

    def ratios(self, where: str, width: Width) -> dict[str, float]:
        """Ratio of every group. Groups that a dict does not name are full; a group's own name goes before a glob, a
        later before an earlier.

        Raises: ValueError when a ratio is not legal, or a name fits no group.
        """
        if not isinstance(width, Mapping):
            ratio = self.check_ratio(where, width)
            return dict.fromkeys(self.groups, ratio)
        found = dict.fromkeys(self.groups, 1.0)
        exact = {key: ratio for key, ratio in width.items() if key in self.groups}
        for key, ratio in [*((k, r) for k, r in width.items() if k not in exact), *exact.items()]:
            ratio = self.check_ratio(where, ratio, f" of {key!r}")
            names = [key] if key in exact else self.matching(key)
            if not names:
                known = ", ".join(self.groups)
                raise ValueError(
                    f"{where}: expected the name of a width dimension or of a module (globs allowed), got {key!r};"
                    f" there are {known}"
                )
            found.update(dict.fromkeys(names, ratio))
        return found

    def matching(self, key: Any) -> list[str]:
        """Groups with a producing layer that is called ``key``, lies inside the module ``key``, or fits the glob."""
        return [
            group.name
            for group in self.groups.values()
            if isinstance(key, str)
            and any(
                matches(name, key)
                for name, side in group.members
                if side in ("out", "ch", "cell", "heads") or ":" in side
            )
        ]

    def units(self, where: str, width: Width) -> dict[str, int]:
        """Active units of every group at a width."""
        return self.units_at(self.ratios(where, width))

    def units_at(self, ratios: Mapping[str, float]) -> dict[str, int]:
        """Active units of every group at its ratio. Hidden units of an LSTM are more than its projection gives, as torch's
        own layer asks for: where the ratios leave fewer, they are raised to the next size above."""
        units = {name: group.active_units(ratios[name], self.divisor) for name, group in self.groups.items()}
        raised = True
        while raised:  # the hidden units of one layer can be the projection of another
            raised = False
            for module, full in self.projections.items():
                hidden, projected = (self.dims.get((module, side)) for side in ("cell", "state"))
                least = 1 + (full if projected is None else projected.active(units))
                if hidden is not None and hidden.active(units) < least:
                    (run,) = hidden.runs
                    group = self.groups[str(run.group)]
                    step = max(1, group.step(self.divisor) // group.unit)
                    units[group.name] = min(group.units, -(-least // (run.per_unit * step)) * step)
                    raised = True
        return units

    def depths(self, where: str, depth: Depth) -> dict[str, int]:
        """Blocks of every stage at a depth: a ratio for all stages, or a dict of blocks (int) or ratios (float) by the
        names or globs of stages; those it does not name are full, and so are all when it is None.

        Raises: ValueError when a ratio or number of blocks does not fit, or a name fits no stage.
        """
        full = {name: len(stage.blocks) for name, stage in self.stages.items()}
        if depth is None or depth == {} or (isinstance(depth, float) and depth == 1.0):
            return full
        if not self.stages:
            raise ValueError(
                f"{where}: expected no depth but 1.0, as the model has no elastic depth (convert with depth=True),"
                f" got {depth!r}"
            )
        if not isinstance(depth, Mapping):
            if not isinstance(depth, float) or not 0 < depth <= 1:
                raise ValueError(
                    f"{where}: expected depth to be a float in (0, 1] or a dict of blocks by stage, got {depth!r}"
                )
            return {name: stage.active_blocks(depth) for name, stage in self.stages.items()}
        exact = {key: asked for key, asked in depth.items() if key in self.stages}
        for key, asked in [*((k, v) for k, v in depth.items() if k not in exact), *exact.items()]:
            names = [key] if key in exact else [n for n in self.stages if isinstance(key, str) and matches(n, key)]
            if not names:
                known = ", ".join(self.stages)
                raise ValueError(
                    f"{where}: expected the name of a stage (globs allowed), got {key!r}; there are {known}"
                )
            for name in names:
                full[name] = self._blocks(where, self.stages[name], asked)
        return full

    def _blocks(self, where: str, stage: Stage, asked: Any) -> int:
        most = len(stage.blocks)
        if isinstance(asked, int) and not isinstance(asked, bool) and 1 <= asked <= most:
            return asked
        if isinstance(asked, float) and 0 < asked <= 1:
            return stage.active_blocks(asked)
        raise ValueError(
            f"{where}: expected depth of {stage.name!r} to be 1 to {most} blocks, or a float in (0, 1], got {asked!r}"
        )

    def skipped(self, where: str, depth: Depth) -> set[str]:
        """Names of the blocks that do not run at a depth."""
        found = self.depths(where, depth)
        return {block for name, stage in self.stages.items() for block in stage.blocks[found[name] :]}


def is_inside(name: str, blocks: Collection[str]) -> bool:
    """Whether a module is one of the blocks or a part of one."""
    return bool(blocks) and any(name == block or name.startswith(block + ".") for block in blocks)


def matches(name: str, pattern: str) -> bool:
    """Whether a module is called ``pattern``, is inside the module of that name, or fits it as a glob."""
    return name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)


def unwrap(model: nn.Module) -> nn.Module:
    """The module itself, out of torch.compile's and data-parallel's wrappers."""
    while "_elastic" not in model.__dict__:
        inner = model._modules.get("_orig_mod") or model._modules.get("module")
        if inner is None or not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def plan(model: nn.Module) -> Plan:
    """The plan of an elastic model.

    Raises: ValueError when the model was not made by ``convert``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"elastic: expected a model (nn.Module), got {type(model).__name__}")
    found = unwrap(model).__dict__.get("_elastic")
    if found is None:
        raise ValueError(f"elastic: expected a model made by elastic.convert, got a plain {type(model).__name__}")
    return found
