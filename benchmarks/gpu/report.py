"""One page about a run of ``make gpu``, from its CSVs, and the plot."""

import csv
import importlib.util
import platform
import statistics
from pathlib import Path

import torch

from benchmarks.gpu.progress import Progress

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


def told_of(steps: list[dict[str, str]]) -> list[str]:
    """What did not come to its end, and of what each died."""
    lines = [
        f"- **{row['step']}** {row['status']}: {row['told']}" for row in steps if row["status"] in ("died", "failed")
    ]
    late = [row["step"] for row in steps if row["status"] in ("cut", "left out")]
    if late:
        lines.append(f"- no time was left for all of: {', '.join(late)}")
    return lines or ["Every step came to its end, and none was red."]


def counted(out: Path) -> str:
    """Of the tests, from what each wrote as it ended."""
    found = [Progress(path).items() for path in sorted((out / "items").glob("tests*.jsonl"))]
    events = [event for items in found for event, _ in items.values()]
    kinds = ("ok", "skipped", "failed", "died", "cut")
    return ", ".join(f"{sum(e == kind for e in events)} {'passed' if kind == 'ok' else kind}" for kind in kinds)


def coverage(out: Path, dry: bool) -> list[str]:
    """How many cases of each op were timed, of how many."""
    with (out / "plan.csv").open(newline="") as opened:
        plan = list(csv.DictReader(opened))
    items = Progress(out / "items" / "ops.jsonl").items()
    done = [name for name, (event, _) in items.items() if event in ("ok", "failed", "died")]
    lines = ["| op | cases | of | against torch.compile | of |", "|---|---|---|---|---|"]
    counts = []
    for row in plan:
        own = [name for name in done if name.startswith(f"{row['op']} ")]
        compiled = sum(name.endswith(" compiled") for name in own)
        counts.append((len(own) - compiled, int(row["cases"]), compiled, int(row["compiled"])))
        lines.append(f"| {row['op']} | " + " | ".join(map(str, counts[-1])) + " |")
    timed, cases, compiled, all_compiled = (sum(column) for column in zip(*counts, strict=True))
    told = f"{'Ran' if dry else 'Timed'} {timed} of {cases} cases, {compiled} of {all_compiled} against torch.compile"
    if dry:
        told += "; a dry run takes one small case of each op"
    elif timed + compiled < cases + all_compiled:
        told += "; `make gpu ARGS='--resume --minutes 45'` goes on with the others in this folder"
    return [f"{told}.", "", *lines, ""]


def goals(path: Path) -> list[str]:
    """How many rows of ops.csv reach the goals."""
    with path.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    lines = []
    for column, kind in (("over_ours", "the GPU's work"), ("back_to_back_over_ours", "calls one behind the other")):
        for provider, goal in (("plain", 1.5), ("slice", 1.5), ("compile", 1.0)):
            found = [float(row[column]) for row in rows if row["provider"] == provider and row[column]]
            if found:
                reached, middle = sum(value >= goal for value in found), statistics.median(found)
                lines.append(
                    f"- {kind}, {provider}: {reached} of {len(found)} rows at least {goal} times ours; median {middle:.2f}"
                )
    fractions = [float(row["roofline"]) for row in rows if row["provider"] == "slimkernels" and row["roofline"]]
    if fractions:
        reached = sum(value >= 0.6 for value in fractions)
        lines.append(
            f"- roofline: {reached} of {len(fractions)} rows at 60 % or more; median {statistics.median(fractions):.2f}"
        )
    return lines


def plot(out: Path, dry: bool) -> None:
    """Time of the networks over the width, where matplotlib is installed."""
    path = out / "networks.csv"
    if dry or not path.exists() or importlib.util.find_spec("matplotlib") is None:
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
    figure.savefig(out / "networks.png", dpi=120)


def write(out: Path, dry: bool) -> None:
    """``report.md`` and the plot, from what is there by now."""
    with (out / "steps.csv").open(newline="") as opened:
        steps = list(csv.DictReader(opened))
    if dry:
        about = "**Dry run on a machine without a GPU: the plumbing was checked with tiny shapes, nothing was timed.**"
    else:  # the GPU's name is what its first step told: this process makes no CUDA context
        name = next((row["told"].split(";")[0] for row in steps if row["step"] == "ceilings"), "a GPU")
        about = f"{name}, CUDA {torch.version.cuda}"
    lines = ["# make gpu", "", about, "", f"torch {torch.__version__}, Python {platform.python_version()}", ""]
    lines += ["## What went wrong", "", *told_of(steps), "", f"Tests: {counted(out)}.", ""]
    for title, name in {
        "Steps": "steps",
        "Ceilings": "ceilings",
        "Recompilations": "recompiles",
        "Networks, inference": "networks",
        "Training step": "training",
        "Generated weights of ResNet-50": "generation",
    }.items():
        if (out / f"{name}.csv").exists():
            lines += [f"## {title}", "", *table(out / f"{name}.csv", 100), ""]
    if (out / "plan.csv").exists():
        lines += ["## Ops", "", *coverage(out, dry)]
    if (out / "ops.csv").exists():
        lines += [GOALS, *goals(out / "ops.csv"), "", "Every row is in ops.csv.", ""]
    aside = out / "report.tmp"
    aside.write_text("\n".join(lines))
    aside.replace(out / "report.md")
    plot(out, dry)
