"""``report``: what became elastic, what did not, and why."""

import io
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import nn

from slimkernels.elastic.cost import Cost, cost
from slimkernels.elastic.plan import Plan, Stage, WidthGroup, plan, unwrap
from slimkernels.elastic.transform import batch_norms

_NOT_SHOWN = ("gates", "next", "state", "rows")
_SHOWN = {"in": " (in)", "cell": " (hidden)", "heads": " (heads)", "key": " (keys)", "value": " (values)"}


@dataclass(frozen=True)
class Report:
    """``str()`` gives tables as text; rich prints it with colours. The attributes are for programs."""

    groups: dict[str, WidthGroup]  # every width dimension
    stages: dict[str, Stage]  # every depth dimension
    smallest: dict[str, int]  # channels at the lowest legal width
    left_alone: dict[str, str]  # layer -> why no width changes it
    gathers: list[str]  # layers of which a width takes no leading slice: after a concat, before a gate
    calibrated: tuple[float, ...] | None  # widths with batch-norm statistics of their own; None: no batch norm
    notes: list[str]
    widths: str
    norm: str
    full: Cost
    least: Cost

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield f"[bold]{len(self.groups)} width dimensions[/], widths {self.widths}, batch norm {self.norm}"
        dimensions = Table("width dimension", "full", "smallest", "layers")
        for name, group in self.groups.items():
            shown_sides = [(m, side) for m, side in group.members if side not in _NOT_SHOWN]
            packed = {m for m, side in shown_sides if side == "in"}  # its keys and values are not apart
            shown_sides = [(m, side) for m, side in shown_sides if side not in ("key", "value") or m not in packed]
            sides = [module + _SHOWN.get(side, "") for module, side in shown_sides]
            shown = ", ".join(sides[:4]) + (f" and {len(sides) - 4} more" if len(sides) > 4 else "")
            dimensions.add_row(name, str(group.size), str(self.smallest[name]), shown)
        yield dimensions
        if self.stages:
            yield f"[bold]{len(self.stages)} stages[/] of elastic depth"
            stages = Table("stage", "blocks", "always run", "last")
            for name, stage in self.stages.items():
                stages.add_row(name, str(len(stage.blocks)), stage.blocks[0], stage.blocks[-1])
            yield stages
        size = " width and depth" if self.stages else " width"
        yield (
            f"parameters {self.full.params:,} full, {self.least.params:,} at the smallest{size};"
            f" MACs {self.full.macs:,} full, {self.least.macs:,} at the smallest"
        )
        if self.calibrated is not None:
            yield "statistics of their own for widths " + ", ".join(f"{w:g}" for w in self.calibrated)
        if self.gathers:
            yield "weights gathered (after a concat, before a gate): " + ", ".join(self.gathers)
        if self.left_alone:
            alone = Table("left alone", "why")
            for name, reason in self.left_alone.items():
                alone.add_row(name or "(the model)", reason)
            yield alone
        else:
            yield "no layer was left alone"
        yield from self.notes

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=140, color_system=None, force_terminal=False).print(self)
        return text.getvalue()


def report(model: nn.Module) -> Report:
    """Every width and depth dimension of an elastic model, every layer left alone with the reason, and the calibrated widths.

    Raises: ValueError when the model is not elastic.
    """
    known: Plan = plan(model)
    low = known.widths[0]
    norms = list(batch_norms(unwrap(model)).values())
    return Report(
        groups=dict(known.groups),
        stages=dict(known.stages),
        smallest={name: known.groups[name].unit * n for name, n in known.units("report", low).items()},
        left_alone=dict(known.left_alone),
        gathers=list(known.gathers),
        calibrated=norms[0].calibrated_ratios if norms else None,
        notes=list(known.notes),
        widths=known.legal,
        norm=known.norm,
        full=cost(model, 1.0),
        least=cost(model, low, dict.fromkeys(known.stages, 1)),
    )
