"""Rows, tables and plots of the recipe of generated weights."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table

from slimkernels._extension import cpp_info
from slimkernels._version import __version__
from slimkernels.recipes import results

if TYPE_CHECKING:
    from slimkernels.recipes.hyper import Recipe


def rows_of(
    recipe: "Recipe", arm: str, accuracy: Mapping[float, float], about: Mapping[str, Any], common: Mapping[str, Any]
) -> list[results.Row]:
    """A row for each width that was measured."""
    found = []
    for w in accuracy:
        row: results.Row = {"network": recipe.name, "data": recipe.data.name, "arm": arm, "width": f"{w:g}"}
        seen = w not in recipe.unseen or about.get("widths_a_step") == "alone"
        row |= {
            "trained": "yes" if seen and not arm.endswith("sliced") else "no",
            "accuracy": f"{accuracy[w]:.4f}",
        }
        row |= {**about, "batch_size": recipe.batch_size}
        row |= {"train_images": len(recipe.data.train_x), "test_images": len(recipe.data.test_x)}
        row |= {"threads": torch.get_num_threads(), "cpu": results.cpu_name()}
        row |= {"isa": cpp_info().get("isa", "PyTorch reference"), "torch": torch.__version__}
        row |= {"slimkernels": __version__, "date": datetime.date.today().isoformat(), **common}
        row["note"] = " ".join(recipe.notes)
        found.append(row)
    return found


def line(arm: str, accuracy: Mapping[float, float], seconds: float) -> str:
    return f"{arm} ({seconds:.0f} s): " + "  ".join(f"{w:g}: {value:.4f}" for w, value in accuracy.items())


def by_arm(rows: Sequence[results.Row]) -> dict[str, list[results.Row]]:
    found: dict[str, list[results.Row]] = {}
    for row in rows:
        found.setdefault(row["arm"], []).append(row)
    return found


def table(rows: Sequence[results.Row], title: str) -> Table:
    """A row per width, a column per arm."""
    arms = by_arm(rows)
    drawn = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    drawn.add_column("width", justify="right")
    for arm in arms:
        drawn.add_column(arm, justify="right")
    for row in next(iter(arms.values())):
        cells = [row["width"]]
        for found in arms.values():
            mine = next((r for r in found if r["width"] == row["width"]), None)
            if mine is None:
                cells.append("")
                continue
            star = "*" if mine["trained"] == "no" and not mine["arm"].endswith("sliced") else ""
            cells.append(f"{100 * float(mine['accuracy']):.1f}{star}")
        drawn.add_row(*cells)
    return drawn


def verdicts(rows: Sequence[results.Row]) -> list[str]:
    """For every trained arm: how far its unseen widths are below the better of their two trained neighbours, and below the
    mean of both, and the mean accuracy."""
    lines = []
    for arm, found in by_arm(rows).items():
        accuracy = [100 * float(row["accuracy"]) for row in found]
        gaps = [
            (max(accuracy[i - 1], accuracy[i + 1]) - accuracy[i], (accuracy[i - 1] + accuracy[i + 1]) / 2 - accuracy[i])
            for i, row in enumerate(found)
            if not arm.endswith("sliced") and row["trained"] == "no" and 0 < i < len(found) - 1
            if found[i - 1]["trained"] == found[i + 1]["trained"] == "yes"
        ]
        worst = ""
        if gaps:
            below, mean = (max(gap) for gap in zip(*gaps, strict=True))
            worst = f", unseen widths at most {below:.1f} points below a neighbour, {mean:.1f} below the mean of both"
        lines.append(f"{arm}: mean {sum(accuracy) / len(accuracy):.1f}, lowest {min(accuracy):.1f}{worst}")
    return lines


def plot(rows: Sequence[results.Row], path: Path, title: str) -> None:
    """Accuracy over width, a line an arm, the mean over seeds; rings stand for widths that were never trained.

    Raises: RuntimeError when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("plot: matplotlib is not installed; type 'pip install matplotlib'") from None
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for arm, measured in by_arm(rows).items():
        found = list({row["width"]: row for row in measured}.values())
        widths = [float(row["width"]) for row in found]
        accuracy = [fmean(float(r["accuracy"]) for r in measured if r["width"] == row["width"]) for row in found]
        style = {"linestyle": "--", "color": "0.6"} if arm.endswith("sliced") else {"marker": "o", "markersize": 4}
        (line,) = axes.plot(widths, accuracy, label=arm, linewidth=1.5, **style)
        unseen = [(w, a) for w, a, row in zip(widths, accuracy, found, strict=True) if row["trained"] == "no"]
        if not arm.endswith("sliced"):
            axes.plot(
                [w for w, _ in unseen],
                [a for _, a in unseen],
                "o",
                color=line.get_color(),
                fillstyle="none",
                markersize=10,
            )
    axes.set_xlabel("width (rings: never trained)")
    axes.set_ylabel("test accuracy")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)  # arms end anywhere in the plot
    figure.savefig(path, metadata={"Date": None})
