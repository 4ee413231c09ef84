"""The table of the speech enhancer: on the terminal, as CSV and as a plot."""

import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from slimkernels.recipes.enhance import Settings

FRAME_MS = 10.0  # a streaming step has so long in real time
PROVIDERS = ("slimkernels", "plain")
DATA = "Asterisk prompts (fr, it, ru; tested on en) with sonic-pi samples as noise"

__all__ = ["Row", "plot", "rows", "table", "write_csv"]


def rows(
    model: nn.Module,
    widths: Sequence[float],
    unprocessed: float,
    before: Mapping[float, float],
    after: Mapping[float, float],
    timings: Mapping[tuple[float, str, int], Timing],
    settings: "Settings",
    seconds: float | None,  # of training; None when it was resumed
    command: str,
) -> list[Row]:
    """One row per width; every row says by itself how it came about."""
    found = []
    for w in widths:
        cost = elastic.cost(model, w)
        row: Row = {"network": "NSNet2", "data": DATA, "width": f"{w:g}", "parameters": cost.params}
        row |= {"macs_per_second": cost.macs, "si_sdr_noisy": f"{unprocessed:.2f}"}
        row |= {"si_sdr_before": f"{before[w]:.2f}", "si_sdr_after": f"{after[w]:.2f}"}
        for provider in PROVIDERS:
            timing = timings[w, provider, 1]
            row |= {f"{provider}_step_{name}_ms": f"{getattr(timing, name):.4f}" for name in ("p20", "p50", "p80")}
            row[f"{provider}_real_time_factor"] = f"{timing.p50 / FRAME_MS:.5f}"
        row |= {"steps": settings.steps, "batch_size": settings.batch_size, "batch_seconds": settings.seconds}
        row |= {"training_s": "" if seconds is None else f"{seconds:.0f}", "training_threads": torch.get_num_threads()}
        row |= {"test_mixtures": settings.test_mixtures, "test_seconds": settings.test_seconds, "seed": settings.seed}
        row |= {"latency_threads": 1, "cpu": cpu_name(), "isa": cpp_info().get("isa", "PyTorch reference")}
        row |= {"torch": torch.__version__, "load": f"{os.getloadavg()[0]:.1f}", "slimkernels": __version__}
        row |= {"date": datetime.date.today().isoformat(), "command": command}
        found.append(row)
    return found


def table(rows: Sequence[Row]) -> Table:
    drawn = Table(
        title=f"NSNet2, SI-SDR in dB (noisy input {rows[0]['si_sdr_noisy']}), unseen speaker and noises;\n"
        "streaming step of 10 ms: median ms on one thread and real-time factor",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    for head in ("width", "params", "before", "after", "ours\nms", "torch\nms", "ours\nRTF", "torch\nRTF"):
        drawn.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["width"], f"{row['parameters']:,}", row["si_sdr_before"], f"[bold]{row['si_sdr_after']}[/bold]"]
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
    after = [float(row["si_sdr_after"]) for row in rows]
    for provider, marker in zip(PROVIDERS, "oD", strict=True):
        axes.plot([float(row[f"{provider}_step_p50_ms"]) for row in rows], after, marker=marker, label=provider)
    for row, y in zip(rows, after, strict=True):
        x = float(row[f"{PROVIDERS[0]}_step_p50_ms"])
        axes.annotate(row["width"], (x, y), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    axes.axhline(float(rows[0]["si_sdr_noisy"]), linestyle=":", color="gray", label="noisy input")
    axes.set_xscale("log")
    axes.set_xlabel("ms for a streaming step of 10 ms, one thread")
    axes.set_ylabel("SI-SDR, dB")
    axes.set_title("NSNet2, one set of weights; unseen speaker and noises")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=130)
