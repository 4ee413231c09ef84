"""``python -m benchmarks.run [op] [--quick] [--threads N]``: runs bench files, replaces their rows in
``results/<machine>.csv`` (of several threads: ``results/<machine>-<N>-threads.csv``).

Afterwards ``python -m benchmarks.report`` brings the tables and the plots up to date.
"""

import argparse
import csv
import datetime
import importlib
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

from benchmarks import harness

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
COLUMNS = [
    *("op", "net", "width", "shape", "dtype", "mode", "provider", "p20_us", "p50_us", "p80_us", "ratio", "extra_mb"),
    *("gate", "count", "note", "run", "threads", "load", "machine", "isa", "torch", "commit", "date"),
]
BUDGET_S = {"quick": 0.05, "full": 0.04}  # of timing a case, mode and provider; at least 7 samples


def ops() -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))


def machine() -> str:
    """CPU model; a name that says nothing is followed by family and model."""
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


def isa() -> str:
    return torch.backends.cpu.get_cpu_capability()


def results_file(threads: int = 1) -> Path:
    several = f" {threads} threads" if threads > 1 else ""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{machine()} {isa()}{several}".lower()).strip("-")
    return RESULTS / f"{slug}.csv"


def commit() -> str:
    """Short id of the commit; "+" when tracked files outside the results differ from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=FOLDER, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results", ":!../README.md", ":!*.md")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "") or "unknown"


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    aside = path.with_suffix(".tmp")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(aside, path)


def named(case) -> str:
    """What ``--only`` looks in."""
    return f"{case.net} {case.width} {case.shape} {str(case.dtype).removeprefix('torch.')}"


def name(row: dict[str, str]) -> tuple[str, ...]:
    """Of the case that a row belongs to."""
    return tuple(row[key] for key in ("op", "net", "width", "shape", "dtype"))


def run_op(op: str, quick: bool, threads: int, only: str | None = None) -> int:
    """Measures one op and replaces its rows (``only``: those of the cases with this in their names); returns the number
    of red gates of slimkernels' own."""
    bench = importlib.import_module(f"benchmarks.bench_{op}")
    kind = "quick" if quick else "full"
    about = {
        "op": op,
        "run": kind,
        "threads": threads,
        "load": f"{os.getloadavg()[0]:.1f}",  # processes that wanted a core in the minute before
        "machine": machine(),
        "isa": isa(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    start, rows, red = time.time(), [], 0
    cases = [case for case in bench.cases(quick) if only is None or only in named(case)]
    if not cases:
        raise ValueError(f"bench: expected a case of {op} with {only!r} in its name, got none")
    measure = getattr(bench, "measure", harness.measure)  # a bench file of whole steps has its own
    for i, case in enumerate(cases, 1):
        for row in measure(case, BUDGET_S[kind]):
            rows.append({key: str(value) for key, value in (about | row).items()})
            if row["provider"] == "slimkernels" and row["gate"] != "ok":
                red += 1
                print(f"RED {op} {case.net} {case.shape} {case.dtype} {row['mode']}: {row['gate']}", flush=True)
        last = [row for row in rows if row["shape"] == case.shape and row["net"] == case.net]
        ratios = " ".join(f"{row['mode'][:2]}/{row['provider']}={row.get('ratio', '-')}" for row in last[-12:])
        print(f"{op} {i}/{len(cases)} {case.net} w={case.width} {case.shape} {case.dtype}: {ratios}", flush=True)
    path = results_file(threads)
    measured = {name(row) for row in rows}
    before = read(path)
    kept = [row for row in before if row["op"] != op or (only is not None and name(row) not in measured)]
    places = {case: i for i, case in enumerate(dict.fromkeys(map(name, before)))} if only is not None else {}
    write(path, sorted(kept + rows, key=lambda row: (row["op"], places.get(name(row), len(places)))))
    print(f"{op}: {len(rows)} rows in {time.time() - start:.0f} s, {red} red, written to {path.name}", flush=True)
    return red


def main(
    op: str | None = None, quick: bool = False, threads: int = 1, resume: bool = False, only: str | None = None
) -> int:
    """Runs one op or all; returns the exit status. ``resume`` leaves out ops whose rows are of this commit and kind."""
    if only is not None and op is None:
        raise ValueError("bench: expected an op beside --only, got none")
    if op is not None and op not in ops():
        raise ValueError(f"bench: expected op to be one of {', '.join(ops())}, got {op!r}")
    harness.one_thread_environment(threads)
    kind, red = "quick" if quick else "full", 0
    done = (
        {row["op"] for row in read(results_file(threads)) if (row["commit"], row["run"]) == (commit(), kind)}
        if resume
        else set()
    )
    for each in [op] if op else ops():
        if each in done:
            print(f"{each}: done at this commit")
        else:
            red += run_op(each, quick, threads, only)
    return 1 if red else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", nargs="?", help=f"one of {', '.join(ops())}; all when left out")
    parser.add_argument(
        "--quick", action="store_true", help="the heaviest layer of each net at two widths, short timing"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="leave out ops already measured at this commit")
    parser.add_argument("--only", help="of one op: the cases with this text in network, width, shape and dtype")
    arguments = parser.parse_args()
    raise SystemExit(main(arguments.op, arguments.quick, arguments.threads, arguments.resume, arguments.only))
