"""``python -m benchmarks.report [--check]``: OPS.md, the README's short table and one plot an op, from ``results/*.csv``.

``--check`` writes nothing and exits non-zero when a table or a plot is stale.
"""

import argparse
import hashlib
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.run import FOLDER, RESULTS, read

README = FOLDER.parent / "README.md"
PAGE = FOLDER / "OPS.md"
MODES = ("forward", "backward", "full")
WORST = 5  # slowest cases named an op
Row = dict[str, str]


def files() -> list[Path]:
    return sorted(RESULTS.glob("*.csv"), key=lambda path: path.stem)  # a machine's rows on one thread come first


def benchmark_rows(path: Path) -> list[Row]:
    """Rows of the harness; other tables may lie in the same folder."""
    return [row for row in read(path) if "ratio" in row and "provider" in row]


def one_thread_rows() -> list[Row]:
    """Of all machines: what the plots show."""
    return [row for path in files() for row in benchmark_rows(path) if row["threads"] == "1"]


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def peers(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != "slimkernels"))


def summary(rows: list[Row], peer: str) -> str:
    """Geometric mean of the ratios, their range, and how many are below 1."""
    ratios = [float(row["ratio"]) for row in rows if row["provider"] == peer and row["ratio"]]
    if not ratios:
        return "-"
    slower = f"slower in {sum(ratio < 0.995 for ratio in ratios)} of {len(ratios)}"
    return f"**{geometric_mean(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}; {slower})"


# What the peers are: a table each of the layers and of what is measured as a whole.
GROUPS = {
    "slim_": "Layers. `plain` is the PyTorch layer built at that width, `slice` the usual slicing code, `compile`"
    " torch.compile of the slicing code at that width, for the heaviest layer of each net only; `onednn` a linear layer of"
    " that size on oneDNN, its weight packed ahead.",
    "deploy": "Deployed networks. `plain` is the extracted network in PyTorch, channels-last, `slice` the usual slicing"
    " code around the full weights, `compile` the extracted network by torch.compile with frozen weights, `onednn` with"
    " oneDNN's packed linear layers, `float32` our own float32.",
    "training_step": "Training steps: all widths (a sandwich step), or one of 30 random widths a step. `slice` is slicing"
    " code, channels-last, `slice_nchw` contiguous, `compile` torch.compile of it, `plain` the sum of the plain networks'"
    " steps, `recompute` ours with that option. `backward` is the weight side alone: `slice` OFA's way, `mask` mmrazor's,"
    " `floor` PyTorch adding the gradient to a slice.",
    "inr_weights": "Weight generation. `plain` and `slice` are both the published way as whole tensors, in the dtype of the"
    " row, `compile` torch.compile of it, `eager-float32` it in float32, `recompute` ours without saved activations.",
}


def group_table(rows: list[Row]) -> list[str]:
    names = peers(rows)
    lines = [f"| op | dtype | mode | {' | '.join(names)} | run |", f"|---|---|---|{'---|' * len(names)}---|"]
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        for dtype in dict.fromkeys(row["dtype"] for row in of_op):
            for mode in MODES:
                part = [row for row in of_op if row["dtype"] == dtype and row["mode"] == mode]
                if part:
                    first = part[0]
                    about = (
                        f"{first['run']}, {first['date']}, {first['commit']}, load {first.get('load') or 'not noted'}"
                    )
                    cells = " | ".join(summary(part, name) for name in names)
                    lines.append(f"| `{op}` | {dtype} | {mode} | {cells} | {about} |")
    return lines


def step_tables(rows: list[Row]) -> list[str]:
    """Every training step by itself, then the peak memory of those that have it."""
    names = peers(rows)
    lines = [
        "",
        f"| network | input | dtype | ours (ms) | {' | '.join(names)} | run |",
        f"|---|---|---|---:|{'---:|' * len(names)}---|",
    ]
    steps = dict.fromkeys((row["net"], row["shape"], row["dtype"]) for row in rows)
    for case in steps:
        of_case = {r["provider"]: r for r in rows if (r["net"], r["shape"], r["dtype"]) == case}
        own = of_case["slimkernels"]
        cells = [of_case[n]["ratio"] or "-" if n in of_case else "-" for n in names]
        times = f"{float(own['p50_us']) / 1e3:.1f}" if own["p50_us"] else "-"
        lines.append(f"| {' | '.join([*case, times, *cells])} | {own['date']}, {own['commit']}, load {own['load']} |")
    # Older rows have resident memory in this column, and no note of it.
    measured = [row for row in rows if row["extra_mb"] and row["note"].startswith("resident")]
    if not measured:
        return lines
    names = ["slimkernels", *peers(measured)]
    lines += [
        "",
        "Peak memory of a sandwich step, MiB: all that the process holds, gradients included, parameters and the"
        " optimizer's state left out; in brackets as a part of slicing code's, the lesser of the two.",
        "",
        f"| network | input | dtype | {' | '.join(names)} |",
        f"|---|---|---|{'---:|' * len(names)}",
    ]
    for case in steps:
        held = {r["provider"]: float(r["extra_mb"]) for r in measured if (r["net"], r["shape"], r["dtype"]) == case}
        if held:
            eager = min((held[n] for n in ("slice", "slice_nchw") if n in held), default=math.inf)
            cells = [f"{held[n]:.1f} ({held[n] / eager:.2f})" if n in held else "-" for n in names]
            lines.append(f"| {' | '.join([*case, *cells])} |")
    return lines


def machine_section(path: Path, rows: list[Row]) -> list[str]:
    lines = [
        f"## {rows[0]['machine']}, {rows[0]['isa']}, {rows[0]['threads']} thread(s)",
        "",
        "Time (CPU time where one thread runs) of the peer over time of slimkernels in the same interleaved run: above 1,"
        " slimkernels is faster. Geometric mean over the cases (lowest to highest; how many are slower, below 0.995). `load` is"
        " that of the machine as the run began: above 1, other work took part of the time, and single ratios mean little."
        f" Every row: [{path.name}](results/{path.name}).",
    ]
    for prefix, about in GROUPS.items():
        of_group = [row for row in rows if row["op"].startswith(prefix)]
        if of_group:
            lines += ["", about, "", *group_table(of_group)]
            lines += step_tables(of_group) if prefix == "training_step" else []
    red = [row for row in rows if row["gate"] != "ok"]
    if red:
        lines += ["", f"Results that failed the accuracy gate and have no time: {len(red)}."]
        lines += [
            f"- `{r['op']}` {r['provider']} {r['net']} {r['shape']} {r['dtype']} {r['mode']}: {r['gate']}" for r in red
        ]
    return [*lines, "", *slowest(rows), *(plots(rows) if rows[0]["threads"] == "1" else [])]


def slowest(rows: list[Row]) -> list[str]:
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        timed = [row for row in rows if row["op"] == op and row["provider"] in ("plain", "slice") and row["ratio"]]
        worst = sorted((row for row in timed if float(row["ratio"]) < 0.995), key=lambda row: float(row["ratio"]))[
            :WORST
        ]
        if worst:
            cases = "; ".join(
                f"{r['ratio']} of {r['provider']}, {r['net']} {r['width']} {r['shape']} {r['dtype']} {r['mode']}"
                for r in worst
            )
            lines += [f"Slowest of `{op}`: {cases}.", ""]
    return lines


def plots(rows: list[Row]) -> list[str]:
    return [f"![{op}](results/{op}.svg)" for op in dict.fromkeys(row["op"] for row in rows)]


def table() -> str:
    sections = []
    for path in files():
        rows = benchmark_rows(path)
        if rows:
            sections += [*machine_section(path, rows), ""]
    return "\n".join(sections)


def layer_of(row: Row) -> str:
    """The op; recurrent layers that stream, one step a call, are no fair part of a mean with whole sequences."""
    return f"`{row['op']}`" + (", one step a call" if row["net"].endswith("-stream") else "")


def of_layers(rows: list[Row]) -> list[str]:
    """Every op against the PyTorch layer built at that width."""
    columns = [(dtype, mode) for dtype in ("float32", "bfloat16") for mode in MODES]
    lines = [
        "Layers, in training and evaluation: time of the PyTorch layer built at that width over ours. Geometric mean over"
        " layer shapes of real networks, in brackets the slowest case.",
        "",
        f"| op | {' | '.join(f'{dtype} {mode}' for dtype, mode in columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for op in dict.fromkeys(layer_of(row) for row in rows if row["op"].startswith("slim_")):
        cells = []
        for key in columns:
            of_cell = [
                row
                for row in rows
                if (layer_of(row), row["provider"], row["dtype"], row["mode"]) == (op, "plain", *key)
            ]
            ratios = [float(row["ratio"]) for row in of_cell if row["ratio"]]
            cells.append(f"**{geometric_mean(ratios):.2f}** ({min(ratios):.2f})" if ratios else "-")
        lines.append(f"| {op} | {' | '.join(cells)} |")
    return lines


def of_networks(rows: list[Row]) -> list[str]:
    """Deployed networks against frozen torch.compile, from the narrowest width to the full one."""
    timed = [r for r in rows if (r["op"], r["provider"], r["dtype"]) == ("deploy", "compile", "float32") and r["ratio"]]
    lines = [
        "Deployed networks, float32: time over ours of the network built at that width and compiled by torch.compile with"
        " frozen weights, from the narrowest width to the full one.",
        "",
        "| network | input | widths | times faster |",
        "|---|---|---|---|",
    ]
    for net, shape in dict.fromkeys((row["net"], row["shape"]) for row in timed):
        found = sorted(
            (float(row["width"]), float(row["ratio"])) for row in timed if (row["net"], row["shape"]) == (net, shape)
        )
        widths, ratios = (" / ".join(f"{pair[k]:.3g}" for pair in found) for k in (0, 1))
        lines.append(f"| {net} | {shape} | {widths} | {ratios} |")
    return lines


def short_table() -> str:
    """For the README: what each machine did on one thread."""
    lines: list[str] = []
    for path in files():
        rows = [row for row in benchmark_rows(path) if row["threads"] == "1"]
        if rows:
            lines += [f"{rows[0]['machine']}, {rows[0]['isa']}, one thread. Above 1, slimkernels is faster.", ""]
            lines += [*of_networks(rows), "", *of_layers(rows), ""]
    return "\n".join(lines).rstrip()


def between_marks(text: str, name: str, body: str) -> str:
    """``text`` with ``body`` between the marks of ``name``."""
    begin, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{body}\n{end}{rest.split(end, 1)[1]}"


def digest(op: str) -> str:
    rows = [row for row in one_thread_rows() if row["op"] == op]
    return hashlib.sha256(repr([sorted(row.items()) for row in rows]).encode()).hexdigest()[:16]


def plot(op: str) -> None:
    """Ratio to each peer over the peer's time, one panel a mode."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = op
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = [row for row in one_thread_rows() if row["op"] == op and row["ratio"]]
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    figure, axes = plt.subplots(1, len(modes), figsize=(4 * len(modes), 3.4), sharey=True, squeeze=False)
    for ax, mode in zip(axes[0], modes, strict=True):
        for peer in peers(rows):
            for dtype, marker in (("float32", "o"), ("bfloat16", "^"), ("float16", "s")):
                part = [r for r in rows if (r["mode"], r["provider"], r["dtype"]) == (mode, peer, dtype)]
                if part:
                    x, y = [float(r["p50_us"]) / 1e3 for r in part], [float(r["ratio"]) for r in part]
                    color = f"C{peers(rows).index(peer)}"
                    ax.scatter(x, y, s=14, marker=marker, color=color, alpha=0.7, label=f"{peer} {dtype}")
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set(xscale="log", yscale="log", title=f"{op}: {mode}", xlabel="time of the peer (ms)")
    for ax in axes[0]:
        for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            axis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    axes[0][0].set_ylabel("peer's time / slimkernels' time")
    entries = {label: h for ax in axes[0] for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    axes[0][-1].legend(entries.values(), entries.keys(), fontsize=6)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{op}.svg", metadata={"Date": None, "Description": f"rows {digest(op)}"})
    plt.close(figure)


def all_ops() -> list[str]:
    return sorted({row["op"] for row in one_thread_rows()})


def pages() -> dict[Path, str]:
    """What the pages should hold."""
    return {
        PAGE: between_marks(PAGE.read_text(), "benchmarks", table()),
        README: between_marks(README.read_text(), "summary", short_table()),
    }


def stale() -> list[str]:
    """What no longer agrees with the CSV files."""
    found = [str(path.relative_to(README.parent)) for path, text in pages().items() if path.read_text() != text]
    for op in all_ops():
        path = RESULTS / f"{op}.svg"
        if not path.exists() or f"rows {digest(op)}" not in path.read_text():
            found.append(f"benchmarks/results/{op}.svg")
    return found


def main(check: bool = False) -> int:
    names = stale()
    if check:
        if names:
            print(f"stale: {', '.join(names)}; type 'python -m benchmarks.report'", file=sys.stderr)
        return 1 if names else 0
    for path, text in pages().items():
        path.write_text(text)
    for op in all_ops():
        if f"benchmarks/results/{op}.svg" in names:
            plot(op)
    print(f"written: {', '.join(names) or 'nothing new'}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    raise SystemExit(main(parser.parse_args().check))
