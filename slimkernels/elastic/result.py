"""What ``search`` found: the best sub-network, the Pareto front, as objects, CSV and plot."""

import csv
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from slimkernels.elastic.plan import Depth, Width

_LABELS = {"params": "parameters", "macs": "multiply-accumulates", "latency_ms": "ms for a forward"}


@dataclass(frozen=True)
class Candidate:
    """One sub-network: ``width`` and ``depth`` as ``set_width`` and ``extract`` take them, costs and score."""

    width: Width
    depth: Depth
    params: int
    macs: int
    latency_ms: float | None = None
    score: float = math.nan

    def with_(self, **changes: Any) -> "Candidate":
        return replace(self, **changes)

    @property
    def name(self) -> str:
        shown = f"width {_shown(self.width)}"
        return shown if self.depth is None else f"{shown}, depth {_shown(self.depth)}"

    @property
    def costs(self) -> str:
        found = f"{self.params:,} parameters, {self.macs:,} MACs"
        return found if self.latency_ms is None else f"{found}, {self.latency_ms:.3g} ms"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return json.dumps({name: round(ratio, 6) for name, ratio in value.items()})
    return "" if value is None else f"{value:g}"


@dataclass(frozen=True)
class SearchResult:
    """Every sub-network that was scored."""

    tried: list[Candidate]
    limits: dict[str, float]  # of params, macs, latency_ms: those that were asked for
    axes: tuple[str, ...]  # the costs that the front weighs against the score

    def fits(self, candidate: Candidate) -> bool:
        """Whether a candidate is within all limits."""
        return all(getattr(candidate, axis) <= limit for axis, limit in self.limits.items())

    @property
    def best(self) -> Candidate:
        """The highest score within the limits; of equal ones the cheapest."""
        fitting = [c for c in self.tried if self.fits(c)]
        return max(fitting, key=lambda c: (c.score, [-getattr(c, axis) for axis in self.axes]))

    @property
    def front(self) -> list[Candidate]:
        """The candidates that no other one beats in score and all of ``axes``, cheapest first."""
        found: list[Candidate] = []
        for c in sorted(self.tried, key=self._ordered):
            if not any(self._at_least_as_good(other, c) for other in found):
                found.append(c)
        return found

    def _ordered(self, c: Candidate) -> tuple:
        return (*(getattr(c, axis) for axis in self.axes), -c.score)

    def _at_least_as_good(self, a: Candidate, b: Candidate) -> bool:
        return a.score >= b.score and all(getattr(a, axis) <= getattr(b, axis) for axis in self.axes)

    def to_csv(self, path: str | os.PathLike) -> None:
        """Every candidate, cheapest first; the columns ``front``, ``within`` (the limits) and ``best`` hold 0 or 1."""
        front, best = self.front, self.best
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["width", "depth", "params", "macs", "latency_ms", "score", "front", "within", "best"])
            for c in sorted(self.tried, key=self._ordered):
                flags = (c in front, self.fits(c), c is best)
                latency = "" if c.latency_ms is None else c.latency_ms
                writer.writerow(
                    [_shown(c.width), _shown(c.depth), c.params, c.macs, latency, c.score, *(int(f) for f in flags)]
                )

    def plot(self, path: str | os.PathLike) -> None:
        """Score over the first of ``axes``: all candidates, the front as a line, the limit and the best one.

        Raises: ImportError when matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("plot: matplotlib is not installed; type 'pip install matplotlib'") from None
        axis = self.axes[0]
        figure = Figure(figsize=(6, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for shown, marker, label in ((self.tried, ".", "tried"), (self.front, "o-", "Pareto front")):
            axes.plot([getattr(c, axis) for c in shown], [c.score for c in shown], marker, label=label)
        axes.plot(getattr(self.best, axis), self.best.score, "*", markersize=14, label=self._best_label())
        if axis in self.limits:
            axes.axvline(self.limits[axis], linestyle="--", color="gray", label="limit")
        axes.set_xscale("log")
        axes.set_xlabel(_LABELS[axis])
        axes.set_ylabel("score")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        figure.savefig(path, dpi=130)

    def _best_label(self) -> str:
        name = self.best.name
        return f"best: {name}" if len(name) <= 40 else "best"
