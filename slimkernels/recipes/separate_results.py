"""The table of the separation experiment: on the terminal, as CSV and as a plot."""

import datetime
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table

from slimkernels import elastic
from slimkernels._extension import cpp_info
from slimkernels._version import __version__
from slimkernels.recipes.data import DataError
from slimkernels.recipes.results import Row, cpu_name, write_csv

if TYPE_CHECKING:
    from slimkernels.recipes.separate import Settings, Subnet

DATA = "Asterisk prompts (fr, it, ru; tested on en) over sonic-pi samples of a second or longer"
WAYS = ("taken out", "alone")

__all__ = ["Result", "Row", "plot", "rows", "table", "times", "write_csv"]


@dataclass
class Result:
    """One sub-network after one training."""

    seed: int
    trained: str  # one of WAYS
    width: float
    depth: float
    si_sdr: float
    cpu_seconds: float  # of the training; "taken out": of the one that gave all sub-networks


def rows(
    results: Sequence[Result],
    costs: "Mapping[Subnet, elastic.Cost]",
    unprocessed: float,
    settings: "Settings",
    command: str,
) -> list[Row]:
    """One row per result; every row says by itself how it came about."""
    network = f"BSRNN N={settings.features} H={settings.hidden}, {settings.layers} layers"
    found = []
    for r in results:
        cost = costs[r.width, r.depth]
        row: Row = {"network": network, "data": DATA, "seed": r.seed, "trained": r.trained}
        row |= {"width": f"{r.width:g}", "depth": f"{r.depth:g}", "parameters": cost.params}
        row |= {"macs_per_second": cost.macs, "si_sdr_mixture": f"{unprocessed:.2f}", "si_sdr": f"{r.si_sdr:.3f}"}
        row |= {"training_cpu_s": f"{r.cpu_seconds:.1f}", "training_threads": torch.get_num_threads()}
        row |= {"steps": settings.steps, "batch_size": settings.batch_size, "batch_seconds": settings.seconds}
        row |= {"lr": settings.lr, "test_mixtures": settings.test_mixtures, "test_seconds": settings.test_seconds}
        row |= {"cpu": cpu_name(), "isa": cpp_info().get("isa", "PyTorch reference"), "torch": torch.__version__}
        row |= {"load": f"{os.getloadavg()[0]:.1f}", "slimkernels": __version__}
        row |= {"date": datetime.date.today().isoformat(), "command": command}
        found.append(row)
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]]:
    """(width, depth) -> way of training -> its rows, one per seed."""
    found: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        found.setdefault((row["width"], row["depth"]), {way: [] for way in WAYS})[row["trained"]].append(row)
    return found


def spread(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds (0 for one seed)."""
    values = [float(row[key]) for row in rows]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def times(rows: Sequence[Mapping[str, Any]]) -> str:
    """What one elastic training cost against training every sub-network alone, in words: means over the seeds."""
    cells = summary(rows).values()
    once = spread(next(iter(cells))["taken out"], "training_cpu_s")[0]
    alone = sum(spread(cell["alone"], "training_cpu_s")[0] for cell in cells)
    return (
        f"One elastic training took {once:.0f} CPU seconds, training its {len(cells)} sub-networks alone {alone:.0f}"
        f" ({alone / once:.2f} times as much)."
    )


def table(rows: Sequence[Row]) -> Table:
    seeds = len({row["seed"] for row in rows})
    drawn = Table(
        title=f"{rows[0]['network']}: speech from music, SI-SDR in dB (mixture {rows[0]['si_sdr_mixture']});\n"
        f"mean and standard deviation of {seeds} seeds",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    for head in ("width", "depth", "params", "MACs/s", "taken out", "alone", "alone\nCPU s"):
        drawn.add_column(head, justify="right", no_wrap=True)
    for (width, depth), cell in summary(rows).items():
        first = cell["alone"][0]
        scores = ["{:.2f} ± {:.2f}".format(*spread(cell[way], "si_sdr")) for way in WAYS]
        seconds = f"{spread(cell['alone'], 'training_cpu_s')[0]:.0f}"
        macs = f"{int(first['macs_per_second']) / 1e6:.0f} M"
        drawn.add_row(width, depth, f"{int(first['parameters']):,}", macs, *scores, seconds)
    return drawn


def plot(rows: Sequence[Row], path: Path) -> None:
    """SI-SDR over multiplications, a line for each way of training."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("plot: matplotlib is not installed; type 'pip install matplotlib'") from None
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    cells = sorted(summary(rows).items(), key=lambda item: int(item[1]["alone"][0]["macs_per_second"]))
    macs = [int(cell["alone"][0]["macs_per_second"]) / 1e6 for _, cell in cells]
    for way, marker in zip(WAYS, "oD", strict=True):
        found = [spread(cell[way], "si_sdr") for _, cell in cells]
        axes.errorbar(macs, [m for m, _ in found], [s for _, s in found], marker=marker, capsize=3, label=way)
    for x, ((width, depth), cell) in zip(macs, cells, strict=True):
        y = spread(cell["taken out"], "si_sdr")[0]
        label = f"{width} x {depth}"
        axes.annotate(label, (x, y), textcoords="offset points", xytext=(0, 8), ha="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("million multiplications for a second of sound; labels: width x depth")
    axes.set_ylabel("SI-SDR, dB")
    axes.set_title("Speech from music: taken out of one elastic training, or trained alone")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=130)
