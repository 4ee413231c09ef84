"""One page about a run of ``make gpu``, from its CSVs, and the plot."""

import csv
import platform
import statistics
from pathlib import Path

import torch

from benchmarks.gpu.session import Session

GOALS = (
    "Goals: at least 1.5 times as fast as eager and no slower than torch.compile on every row, 60 % of the roofline."
)


def table(path: Path, most: int = 40) -> list[str]:
    with path.open(newline="") as opened:
        rows = list(csv.reader(opened))
    lines = ["| " + " | ".join(row) + " |" for row in rows[: most + 1]]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    if len(rows) > most + 1:
        lines.append(f"\n{len(rows) - 1} rows in all: {path.name}.")
    return lines


def goals(path: Path) -> list[str]:
    """How many rows of ops.csv reach the goals."""
    with path.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    lines = []
    for provider, goal in (("plain", 1.5), ("slice", 1.5), ("compile", 1.0)):
        found = [float(row["over_ours"]) for row in rows if row["provider"] == provider and row["over_ours"]]
        if found:
            reached = sum(value >= goal for value in found)
            middle = statistics.median(found)
            lines.append(
                f"- {provider}: {reached} of {len(found)} rows at least {goal} times ours; median {middle:.2f}"
            )
    fractions = [float(row["roofline"]) for row in rows if row["provider"] == "slimkernels" and row["roofline"]]
    if fractions:
        reached = sum(value >= 0.6 for value in fractions)
        lines.append(
            f"- roofline: {reached} of {len(fractions)} rows at 60 % or more; median {statistics.median(fractions):.2f}"
        )
    return lines


def plot(session: Session) -> None:
    """Time of the networks over the width."""
    path = session.out / "networks.csv"
    if session.dry or not path.exists():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with path.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    nets = sorted({row["net"] for row in rows})
    figure, axes = pyplot.subplots(1, len(nets), figsize=(4 * len(nets), 3), squeeze=False)
    for axis, net in zip(axes[0], nets, strict=True):
        for provider in sorted({row["provider"] for row in rows}):
            points = [(float(r["width"]), float(r["ms"])) for r in rows if (r["net"], r["provider"]) == (net, provider)]
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=provider)
        axis.set(title=net, xlabel="width", ylabel="ms")
        axis.legend()
    figure.tight_layout()
    figure.savefig(session.out / "networks.png", dpi=120)


def write(session: Session) -> str:
    if session.dry:
        about = "**Dry run on a machine without a GPU: the plumbing was checked with tiny shapes, nothing was timed.**"
    else:
        about = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    lines = ["# make gpu", "", about, "", f"torch {torch.__version__}, Python {platform.python_version()}", ""]
    for title, name in {
        "Steps": "steps",
        "Ceilings": "ceilings",
        "Recompilations": "recompiles",
        "Networks, inference": "networks",
        "Training step": "training",
        "Generated weights of ResNet-50": "generation",
    }.items():
        if (session.out / f"{name}.csv").exists():
            lines += [f"## {title}", "", *table(session.out / f"{name}.csv"), ""]
    if (session.out / "ops.csv").exists():
        lines += ["## Ops", "", GOALS, *goals(session.out / "ops.csv"), "", "Every row is in ops.csv.", ""]
    (session.out / "report.md").write_text("\n".join(lines))
    plot(session)
    return "report.md"
