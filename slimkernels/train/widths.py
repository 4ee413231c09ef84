"""Which widths and depths a step runs: rules, and one seeded generator, equal on every rank and saved in the
checkpoint."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

RULES = ("all", "sandwich", "random", "alternate", "progressive")
_DEFAULT_COUNT = {"all": 4, "sandwich": 4, "random": 1, "progressive": 4}
_DIGITS = 4  # random widths of a range are rounded to this many decimals: distinct ones stay printable keys


class WidthSampler:
    """Draws the widths of one training step after another.

    | rule        | one step runs |
    |-------------|---------------|
    | `all`       | every listed width, widest first; of a range, ``count`` evenly spaced widths |
    | `sandwich`  | the widest, the narrowest and ``count - 2`` random ones between them |
    | `random`    | ``count`` random widths (default 1) |
    | `alternate` | one width: the widest, then the next listed one, and so on (of a range: its two ends in turn) |
    | `progressive` | the widest, and ``count - 1`` random ones of those that ``schedule`` has opened so far |

    With ``depths`` a step runs pairs (width, depth) instead: the widest at the largest depth and the narrowest at the
    smallest depth are the ends, and random pairs are drawn over all widths and depths. `random` with a ``count`` of k is
    SortedNet's: the gradients of k sub-networks add up.

    `progressive` is once-for-all's shrinking in the order width, depth (kernel sizes are not elastic here). With
    ``schedule=(a, b, c)`` the first ``a`` steps train the full network alone; from ``a`` to ``b`` narrower widths are
    opened one after another, widest first (of a range, its low end goes down); from ``b`` to ``c`` likewise the depths;
    then all is open. Without depths: ``(a, b)``.

    The sub-networks of one step are distinct. Two samplers with the same seed draw the same widths, whatever the global
    random state
    is: build it with one seed on all ranks.

    Args:
        choices: a list of widths, or a tuple (low, high): any width between the two.
        count: widths a step; None takes 4 (`sandwich`, `all` of a range) or 1 (`random`).
        depths: ratios of the depth to choose from; None: the steps run widths only.
        schedule: the steps at which `progressive` goes on, ascending.
        generator: a CPU generator to draw from, instead of a new one seeded with ``seed``.

    Raises: ValueError when the rule is unknown, a width or depth is not in (0, 1], or the count or the schedule does not
        fit the rule.
    Source: Yu and Huang, Universally Slimmable Networks (arXiv 1903.05134), section 3; Yu et al. (arXiv 1812.08928); Cai et
        al., Once-for-All (arXiv 1908.09791); Valipour et al., SortedNet (arXiv 2309.00255).
    """

    def __init__(
        self,
        choices: tuple[float, float] | Sequence[float],
        rule: str = "sandwich",
        count: int | None = None,
        *,
        depths: Sequence[float] | None = None,
        schedule: Sequence[int] | None = None,
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
        self.depths = None if depths is None else check_widths("WidthSampler", depths, "depth")  # deepest first
        self.count = self._check_count(count)
        self.schedule = self._check_schedule(schedule)
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
        if self.rule == "progressive" and count == 1:
            raise ValueError("WidthSampler: expected count of at least 2 with rule 'progressive', got 1")
        return _DEFAULT_COUNT[self.rule] if count is None else count

    def _check_schedule(self, schedule: Sequence[int] | None) -> tuple[int, ...]:
        if self.rule != "progressive":
            if schedule is not None:
                raise ValueError(f"WidthSampler: expected a schedule with rule 'progressive' only, got {self.rule!r}")
            return ()
        words = "(a, b)" if self.depths is None else "(a, b, c)"
        steps = () if schedule is None else tuple(schedule)
        whole = all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in steps)
        if len(steps) != (2 if self.depths is None else 3) or not whole or list(steps) != sorted(steps):
            raise ValueError(
                f"WidthSampler: expected schedule to be ascending numbers of steps {words} with rule 'progressive',"
                f" got {schedule}"
            )
        return steps

    @property
    def teaches(self) -> bool:
        """Whether every step begins with the widest network, so that its output can teach the others."""
        return self.rule in ("all", "sandwich", "progressive")

    @property
    def ends(self) -> tuple[Any, Any]:
        """The largest and the smallest sub-network, as ``sample`` gives them."""
        if self.depths is None:
            return self.widths[0], self.widths[-1]
        return (self.widths[0], self.depths[0]), (self.widths[-1], self.depths[-1])

    def sample(self) -> list[Any]:
        """The widths, or pairs (width, depth), of the next step; where the rule ``teaches``, the largest comes first."""
        drawn = self._draw()
        self.steps += 1
        return drawn

    def _draw(self) -> list[Any]:
        every = _pairs(self.widths, self.depths)
        if self.rule == "alternate":
            return [every[self.steps % len(every)]]
        if self.rule == "random":
            return self._random(self.count, [], self.widths, self.depths)
        if self.rule == "all":
            return _pairs(spaced(self.range, self.count), self.depths) if self.range else every
        if self.rule == "progressive":
            return self._progressive()
        ends = list(self.ends)[: min(self.count, len(every))]
        return [*ends, *self._random(self.count - len(ends), ends, self.widths, self.depths)]

    def _progressive(self) -> list[Any]:
        largest = self.ends[0]
        begin, middle = self.schedule[:2]
        if self.steps < begin:
            return [largest]
        if self.range is not None:
            low, high = self.range
            done = min(1.0, (self.steps - begin + 1) / max(1, middle - begin))
            widths = [high, max(low, round(high - (high - low) * done, _DIGITS))]
        else:
            widths = self._opened(self.widths, begin, middle)
        depths = None if self.depths is None else self._opened(self.depths, middle, self.schedule[2])
        return [largest, *self._random(self.count - 1, [largest], widths, depths)]

    def _opened(self, choices: list[float], begin: int, end: int) -> list[float]:
        """The first of ``choices`` before step ``begin``, all from ``end`` on, one more after equal parts between."""
        if self.steps < begin:
            return choices[:1]
        parts = len(choices) - 1
        done = parts if self.steps >= end else (self.steps - begin) * parts // (end - begin) + 1
        return choices[: 1 + done]

    def _random(self, count: int, exclude: list[Any], widths: list[float], depths: list[float] | None) -> list[Any]:
        """``count`` distinct random sub-networks (fewer when there are no more) outside ``exclude``; of a range,
        ``widths`` are its ends."""
        if self.range is None:
            rest = [found for found in _pairs(widths, depths) if found not in exclude]
            order = torch.randperm(len(rest), generator=self.generator).tolist()
            return [rest[i] for i in order[:count]]
        low, high = widths[-1], widths[0]
        possible = (round((high - low) * 10**_DIGITS) + 1) * (1 if depths is None else len(depths)) - len(exclude)
        drawn: list[Any] = []
        while len(drawn) < min(count, possible):
            u = torch.rand((), generator=self.generator, dtype=torch.float64).item()
            found: Any = min(max(round(low + (high - low) * u, _DIGITS), low), high)
            if depths is not None:
                found = (found, depths[int(torch.randint(len(depths), (), generator=self.generator))])
            if found not in drawn and found not in exclude:
                drawn.append(found)
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


def _pairs(widths: Sequence[float], depths: Sequence[float] | None) -> list[Any]:
    """Every width at every depth, largest first; the widths themselves without depths."""
    return list(widths) if depths is None else [(w, d) for d in depths for w in widths]


def is_range(choices: object) -> bool:
    """Whether ``choices`` means every width between two, as in ``elastic.convert``: a tuple (low, high)."""
    return isinstance(choices, tuple) and len(choices) == 2


def check_widths(where: str, widths: Sequence[float], of: str = "width") -> list[float]:
    """The distinct widths (or depths) as floats, widest first.

    Raises: ValueError when there is none or one is not a number in (0, 1].
    """
    if len(widths) == 0:
        raise ValueError(f"{where}: expected at least one {of}, got none")
    for w in widths:
        if isinstance(w, bool) or not isinstance(w, (int, float)) or not 0 < w <= 1:
            raise ValueError(f"{where}: expected {of}s in (0, 1], got {w!r}")
    return sorted({float(w) for w in widths}, reverse=True)


def spaced(bounds: tuple[float, float], count: int) -> list[float]:
    """``count`` evenly spaced widths of a range, widest first."""
    low, high = bounds
    if count == 1 or low == high:
        return [high]
    return [round(high - (high - low) * i / (count - 1), _DIGITS) for i in range(count - 1)] + [low]
