"""What ``inr_weights`` reaches of the core's matrix speed, its memory over coordinates, and the cost of samples, on one thread:
``python -m benchmarks.inr_scaling`` writes ``results/hyper/inr-*.csv`` and the plot of the memory.
"""

import argparse
import csv
import os
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, run
from benchmarks.bench_inr_weights import (
    NORM,
    WORKLOADS,
    Convolutions,
    Generator,
    Ours,
    Published,
    Recomputing,
    residual_stage,
)
from slimkernels.ops import inr_weights
from slimkernels.ops.inr_weights import coordinates

FOLDER = run.RESULTS / "hyper"
CHANNELS = (16, 32, 64, 128, 192, 256)
SAMPLES = (1, 2, 50)


def about() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "machine": run.machine(),
        "isa": run.isa(),
        "torch": torch.__version__,
        "commit": run.commit(),
    }


def medians(calls: dict[str, Callable[[], object]], budget_s: float) -> dict[str, float]:
    return {name: statistics.median(samples) for name, samples in harness.interleaved(calls, budget_s).items()}


def products(module: Generator) -> float:
    """Floating-point operations of the matrix products that are left when the first layer is a sum of tables."""
    points = coordinates(module.tensors, module.active)
    depth, hidden = module.b_hidden.shape[1:]
    return 2.0 * points * hidden * (depth * hidden + module.w_out.shape[1])


def gemm_share(names: Sequence[str], budget_s: float) -> list[dict[str, Any]]:
    """The op's speed on those products over the best that PyTorch offers for a product of matrices of the same kind, (8192, 256)
    times (256, 256), in turns: ``a @ b`` and oneDNN's linear layer."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(8192, 256).to(dtype), torch.randn(256, 256).to(dtype)
        am, bm = a.to_mkldnn(), b.to_mkldnn()
        gemms: dict[str, Callable[[], object]] = {
            "matmul": lambda a=a, b=b: a @ b,
            "onednn": partial(torch._C._nn.mkldnn_linear, am, bm),
        }
        speeds, gemm = {}, 0.0  # the matrix speed is the best of all runs: the first ones are slower
        for name in names:
            module = Ours(WORKLOADS[name], 256, 4, 16, dtype).eval()
            scale = torch.ones(len(module.tensors), dtype=dtype)
            with torch.inference_mode():
                found = medians({**gemms, "ours": lambda m=module, s=scale: m(s)}, budget_s)
            gemm = max(gemm, 2.0 * 8192 * 256 * 256 / min(found[peer] for peer in gemms))
            speeds[name] = coordinates(module.tensors, module.active), found["ours"], products(module) / found["ours"]
        for name, (count, seconds, ours) in speeds.items():
            rows.append(
                {"net": name, "coordinates": count, "dtype": str(dtype)[6:], "ms": f"{1e3 * seconds:.2f}"}
                | {"gflops": f"{ours / 1e9:.1f}", "gemm_gflops": f"{gemm / 1e9:.1f}", "share": f"{ours / gemm:.3f}"}
            )
    return rows


def memory(channels: Sequence[int]) -> list[dict[str, Any]]:
    """Peak extra memory of forward and backward of one residual block, gradients included."""
    rows = []
    for count in channels:
        shapes: Convolutions = residual_stage(count, 1)
        torch.manual_seed(0)
        modules = {"eager": Published, "full": Ours, "recompute": Recomputing}
        row: dict[str, Any] = {"channels": count}
        for name, kind in modules.items():
            module = kind(shapes, 256, 4, 16, torch.float32)
            row["coordinates"] = coordinates(module.tensors, module.active)
            row["weights"] = sum(9 * out * into if into > 1 else out for out, into in module.active)
            row["parameters"] = sum(p.numel() for p in module.parameters())
            scale = torch.ones(len(module.tensors), requires_grad=True)
            call = harness.caller(harness.Provider(module, module, module, (scale,)), "full")
            call()
            row[f"{name}_mib"] = f"{harness.extra_bytes(call) / 2**20:.2f}"
        row["share"] = f"{float(row['recompute_mib']) / float(row['eager_mib']):.4f}"
        rows.append(row)
    return rows


def samples_cost(counts: Sequence[int], net: str, budget_s: float) -> list[dict[str, Any]]:
    """One call for the mean of K noisy samples, forward alone and with backward (recomputed)."""
    rows = []
    for noise in ("axis", "element"):
        module = Generator(WORKLOADS[net], 256, 4, 16, torch.float32)

        def forward(k: int, module: Generator = module, noise: str = noise) -> list[torch.Tensor]:
            return inr_weights(
                module.mlps(),
                module.tensors,
                module.active,
                norm=NORM,
                noise=noise,
                seed=0,
                samples=k,
                save="recompute",
            )

        def full(k: int, module: Generator = module, forward: Callable = forward) -> object:
            found = forward(k)
            return torch.autograd.grad(found, list(module.parameters()), [torch.ones_like(w) for w in found])

        for mode, call in (("forward", torch.no_grad()(forward)), ("full", full)):
            found = medians({str(k): lambda k=k, call=call: call(k) for k in counts}, budget_s)
            for k in counts:
                extra = harness.extra_bytes(lambda k=k, call=call: call(k)) / 2**20
                rows.append(
                    {"net": net, "noise": noise, "mode": mode, "samples": k, "ms": f"{1e3 * found[str(k)]:.2f}"}
                    | {"over_one": f"{found[str(k)] / found[str(counts[0])]:.2f}", "extra_mib": f"{extra:.2f}"}
                )
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    x = [int(row["coordinates"]) for row in rows]
    for name, label in (("eager", "the published way"), ("full", 'save="full"'), ("recompute", 'save="recompute"')):
        axes.plot(x, [float(row[f"{name}_mib"]) for row in rows], marker="o", label=label)
    sizes = [4 * (2 * int(row["weights"]) + int(row["parameters"])) / 2**20 for row in rows]
    axes.plot(x, sizes, "--", color="0.6", label="weights, their gradients, parameters' gradients")
    axes.set(xscale="log", yscale="log", xlabel="coordinates", ylabel="extra memory of forward and backward (MiB)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def write(name: str, rows: list[dict[str, Any]]) -> None:
    path = FOLDER / f"inr-{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about()], lineterminator="\n")
        writer.writeheader()
        writer.writerows([about() | row for row in rows])  # rows of an earlier run keep what they say of it
    for row in rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)


def main(budget_s: float = 1.0, only: str | None = None) -> None:
    harness.one_thread_environment(1)
    torch.manual_seed(0)
    if only in (None, "gemm-share"):
        write("gemm-share", gemm_share(("resnet20-last-block", "resnet20-all", "resnet18-layer3.1"), budget_s))
    if only in (None, "memory"):
        rows = memory(CHANNELS)
        write("memory", rows)
        plot(rows, FOLDER / "inr-memory.svg")
    if only in (None, "samples"):
        write("samples", samples_cost(SAMPLES, "resnet20-last-block", budget_s))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="timing of each call")
    parser.add_argument("--only", choices=("gemm-share", "memory", "samples"))
    arguments = parser.parse_args()
    main(arguments.seconds, arguments.only)
