"""How the models turn a width multiplier into channel counts."""

from collections.abc import Sequence


def scaled(channels: int, mult: float, divisor: int = 8) -> int:
    """``channels * mult`` rounded to ``divisor``: at least one divisor, at most 10 % below what was asked for."""
    wanted = channels * mult
    rounded = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * wanted else rounded


def scaled_all(channels: Sequence[int], mult: float, divisor: int = 8) -> tuple[int, ...]:
    """``scaled`` for each entry."""
    return tuple(scaled(c, mult, divisor) for c in channels)
