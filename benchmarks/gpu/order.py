"""In which order ``make gpu`` times the cases of all ops: whenever it is cut off, it has seen the most.

A kind is an op in one network and dtype, with a layer of one form (a 3x3 convolution of stride 1, a depthwise one, a norm
behind an addition). First comes the heaviest case of each kind, then the second one of each and so on, and within such a
round the ops take turns. Compiled peers, which take seconds each, are items of their own and come later: one an op after
the first round, the others a round after that of their case.
"""

import importlib
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import harness, run

SIZES = re.compile(r"[A-Z]\d+(x\d+)?|(?<=-)\d+(x\d+)*(?=-|$)|(?<=d)\d+")


@dataclass(frozen=True)
class Item:
    """One case of an op against its eager peers, or (``compiled``) against torch.compile."""

    op: str
    case: harness.Case
    compiled: bool
    round: float

    @property
    def name(self) -> str:
        return f"{self.op} {run.named(self.case)}{' compiled' if self.compiled else ''}"


def kind(case: harness.Case) -> tuple[str, ...]:
    return case.net, SIZES.sub("#", case.shape), str(case.dtype).removeprefix("torch.")


def ranked(op: str) -> list[harness.Case]:
    """Each case once: the heaviest layers of the networks, at the full width and then at the narrowest, before the rest,
    whose order mixes layers and widths."""
    module = importlib.import_module(f"benchmarks.bench_{op}")
    heaviest = {run.named(case): case for case in module.cases(True)}
    rest = {run.named(case): case for case in module.cases(False) if run.named(case) not in heaviest}
    first = sorted(heaviest.values(), key=lambda case: -case.width)
    return first + [rest[name] for name in sorted(rest, key=lambda name: zlib.crc32(name.encode()))]


def items(ops: Sequence[str]) -> list[Item]:
    found: list[tuple[float, int, int, Item]] = []  # round, turn within it, op
    for number, op in enumerate(ops):
        seen, turns = Counter[tuple[str, ...]](), Counter[float]()
        for case in ranked(op):
            place = float(seen[kind(case)])
            seen[kind(case)] += 1
            rounds = {False: place}
            if case.compile:
                rounds[True] = 0.5 if not turns[0.5] else place + 1.5
            for compiled, at in rounds.items():
                found.append((at, turns[at], number, Item(op, case, compiled, at)))
                turns[at] += 1
    return [item for *_, item in sorted(found, key=lambda each: each[:3])]
