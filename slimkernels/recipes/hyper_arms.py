"""The ways to get the widths that the recipe of generated weights compares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One way to get the widths. ``mode`` None: fine-tuning of the weights themselves, all widths together or, with
    ``alone``, a copy of the network for each of every fourth width."""

    name: str
    mode: str | None = None
    noise: str = "none"
    blocks: Sequence[str] | None = None
    lr: float = 5e-3
    base: str | None = None
    alone: bool = False
    smooth: bool = False  # channels put into a smooth order first, as published; else the largest come first
    extras: Sequence[str] | None = None  # None: the recipe's
    extras_lr: float | None = None
    base_lr: float = 0.0  # of the weights that residuals are added to; 0: they stay
    generator: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name)


# The same number of passes a step as the others. Clipped: the first gradients of a coordinate network are large.
GENERATED: Mapping[str, Any] = {"rule": "sandwich", "distill": "kl", "weight_norm": 0.0, "clip_grad": 1.0}
FITTED: Mapping[str, Any] = {**GENERATED, "reconstruction": 0.1, "reconstruction_steps": 600}
SCRATCH: Mapping[str, Any] = {**GENERATED, "reconstruction": 0.0}
STANDARDIZED, FIXED = {"standardized": True}, {"positions": "absolute"}
DIGIT_ARMS = (
    Arm("slimmable", lr=1.5e-3),
    Arm("residual", "residual", base="residual", lr=2e-3),
    Arm("residual, axis noise", "residual", "axis", base="residual", lr=2e-3),
    Arm("residual, element noise", "residual", "element", base="residual", lr=2e-3),
    Arm("scratch", "neumeta", lr=2e-3, generator=STANDARDIZED, trainer=SCRATCH),
    Arm("scratch, axis noise", "neumeta", "axis", lr=2e-3, generator=STANDARDIZED, trainer=SCRATCH),
    Arm("scratch, element noise", "neumeta", "element", lr=2e-3, generator=STANDARDIZED, trainer=SCRATCH),
    Arm("alone", lr=1.5e-3, alone=True),
)
BLOCKS = tuple(f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(3))
ALL_BLOCKS: Mapping[str, Any] = {**SCRATCH, "train_previous": True}
BLOCKS_FITTED: Mapping[str, Any] = {**FITTED, "train_previous": True, "reconstruction_lr": 1e-2}
CIFAR_ARMS = (
    Arm("slimmable", lr=3e-3),
    Arm("residual", "residual", base="residual", lr=1.5e-2),
    Arm("residual, base trained", "residual", base="residual", lr=5e-3, base_lr=3e-3),
    Arm(
        "scratch",
        "neumeta",
        lr=3e-3,
        generator={"standardized": "centered", "tensors": "*"},
        extras=("*bn?.*",),
        extras_lr=1e-2,
        trainer=SCRATCH,
    ),
    Arm("blockwise", "blockwise", blocks=BLOCKS, lr=3e-3, generator={**FIXED, "hidden": 128}, trainer=BLOCKS_FITTED),
    Arm(
        "blockwise, base trained",
        "blockwise",
        blocks=BLOCKS,
        base="residual",
        lr=5e-3,
        base_lr=3e-3,
        trainer=ALL_BLOCKS,
    ),
    Arm("alone", lr=3e-3, alone=True),
)
BLOCK_ARMS = (
    Arm("slimmable", lr=1e-3),
    Arm("residual", "residual", base="residual", lr=1.2e-2),
    Arm("residual, axis noise", "residual", "axis", base="residual", lr=1.2e-2),
    Arm("residual, element noise", "residual", "element", base="residual", lr=1.2e-2),
    Arm("neumeta", "neumeta", lr=3e-3, smooth=True, trainer=FITTED),
    Arm("neumeta, axis noise", "neumeta", "axis", lr=3e-3, smooth=True, trainer=FITTED),
    Arm("neumeta, element noise", "neumeta", "element", lr=3e-3, smooth=True, trainer=FITTED),
    Arm("fitted, absolute positions", "neumeta", lr=3e-3, generator=FIXED, trainer=FITTED),
    Arm("scratch", "neumeta", lr=3e-3, trainer=SCRATCH),
    Arm("alone", lr=1e-3, alone=True),
)


def chosen(arms: Sequence[Arm], names: Sequence[str] | None) -> list[Arm]:
    """The arms of these names, or else whose names begin so; None: all of them."""
    if names is None:
        return list(arms)
    found: list[Arm] = []
    for name in names:
        exact = [arm for arm in arms if arm.name == name]
        fitting = exact or [arm for arm in arms if arm.name.startswith(name) and arm not in found]
        if not fitting:
            raise ValueError(f"train hyper: expected arms of {'; '.join(a.name for a in arms)}, got {name!r}")
        found += fitting
    return found
