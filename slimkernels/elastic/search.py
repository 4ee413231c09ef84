"""``search``: the sub-network with the best validation score within a limit, and the Pareto front."""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimkernels.elastic.cost import cost
from slimkernels.elastic.latency import latency_ms
from slimkernels.elastic.plan import Depth, Plan, Width, plan, unwrap
from slimkernels.elastic.result import Candidate, SearchResult
from slimkernels.elastic.width import width as at_width

METHODS = ("grid", "greedy", "evolution")
_POPULATION = 20
Genome = tuple[int, ...]  # level of every dimension, 0 the smallest


def search(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    max_params: float | None = None,
    max_macs: float | None = None,
    max_latency_ms: float | None = None,
    method: str = "grid",
    per_group: bool = False,
    widths: Sequence[float] | None = None,
    evaluations: int = 200,
    example_inputs: Any = None,
    seed: int = 0,
    log: str | os.PathLike | None = None,
) -> SearchResult:
    """The sub-network with the highest score within all limits: not merely the largest one that fits.

    Parameters and MACs are exact, in closed form. Latency is measured on this machine, with the caller's number of
    threads, on what ``deploy`` gives: the median of several runs on ``example_inputs``.

    - `grid`: every (width, depth) within the limits is scored.
    - `greedy`: from the full network on, every dimension is tried one step smaller; the best of these is where the next
      round starts, until the limits hold (without limits: until nothing is left to slim). AutoSlim's slimming.
    - `evolution`: NSGA-II on score and cost, through pymoo (``pip install 'slimkernels[search]'``).

    Batch norms run with the statistics that they have for a width: ``calibrate`` first (or within ``evaluate``, where
    those of different depths are wanted).

    Args:
        evaluate: (model at a candidate's width and depth, in eval mode, without gradients) -> score, higher is better.
        max_params, max_macs, max_latency_ms: limits; MACs are for the example inputs of ``convert``.
        per_group: search a width for every width dimension and a number of blocks for every stage (`greedy` and
            `evolution`), instead of one width and one depth.
        widths: ratios to choose from; None: the listed ones, or nine evenly spaced ones of a range and full width.
        evaluations: most networks that `evolution` looks at.
        example_inputs: as in ``convert``; needed for a limit of the latency.
        seed: of `evolution`.
        log: file that gets a line for every score as soon as it is known. Scores that it has from a search before, one
            that was interrupted say, are not computed again; it is for one model with one set of weights.

    Raises: ValueError when an argument does not fit, the log is of another model, a score is not finite, or a limit is
        impossible: the message says what the smallest sub-network costs; ImportError when `evolution` is asked for and pymoo
        is not installed.
    Source: Yu and Huang, AutoSlim (arXiv 1903.11728); Luo et al., Subnetwork-to-go (arXiv 2312.03464).
    """
    limits = {"params": max_params, "macs": max_macs, "latency_ms": max_latency_ms}
    if method not in METHODS:
        raise ValueError(f"search: expected method to be one of {', '.join(METHODS)}, got {method!r}")
    if per_group and method == "grid":
        raise ValueError("search: expected method 'greedy' or 'evolution' with per_group=True, got 'grid'")
    scored = _Scored(model, evaluate, _check_limits("search", limits), example_inputs, seed, _Log(log))
    space = _Space(plan(model), per_group, widths)
    _check_possible("search", scored, space)
    if method == "grid":
        for genome in space:
            scored.at(space, genome)
    elif method == "greedy":
        _greedy(scored, space)
    else:
        _evolve(scored, space, evaluations, seed)
    return SearchResult(list(scored.found.values()), scored.limits, scored.axes)


def largest(model: nn.Module, limits: Mapping[str, float | None], example_inputs: Any = None) -> tuple[float, Depth]:
    """Width and depth of the uniform sub-network with the most MACs (or parameters) that fits."""
    scored = _Scored(model, lambda _: 0.0, _check_limits("extract", limits), example_inputs, 0)
    space = _Space(plan(model), False, None)
    _check_possible("extract", scored, space)
    by_size = sorted(space, key=lambda genome: cost(model, *space.decode(genome))[::-1], reverse=True)
    genome = next(genome for genome in by_size if scored.fits(scored.priced(*space.decode(genome))))
    ratio, depth = space.decode(genome)
    assert isinstance(ratio, float)
    return ratio, depth


def _check_limits(where: str, limits: Mapping[str, float | None]) -> dict[str, float]:
    found = {axis: limit for axis, limit in limits.items() if limit is not None}
    for axis, limit in found.items():
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            raise ValueError(f"{where}: expected max_{axis} to be a positive number, got {limit!r}")
    return found


class _Space:
    """The sub-networks to choose from: per dimension the levels that differ in channels or blocks, ascending."""

    def __init__(self, known: Plan, per_group: bool, widths: Sequence[float] | None) -> None:
        self.known, self.per_group = known, per_group
        if widths is None:
            low, high = known.widths[0], known.widths[-1]
            widths = known.widths if known.listed else [low + (high - low) * i / 8 for i in range(9)]
            widths = [*widths, 1.0]
        ratios = sorted({known.check_ratio("search", w) for w in widths})
        if not ratios:
            raise ValueError("search: expected at least one width, got none")
        groups, stages = list(known.groups.values()), list(known.stages.values())
        of_width = [[g] for g in groups] if per_group else [groups]
        self.levels: list[list[Any]] = []
        for sliced in of_width:
            by_size = {tuple(g.active_units(r, known.divisor) for g in sliced): r for r in ratios}
            self.levels.append(list(by_size.values()))
        self.width_genes = len(self.levels)
        if per_group:
            self.levels += [list(range(1, len(stage.blocks) + 1)) for stage in stages]
        elif stages:
            most = max(len(stage.blocks) for stage in stages)
            depths = [k / most for k in range(1, most + 1)]
            by_size = {tuple(stage.active_blocks(d) for stage in stages): d for d in depths}
            self.levels.append(list(by_size.values()))

    @property
    def smallest(self) -> Genome:
        return (0,) * len(self.levels)

    @property
    def full(self) -> Genome:
        return tuple(len(levels) - 1 for levels in self.levels)

    def __iter__(self) -> Iterator[Genome]:
        return itertools.product(*(range(len(levels)) for levels in self.levels))

    def decode(self, genome: Genome) -> tuple[Width, Depth]:
        values = [levels[i] for levels, i in zip(self.levels, genome, strict=True)]
        ratios, depths = values[: self.width_genes], values[self.width_genes :]
        # One ratio for all is given as such: batch norms then know it.
        width = ratios[0] if len(set(ratios)) == 1 else dict(zip(self.known.groups, ratios, strict=True))
        if not depths:
            return width, None
        return width, dict(zip(self.known.stages, depths, strict=True)) if self.per_group else depths[0]


class _Log:
    """Scores that are kept in a file, a line of JSON each."""

    def __init__(self, path: str | os.PathLike | None) -> None:
        self.path = None if path is None else Path(path)
        self.kept: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            try:
                *lines, last = self.path.read_bytes().split(b"\n")
                found = [json.loads(line) for line in lines]
                self.kept = {self._key(entry["width"], entry["depth"]): entry for entry in found}
                wanted = {"params", "macs", "score"}
                if not all(wanted <= entry.keys() for entry in found) or (last and not last.startswith(b"{")):
                    raise KeyError
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"search: expected log to be the log of a search, got {self.path}") from None
            if last:  # an interruption while it was written; only a file known to be a log is changed
                os.truncate(self.path, sum(len(line) + 1 for line in lines))

    @staticmethod
    def _key(width: Width, depth: Depth) -> str:
        return json.dumps([width, depth], sort_keys=True)

    def score(self, candidate: Candidate) -> float | None:
        entry = self.kept.get(self._key(candidate.width, candidate.depth))
        if entry is not None and (entry["params"], entry["macs"]) != (candidate.params, candidate.macs):
            raise ValueError(
                f"search: expected log to be of this model, got one in which {candidate.name} costs"
                f" {entry['params']:,} parameters instead of {candidate.params:,} in {self.path}"
            )
        return None if entry is None else entry["score"]

    def add(self, candidate: Candidate, score: float) -> None:
        if self.path is None:
            return
        entry = {"width": candidate.width, "depth": candidate.depth, "params": candidate.params, "macs": candidate.macs}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry | {"score": score}) + "\n")


@dataclass
class _Scored:
    """Costs and scores of candidates, each measured once."""

    model: nn.Module
    evaluate: Callable[[nn.Module], float]
    limits: dict[str, float]
    example_inputs: Any
    seed: int
    log: _Log = field(default_factory=lambda: _Log(None))
    found: dict[Genome, Candidate] = field(default_factory=dict)  # those with a score
    latencies: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "latency_ms" in self.limits and self.example_inputs is None:
            raise ValueError("search: expected example_inputs, as max_latency_ms is given, got None")

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The costs that count: those with a limit, or MACs (parameters, where no layer's are known)."""
        return tuple(self.limits) or (("macs",) if plan(self.model).layers else ("params",))

    def priced(self, width: Width, depth: Depth, measure: bool = True) -> Candidate:
        """A candidate without a score. Latency is measured only where the other limits hold."""
        candidate = Candidate(width, depth, *cost(self.model, width, depth))
        if "latency_ms" not in self.limits or not (measure or self.fits(candidate)):
            return candidate
        key = repr((width, depth))
        if key not in self.latencies:
            self.latencies[key] = latency_ms(self.model, width, depth, self.example_inputs)
        return candidate.with_(latency_ms=self.latencies[key])

    def fits(self, candidate: Candidate) -> bool:
        costs = {axis: getattr(candidate, axis) for axis in self.limits}
        return all(costs[axis] is None or costs[axis] <= limit for axis, limit in self.limits.items())

    def at(self, space: _Space, genome: Genome, beyond: bool = False) -> Candidate | None:
        """The candidate with its score; None when it is over a limit, unless ``beyond``."""
        if genome not in self.found:
            candidate = self.priced(*space.decode(genome), measure=beyond)
            if not beyond and not self.fits(candidate):
                return None
            self.found[genome] = candidate.with_(score=self._score(candidate))
        found = self.found[genome]
        return found if beyond or self.fits(found) else None

    def _score(self, candidate: Candidate) -> float:
        known = self.log.score(candidate)
        if known is not None:
            return known
        inner = unwrap(self.model)
        with _evaluation(inner), torch.no_grad(), at_width(inner, candidate.width, candidate.depth):
            score = float(self.evaluate(self.model))
        if not math.isfinite(score):
            raise ValueError(f"search: expected evaluate to give a finite score, got {score} at {candidate.name}")
        self.log.add(candidate, score)
        return score


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_possible(where: str, scored: _Scored, space: _Space) -> None:
    least = scored.priced(*space.decode(space.smallest))
    for axis, limit in scored.limits.items():
        needed = getattr(least, axis)
        if needed > limit:
            raise ValueError(
                f"{where}: expected max_{axis} of at least {needed:,g}, what the smallest sub-network costs"
                f" ({least.name}: {least.costs}), got {limit:,g}"
                if axis == "latency_ms"
                else f"{where}: expected max_{axis} of at least {needed:,}, what the smallest sub-network costs"
                f" ({least.name}: {least.costs}), got {limit:,}"
            )


def _greedy(scored: _Scored, space: _Space) -> None:
    genome = space.full
    current = scored.at(space, genome, beyond=True)
    while current is not None and not (scored.limits and scored.fits(current)):
        smaller = [(*genome[:i], n - 1, *genome[i + 1 :]) for i, n in enumerate(genome) if n > 0]
        if not smaller:
            break
        tried = {g: c for g in smaller if (c := scored.at(space, g, beyond=True)) is not None}
        # Of equally good ones the cheapest.
        genome = max(tried, key=lambda g: (tried[g].score, [-getattr(tried[g], axis) for axis in scored.axes]))
        current = tried[genome]


def _evolve(scored: _Scored, space: _Space, evaluations: int, seed: int) -> None:
    try:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.problem import ElementwiseProblem
        from pymoo.operators.crossover.sbx import SBX
        from pymoo.operators.mutation.pm import PM
        from pymoo.operators.repair.rounding import RoundingRepair
        from pymoo.optimize import minimize
    except ImportError:
        raise ImportError("search: pymoo is not installed; type \"pip install 'slimkernels[search]'\"") from None

    class Problem(ElementwiseProblem):
        def __init__(self) -> None:
            super().__init__(
                n_var=len(space.levels),
                n_obj=1 + len(scored.axes),
                n_ieq_constr=len(scored.limits),
                xl=0,
                xu=torch.tensor(space.full).numpy(),
                vtype=int,
            )

        def _evaluate(self, x: Any, out: dict, *args: Any, **kwargs: Any) -> None:
            genome = tuple(int(v) for v in x)
            found = scored.at(space, genome)
            priced = found or scored.priced(*space.decode(genome))
            costs = [float(getattr(priced, axis)) for axis in scored.axes]
            # A network over a limit gets no score: the constraints decide among those.
            out["F"] = [0.0 if found is None else -found.score, *costs]
            out["G"] = [getattr(priced, axis) / limit - 1 for axis, limit in scored.limits.items()]

    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(len(levels), (_POPULATION,), generator=generator) for levels in space.levels]
    first = torch.stack(drawn, 1)
    first[0] = torch.tensor(space.smallest)
    first[1] = torch.tensor(space.full)
    repair = RoundingRepair()
    algorithm = NSGA2(
        pop_size=_POPULATION,
        sampling=first.numpy(),
        crossover=SBX(vtype=float, repair=repair),
        mutation=PM(vtype=float, repair=repair),
        eliminate_duplicates=True,
    )
    minimize(Problem(), algorithm, ("n_eval", max(evaluations, _POPULATION)), seed=seed, verbose=False)
