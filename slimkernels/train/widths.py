"""Which widths a step runs: rules, and one seeded generator, equal on every rank and saved in the checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

RULES = ("all", "sandwich", "random", "alternate")
_DEFAULT_COUNT = {"all": 4, "sandwich": 4, "random": 1}
_DIGITS = 4  # random widths of a range are rounded to this many decimals: distinct ones stay printable keys


class WidthSampler:
    """Draws the widths of one training step after another.

    | rule        | one step runs |
    |-------------|---------------|
    | `all`       | every listed width, widest first; of a range, ``count`` evenly spaced widths |
    | `sandwich`  | the widest, the narrowest and ``count - 2`` random ones between them |
    | `random`    | ``count`` random widths (default 1) |
    | `alternate` | one width: the widest, then the next listed one, and so on (of a range: its two ends in turn) |

    The widths of one step are distinct. Two samplers with the same seed draw the same widths, whatever the global
    random state
    is: build it with one seed on all ranks.

    Args:
        choices: a list of widths, or a tuple (low, high): any width between the two.
        count: widths a step; None takes 4 (`sandwich`, `all` of a range) or 1 (`random`).
        generator: a CPU generator to draw from, instead of a new one seeded with ``seed``.

    Raises: ValueError when the rule is unknown, a width is not in (0, 1] or the count does not fit the rule.
    Source: Yu and Huang, Universally Slimmable Networks (arXiv 1903.05134), section 3; Yu et al. (arXiv 1812.08928).
    """

    def __init__(
        self,
        choices: tuple[float, float] | Sequence[float],
        rule: str = "sandwich",
        count: int | None = None,
        *,
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"WidthSampler: expected rule in {RULES}, got {rule!r}")
        self.rule = rule
        self.range: tuple[float, float] | None = None
        self.widths = check_widths("WidthSampler", choices)  # widest first
        if is_range(choices):
            low, high = choices
            if low > high:
                raise ValueError(f"WidthSampler: expected a range (low, high) with low <= high, got {tuple(choices)}")
            self.range = (float(low), float(high))
        self.count = self._check_count(count)
        self.generator = torch.Generator().manual_seed(seed) if generator is None else generator
        self.steps = 0  # steps drawn so far

    def _check_count(self, count: int | None) -> int:
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"WidthSampler: expected count to be a positive integer or None, got {count!r}")
        if self.rule == "alternate":
            if count not in (None, 1):
                raise ValueError(
                    f"WidthSampler: expected no count with rule 'alternate' (one width a step), got {count}"
                )
            return 1
        if self.rule == "all" and self.range is None:
            if count not in (None, len(self.widths)):
                raise ValueError(
                    f"WidthSampler: expected no count with rule 'all' and {len(self.widths)} listed widths, got {count}"
                )
            return len(self.widths)
        return _DEFAULT_COUNT[self.rule] if count is None else count

    @property
    def teaches(self) -> bool:
        """Whether every step begins with the widest network, so that its output can teach the others."""
        return self.rule in ("all", "sandwich")

    def sample(self) -> list[float]:
        """The widths of the next step; with `all` and `sandwich` the widest comes first."""
        drawn = self._draw()
        self.steps += 1
        return drawn

    def _draw(self) -> list[float]:
        if self.rule == "alternate":
            return [self.widths[self.steps % len(self.widths)]]
        if self.rule == "random":
            return self._random(self.count, exclude=[])
        if self.rule == "all":
            return spaced(self.range, self.count) if self.range else list(self.widths)
        ends = [self.widths[0], self.widths[-1]][: min(self.count, len(self.widths))]
        return [*ends, *self._random(self.count - len(ends), exclude=ends)]

    def _random(self, count: int, exclude: list[float]) -> list[float]:
        """``count`` distinct random widths (fewer when there are no more) outside ``exclude``."""
        if self.range is None:
            rest = [w for w in self.widths if w not in exclude]
            order = torch.randperm(len(rest), generator=self.generator).tolist()
            return [rest[i] for i in order[:count]]
        low, high = self.range
        possible = round((high - low) * 10**_DIGITS) + 1 - len(exclude)
        drawn: list[float] = []
        while len(drawn) < min(count, possible):
            u = torch.rand((), generator=self.generator, dtype=torch.float64).item()
            w = min(max(round(low + (high - low) * u, _DIGITS), low), high)
            if w not in drawn and w not in exclude:
                drawn.append(w)
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: the generator's state and the number of steps drawn."""
        return {"rule": self.rule, "generator": self.generator.get_state(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the saved sampler stopped.

        Raises: ValueError when the state is of another rule.
        """
        if state["rule"] != self.rule:
            raise ValueError(f"WidthSampler: expected a state of rule {self.rule!r}, got {state['rule']!r}")
        generator_state: Tensor = state["generator"]
        self.generator.set_state(generator_state.cpu())
        self.steps = state["steps"]


def is_range(choices: object) -> bool:
    """Whether ``choices`` means every width between two, as in ``elastic.convert``: a tuple (low, high)."""
    return isinstance(choices, tuple) and len(choices) == 2


def check_widths(where: str, widths: Sequence[float]) -> list[float]:
    """The distinct widths as floats, widest first.

    Raises: ValueError when there is none or one is not a number in (0, 1].
    """
    if len(widths) == 0:
        raise ValueError(f"{where}: expected at least one width, got none")
    for w in widths:
        if isinstance(w, bool) or not isinstance(w, (int, float)) or not 0 < w <= 1:
            raise ValueError(f"{where}: expected widths in (0, 1], got {w!r}")
    return sorted({float(w) for w in widths}, reverse=True)


def spaced(bounds: tuple[float, float], count: int) -> list[float]:
    """``count`` evenly spaced widths of a range, widest first."""
    low, high = bounds
    if count == 1 or low == high:
        return [high]
    return [round(high - (high - low) * i / (count - 1), _DIGITS) for i in range(count - 1)] + [low]
