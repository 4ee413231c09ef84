"""The table of a recipe: on the terminal, as CSV and as a plot."""

import csv
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from slimkernels import elastic
from slimkernels._extension import cpp_info
from slimkernels._version import __version__
from slimkernels.recipes.latency import PROVIDERS, Timing

if TYPE_CHECKING:
    from slimkernels.recipes.pipeline import Recipe

Row = dict[str, Any]
SHORT = {"deployed": "depl.", "slimkernels": "ours", "slicing": "slice", "plain": "plain"}


def rows(
    recipe: "Recipe",
    model: nn.Module,
    widths: Sequence[float],
    before: Mapping[float, float],
    after: Mapping[float, float],
    timings: Mapping[tuple[float, str, int], Timing],
    *,
    seed: int,
    command: str,
) -> list[Row]:
    """One row per width; every row says by itself how it came about."""
    found = []
    for w in widths:
        cost = elastic.cost(model, w)
        row: Row = {"network": recipe.name, "data": recipe.data.name, "width": f"{w:g}"}
        row |= {"parameters": cost.params, "macs": cost.macs}
        row |= {"accuracy_before": f"{before[w]:.4f}", "accuracy_after": f"{after[w]:.4f}"}
        for batch in recipe.latency_batches:
            for provider in PROVIDERS:
                timing = timings[w, provider, batch]
                for name in ("p20", "p50", "p80"):
                    row[f"{provider}_batch{batch}_{name}_ms"] = f"{getattr(timing, name):.4f}"
        row |= {"train_images": len(recipe.data.train_x), "test_images": len(recipe.data.test_x)}
        row |= {"steps": recipe.steps, "batch_size": recipe.batch_size, "seed": seed, "latency_threads": 1}
        row |= {"cpu": cpu_name(), "isa": cpp_info().get("isa", "PyTorch reference"), "torch": torch.__version__}
        row |= {
            "load": f"{os.getloadavg()[0]:.1f}",
            "slimkernels": __version__,
            "date": datetime.date.today().isoformat(),
            "command": command,
        }
        row["note"] = " ".join(recipe.notes)
        found.append(row)
    return found


def cpu_name() -> str:
    """The processor's model, or its family where the name says nothing."""
    info: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    name = info.get("model name") or platform.processor() or platform.machine()
    return (
        name if any(c.isdigit() for c in name) else f"{name} family {info.get('cpu family')} model {info.get('model')}"
    )


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def table(rows: Sequence[Row], recipe: "Recipe") -> Table:
    """The rows as a person reads them: accuracies in percent, median latencies. Fits 80 columns."""
    title = f"{recipe.name} on {recipe.data.name}\naccuracy in %; latency in ms: medians of one interleaved run, channels-last"
    drawn = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    batches = list(recipe.latency_batches)
    heads = ["width", "params", "MACs", "before", "after"]
    for batch in batches:
        above = ["batch", str(batch), "", ""]
        heads += [f"{line}\n{SHORT[provider]}" for line, provider in zip(above, PROVIDERS, strict=True)]
    for head in heads:
        drawn.add_column(head if "\n" in head else f"\n{head}", justify="right", no_wrap=True)
    for row in rows:
        cells = [row["width"], f"{row['parameters']:,}", _millions(row["macs"])]
        cells += [_percent(row["accuracy_before"]), f"[bold]{_percent(row['accuracy_after'])}[/bold]"]
        cells += [_short(row[f"{provider}_batch{batch}_p50_ms"]) for batch in batches for provider in PROVIDERS]
        drawn.add_row(*cells)
    return drawn


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f}M" if number < 1e7 else f"{number / 1e6:.1f}M"


def _percent(fraction: str) -> str:
    return f"{100 * float(fraction):.1f}"


def _short(milliseconds: str) -> str:
    """Three digits: ``.123``, ``1.23``, ``12.3``, ``123``."""
    value = float(milliseconds)
    if value < 1:
        return f"{value:.3f}".removeprefix("0")
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def plot(rows: Sequence[Row], path: Path, recipe: "Recipe") -> None:
    """Accuracy over latency, one panel per batch size, one line per way to run a width.

    Raises: RuntimeError when matplotlib is not installed.
    """
    try:
        importlib.metadata.version("matplotlib")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError("plot: matplotlib is not installed; type 'pip install matplotlib'") from None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    batches = list(recipe.latency_batches)
    figure = Figure(figsize=(5.2 * len(batches), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        accuracy = [float(row["accuracy_after"]) for row in rows]
        for provider, marker in zip(PROVIDERS, "^osD", strict=True):
            times = [float(row[f"{provider}_batch{batch}_p50_ms"]) for row in rows]
            axes.plot(times, accuracy, marker=marker, label=provider, linewidth=1.5, markersize=5)
        ours = [float(row[f"{PROVIDERS[0]}_batch{batch}_p50_ms"]) for row in rows]
        for x, y, row in zip(ours, accuracy, rows, strict=True):
            axes.annotate(row["width"], (x, y), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"ms for a batch of {batch}, one thread")
        axes.set_ylabel("test accuracy")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(f"{recipe.name}, {recipe.data.name}: one set of weights, {len(rows)} widths")
    figure.savefig(path, dpi=130)
