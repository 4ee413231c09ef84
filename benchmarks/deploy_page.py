"""``python -m benchmarks.deploy_page [--measure | --check]``: benchmarks/DEPLOY.md, deployed networks in two plots.

Time over width comes from the rows of ``bench_deploy``; the roofline from ``results/deploy-layers.csv``, which
``--measure`` writes: every operation of ResNet-50 and MobileNetV2, timed one after the other as the network runs.
"""

import argparse
import csv
import datetime
import hashlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.onednn import PackedLinear
from benchmarks.report import benchmark_rows, files
from benchmarks.run import FOLDER, RESULTS, commit, machine

PAGE = FOLDER / "DEPLOY.md"
LAYERS = RESULTS / "deploy-layers.csv"
PLOTS = {"width": RESULTS / "deploy-width.svg", "roofline": RESULTS / "deploy-roofline.svg"}
COLUMNS = (
    "net",
    "width",
    "dtype",
    "layer",
    "operation",
    "runs_on",
    "us",
    "mflops",
    "kbytes",
    "machine",
    "load",
    "commit",
    "date",
)
SWITCH = "set_width"  # the row with the time of a switch between packed widths
CEILING = "ceiling"  # in place of a network: what the machine reached in the same run
PRODUCT, COPY = "product of matrices", "copy"  # its operations
# What was asked of each network: (peer, ratio at the widths .25 (or .35), .5, .75, 1). With Winograd, as here, 1.3 is
# asked for at the two wide ones, without it 1.1.
TARGETS = {
    "ResNet-50": {"compile": (1.3, 1.2, 1.3, 1.3), "slice": (2.5, None, None, None)},
    "MobileNetV2": {"compile": (1.3, 1.2, 1.3, 1.3), "slice": (2.5, None, None, None)},
    "ResNet-20": {"compile": (1.3, 1.2, 1.3, 1.3), "slice": (2.5, None, None, None)},
    "WaveNet": {"slice": (3.0,) * 4},
    "ViT-S FFN": {"compile": (1.2,) * 4},
}
BFLOAT16 = 1.8  # over our own float32
Row = dict[str, str]


def measure(repeats: int = 30) -> None:
    """Times every operation of two networks, on one thread."""
    import torch

    from slimkernels import elastic, models

    torch.set_num_threads(1)
    about = {
        "machine": machine(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    rows = []
    for name, make in (("ResNet-50", models.resnet50), ("MobileNetV2", models.mobilenet_v2)):
        x = torch.randn(1, 3, 224, 224).contiguous(memory_format=torch.channels_last)
        model = elastic.convert(make().eval(), x)
        for dtype in (torch.float32, torch.bfloat16):
            deployed = elastic.deploy(model, dtype=dtype)
            for width in (0.25 if name == "ResNet-50" else 0.35, 1.0):
                deployed.set_width(width)
                for layer in deployed.profile(x, repeats=repeats):
                    values = (
                        name,
                        width,
                        str(dtype).removeprefix("torch."),
                        layer.name,
                        layer.operation,
                        layer.runs_on,
                    )
                    sizes = (f"{layer.seconds * 1e6:.2f}", f"{layer.flops / 1e6:.3f}", f"{layer.bytes / 1e3:.1f}")
                    rows.append(dict(zip(COLUMNS, (*values, *sizes), strict=False)) | about)
    model = elastic.convert(models.resnet50().eval(), torch.randn(1, 3, 224, 224))
    deployed, times = elastic.deploy(model, widths=[0.25, 1.0]), []
    for i in range(201):
        start = time.perf_counter()
        deployed.set_width((0.25, 1.0)[i % 2])
        times.append(time.perf_counter() - start)
    values = ("ResNet-50", 1.0, "float32", SWITCH, "switch between packed widths", "look-up")
    sizes = (f"{statistics.median(times) * 1e6:.2f}", "0", "0")
    rows.append(dict(zip(COLUMNS, (*values, *sizes), strict=False)) | about)
    rows += [dict(zip(COLUMNS, values, strict=False)) | about for values in ceilings()]
    with LAYERS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def ceilings(repeats: int = 20) -> Iterator[tuple]:
    """What PyTorch reaches on one thread: a product of matrices for each dtype, by default and by oneDNN with its weight
    packed ahead, and a copy of what fits in no cache. The shortest time: other work can only make it longer."""
    import torch

    def shortest(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    n = 1024
    for dtype in (torch.float32, torch.bfloat16):
        a, linear = torch.randn(n, n).to(dtype), torch.nn.Linear(n, n).to(dtype)
        sizes = f"{2 * n**3 / 1e6:.3f}", f"{3 * n * n * dtype.itemsize / 1e3:.1f}"
        with torch.inference_mode():
            for library, layer in (("F.linear", linear), ("oneDNN", PackedLinear(linear))):
                us = f"{shortest(partial(layer, a)) * 1e6:.2f}"
                yield CEILING, "", str(dtype).removeprefix("torch."), "", PRODUCT, library, us, *sizes
    source = torch.zeros(2**26)
    target = torch.empty_like(source)
    seconds = shortest(partial(target.copy_, source))
    yield CEILING, "", "float32", "", COPY, "PyTorch", f"{seconds * 1e6:.2f}", "0", f"{2 * source.nbytes / 1e3:.1f}"


def roof(rows: list[Row], dtype: str) -> tuple[float, float]:
    """GFLOP/s and GB/s that the machine reached."""
    best = [r for r in rows if r["net"] == CEILING]
    copied = next(r for r in best if r["operation"] == COPY)
    return max(products(best, dtype).values()), float(copied["kbytes"]) / float(copied["us"])


def products(rows: list[Row], dtype: str) -> dict[str, float]:
    """GFLOP/s of a product of matrices by library."""
    chosen = (r for r in rows if (r["net"], r["operation"], r["dtype"]) == (CEILING, PRODUCT, dtype))
    return {r["runs_on"]: gflops(r) for r in chosen}


def gflops(row: Row) -> float:
    return float(row["mflops"]) / float(row["us"]) * 1e3


def layers() -> list[Row]:
    if not LAYERS.exists():
        return []
    with LAYERS.open(newline="") as file:
        return list(csv.DictReader(file))


def rows_of_networks(one_thread: bool = True) -> list[Row]:
    rows = (row for path in files() for row in benchmark_rows(path) if row["op"] == "deploy")
    return [row for row in rows if (row["threads"] == "1") == one_thread]


def loads(rows: list[Row]) -> str:
    ends = sorted({float(row["load"]) for row in rows})
    return str(ends[0]) if len(ends) == 1 else f"{ends[0]} to {ends[-1]}"


def workloads(rows: list[Row]) -> dict[tuple[str, str, str], list[Row]]:
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["net"], row["shape"], row["dtype"]), []).append(row)
    return found


def target(row: Row, position: int) -> float | None:
    if row["dtype"] == "bfloat16":
        return BFLOAT16 if row["provider"] == "float32" else None
    asked = TARGETS.get(row["net"], {}).get(row["provider"])
    return None if asked is None else asked[position]


def table(rows: list[Row]) -> list[str]:
    peers = ["plain", "slice", "compile", "float32"]
    peers += [peer for peer in ("onednn", "modelopt") if any(row["provider"] == peer for row in rows)]
    lines = [
        "| network | input | dtype | width | ours, ms | " + " | ".join(peers) + " | |",
        "|---" * (6 + len(peers)) + "|",
    ]
    for (net, shape, dtype), part in workloads(rows).items():
        widths = list(dict.fromkeys(row["width"] for row in part))
        for width in widths:
            at = {row["provider"]: row for row in part if row["width"] == width}
            # Of four widths the first stands for .25, whatever the network's narrowest is.
            position = min(range(4), key=lambda i: abs((0.25, 0.5, 0.75, 1.0)[i] - float(width)))
            cells, missed = [], []
            for peer in peers:
                row = at.get(peer)
                if row is None or not row["ratio"]:
                    cells.append("-" if row is None else "wrong")
                    continue
                asked = target(row, position)
                if asked is not None and float(row["ratio"]) < asked:
                    missed.append(f"{peer} {asked:g}")
                cells.append(f"**{float(row['ratio']):.2f}**" if asked is not None else f"{float(row['ratio']):.2f}")
            ours = float(at["slimkernels"]["p50_us"] or "nan") / 1e3
            verdict = f"missed: {', '.join(missed)}" if missed else ""
            lines.append(f"| {net} | {shape} | {dtype} | {width} | {ours:.3f} | {' | '.join(cells)} | {verdict} |")
    return lines


def on_threads(rows: list[Row]) -> list[str]:
    """The section of the same on several threads."""
    first, commits = rows[0], ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return [
        f"## On {first['threads']} threads",
        "",
        f"`python -m benchmarks.run deploy --quick --threads {first['threads']}` of {first['date']}, commits {commits}, load"
        f" {first['load']} as it began. Wall-clock time, so other work on the machine falls on whoever runs at that moment.",
        "",
        *table(rows),
        "",
    ]


def page() -> str:
    rows, measured = rows_of_networks(), layers()
    lines = ["# Deployed networks", ""]
    if rows:
        first, commits = rows[0], ", ".join(dict.fromkeys(row["commit"] for row in rows))
        several = rows_of_networks(one_thread=False)
        lines += [
            f"Written by `python -m benchmarks.deploy_page` from the rows of `python -m benchmarks.run deploy`: {first['run']}"
            f" run of {first['date']}, commits {commits}, {first['machine']}, {first['isa']},"
            f" {first['threads']} thread, torch {first['torch']}, load {loads(rows)} as it began (other work ran beside"
            " it: times are CPU time, and only ratios within one interleaved run mean anything).",
            "",
            "Peer's time over ours: `plain` is the extracted network in eager PyTorch, channels-last; `slice` the usual"
            " slicing code around the full weights; `compile` the extracted network by torch.compile with frozen weights;"
            " `float32` our own float32; `onednn` the extracted network with linear layers that PyTorch's oneDNN packed ahead"
            " (the other peers' in float32 take MKL; how fast each is here stands under the roofline)."
            " Bold: a target was set for it; the last column names the targets that were missed.",
            "",
            *table(rows),
            "",
            *(on_threads(several) if several else []),
            "## Time over width",
            "",
            f"![time over width](results/{PLOTS['width'].name})",
            "",
        ]
    if measured:
        first = measured[0]
        lines += [
            "## Roofline",
            "",
            f"Every operation of two networks at batch 1, as the network runs (median; {first['date']}, commit"
            f" {first['commit']}, load {first['load']}); bytes are those of inputs, outputs and weights, each once:"
            f" [{LAYERS.name}](results/{LAYERS.name}). The line is what PyTorch reached in the same run: the faster product of"
            f" matrices, and a copy of what fits in no cache, {roof(measured, 'float32')[1]:.0f} GB/s. GFLOP/s of the products: "
            + "; ".join(
                f"{dtype} "
                + ", ".join(f"{library} {speed:.0f}" for library, speed in products(measured, dtype).items())
                for dtype in ("float32", "bfloat16")
            )
            + ". Activations at batch 1 mostly lie in a cache, and Winograd's products are counted as those of the direct"
            " form that they stand for: both may lie above the line.",
            "",
            f"![roofline](results/{PLOTS['roofline'].name})",
            "",
            *(
                f"A switch between two packed widths of {row['net']} took {row['us']} us (median; asked for: under 50)."
                for row in measured
                if row["layer"] == SWITCH
            ),
            "",
        ]
    return "\n".join(lines)


def digest(name: str) -> str:
    rows = rows_of_networks() if name == "width" else layers()
    return hashlib.sha256(repr([sorted(row.items()) for row in rows]).encode()).hexdigest()[:16]


def plot(name: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = name
    import matplotlib.pyplot as plt

    if name == "width":
        parts = [p for (_, _, dtype), p in workloads(rows_of_networks()).items() if dtype == "float32"]
        figure, axes = plt.subplots(
            2, (len(parts) + 1) // 2, figsize=(2.6 * ((len(parts) + 1) // 2), 5.4), squeeze=False
        )
        for ax, part in zip(axes.flat, parts, strict=False):
            for i, provider in enumerate(("slimkernels", "plain", "slice", "compile")):
                timed = [
                    (float(r["width"]), float(r["p50_us"]) / 1e3)
                    for r in part
                    if r["provider"] == provider and r["p50_us"]
                ]
                if timed:
                    ax.plot(*zip(*timed, strict=True), marker="o", markersize=3, color=f"C{i}", label=provider)
            ax.set_title(f"{part[0]['net']} {part[0]['shape']}", fontsize=7)
            ax.set_ylim(bottom=0)
            ax.tick_params(labelsize=6)
        axes[0][0].set_ylabel("ms", fontsize=7)
        axes[0][0].legend(fontsize=6)
        for ax in axes[-1]:
            ax.set_xlabel("width", fontsize=7)
        for ax in list(axes.flat)[len(parts) :]:
            ax.remove()
    else:
        measured = layers()
        rows = [row for row in measured if float(row["mflops"]) > 0 and row["net"] != CEILING]
        kinds = sorted({(row["net"], row["dtype"]) for row in rows})
        figure, axes = plt.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 3.2), sharey=True, squeeze=False)
        for ax, kind in zip(axes[0], kinds, strict=True):
            for i, width in enumerate(sorted({r["width"] for r in rows if (r["net"], r["dtype"]) == kind})):
                for winograd, marker in ((False, "o"), (True, "^")):
                    part = [
                        r
                        for r in rows
                        if (r["net"], r["dtype"], r["width"]) == (*kind, width)
                        and ("winograd" in r["runs_on"].lower()) == winograd
                    ]
                    x = [float(r["mflops"]) * 1e3 / float(r["kbytes"]) for r in part]
                    label = f"width {width}" + (", Winograd" if winograd else "")
                    if part:
                        y = [gflops(r) for r in part]
                        ax.scatter(x, y, s=10, alpha=0.7, marker=marker, color=f"C{i}", label=label)
            peak, bandwidth = roof(measured, kind[1])
            x = [0.4, peak / bandwidth, 500]
            ax.plot(x, [min(peak, bandwidth * intensity) for intensity in x], color="black", linewidth=0.8)
            ax.set(xscale="log", yscale="log", xlabel="operations a byte")
            ax.set_title(" ".join(kind), fontsize=8)
            ax.legend(fontsize=6)
        axes[0][0].set_ylabel("GFLOP/s")
    figure.tight_layout()
    figure.savefig(PLOTS[name], metadata={"Date": None, "Description": f"rows {digest(name)}"})
    plt.close(figure)


def stale() -> list[Path]:
    found = [] if PAGE.exists() and PAGE.read_text() == page() else [PAGE]
    known = {"width": bool(rows_of_networks()), "roofline": bool(layers())}
    for name, path in PLOTS.items():
        if known[name] and (not path.exists() or f"rows {digest(name)}" not in path.read_text()):
            found.append(path)
    return found


def main(check: bool = False) -> int:
    names = stale()
    if check:
        if names:
            print(
                f"stale: {', '.join(p.name for p in names)}; type 'python -m benchmarks.deploy_page'", file=sys.stderr
            )
        return 1 if names else 0
    PAGE.write_text(page())
    for name, path in PLOTS.items():
        if path in names:
            plot(name)
    print(f"written: {', '.join(p.name for p in names) or 'nothing new'}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="time every operation anew")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.measure:
        measure()
    raise SystemExit(main(arguments.check))
