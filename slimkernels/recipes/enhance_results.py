"""The table of the speech enhancer: on the terminal, as CSV and as a plot."""

import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from slimkernels import elastic
from slimkernels._extension import cpp_info
from slimkernels._version import __version__
from slimkernels.recipes.data import DataError
from slimkernels.recipes.latency import Timing
from slimkernels.recipes.results import Row, cpu_name, write_csv
from slimkernels.recipes.separate_results import spread

if TYPE_CHECKING:
    from slimkernels.recipes.enhance import Settings

FRAME_MS = 10.0  # a streaming step has so long in real time
PROVIDERS = ("slimkernels", "plain")
DATA = "Asterisk prompts (fr, it, ru; tested on en) with sonic-pi samples as noise"

__all__ = ["Result", "Row", "plot", "rows", "table", "write_csv"]


@dataclass
class Result:
    """SI-SDR of every width before and after the training with one seed."""

    seed: int
    before: Mapping[float, float]
    after: Mapping[float, float]
    cpu_seconds: float  # of the training


def rows(
    model: nn.Module,
    widths: Sequence[float],
    unprocessed: float,
    results: Sequence[Result],
    timings: Mapping[tuple[float, str, int], Timing],
    settings: "Settings",
    command: str,
) -> list[Row]:
    """One row per seed and width; every row says by itself how it came about. The timings are of the first seed."""
    found = []
    for result in results:
        for w in widths:
            cost = elastic.cost(model, w)
            row: Row = {"network": "NSNet2", "data": DATA, "seed": result.seed, "width": f"{w:g}"}
            row |= {"parameters": cost.params, "macs_per_second": cost.macs, "si_sdr_noisy": f"{unprocessed:.2f}"}
            row |= {"si_sdr_before": f"{result.before[w]:.3f}", "si_sdr_after": f"{result.after[w]:.3f}"}
            for provider in PROVIDERS:
                timing = timings[w, provider, 1]
                row |= {f"{provider}_step_{name}_ms": f"{getattr(timing, name):.4f}" for name in ("p20", "p50", "p80")}
                row[f"{provider}_real_time_factor"] = f"{timing.p50 / FRAME_MS:.5f}"
            row |= {"steps": settings.steps, "batch_size": settings.batch_size, "batch_seconds": settings.seconds}
            row |= {"training_cpu_s": f"{result.cpu_seconds:.0f}", "training_threads": torch.get_num_threads()}
            row |= {"test_mixtures": settings.test_mixtures, "test_seconds": settings.test_seconds}
            row |= {"latency_threads": 1, "cpu": cpu_name(), "isa": cpp_info().get("isa", "PyTorch reference")}
            row |= {"torch": torch.__version__, "load": f"{os.getloadavg()[0]:.1f}", "slimkernels": __version__}
            row |= {"date": datetime.date.today().isoformat(), "command": command}
            found.append(row)
    return found


def by_width(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Width -> its rows, one per seed."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["width"], []).append(row)
    return found


def mean_of(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """Mean over the seeds, with the standard deviation where there are several."""
    mean, deviation = spread(rows, key)
    return f"{mean:.2f} ± {deviation:.2f}" if len(rows) > 1 else f"{mean:.2f}"


def table(rows: Sequence[Row]) -> Table:
    of_width = by_width(rows)
    seeds = len(next(iter(of_width.values())))
    drawn = Table(
        title=f"NSNet2, SI-SDR in dB (noisy input {rows[0]['si_sdr_noisy']}), unseen speaker and noises,\n"
        f"mean and standard deviation of {seeds} seeds;\n"
        "streaming step of 10 ms: median ms on one thread and real-time factor",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    for head in ("width", "params", "before", "after", "ours\nms", "torch\nms", "ours\nRTF", "torch\nRTF"):
        drawn.add_column(head, justify="right", no_wrap=True)
    for width, of_seeds in of_width.items():
        row = of_seeds[0]
        after = mean_of(of_seeds, "si_sdr_after")
        cells = [width, f"{row['parameters']:,}", mean_of(of_seeds, "si_sdr_before"), f"[bold]{after}[/bold]"]
        cells += [f"{float(row[f'{provider}_step_p50_ms']):.3f}" for provider in PROVIDERS]
        cells += [f"{float(row[f'{provider}_real_time_factor']):.4f}" for provider in PROVIDERS]
        drawn.add_row(*cells)
    return drawn


def plot(rows: Sequence[Row], path: Path) -> None:
    """SI-SDR over the time of a streaming step, a line for each way to run a width."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("plot: matplotlib is not installed; type 'pip install matplotlib'") from None
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    of_width = by_width(rows)
    after = [spread(found, "si_sdr_after") for found in of_width.values()]
    means, deviations = [m for m, _ in after], [d for _, d in after]
    for provider, marker in zip(PROVIDERS, "oD", strict=True):
        times = [float(found[0][f"{provider}_step_p50_ms"]) for found in of_width.values()]
        axes.errorbar(times, means, deviations, marker=marker, capsize=3, label=provider)
    for (width, found), y in zip(of_width.items(), means, strict=True):
        x = float(found[0][f"{PROVIDERS[0]}_step_p50_ms"])
        axes.annotate(width, (x, y), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    axes.axhline(float(rows[0]["si_sdr_noisy"]), linestyle=":", color="gray", label="noisy input")
    axes.set_xscale("log")
    axes.set_xlabel("ms for a streaming step of 10 ms, one thread")
    axes.set_ylabel("SI-SDR, dB")
    axes.set_title("NSNet2, one set of weights; unseen speaker and noises")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=130)
