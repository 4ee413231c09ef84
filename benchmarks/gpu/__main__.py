"""``python -m benchmarks.gpu``: builds, tests and times everything on this machine's GPU in at most 9 minutes.

Every step is a process of its own with a deadline: one that dies or hangs does not end the others, and goes on behind
what it died of. Without a GPU it is a dry run, which checks the plumbing of each step. The exit status is 0 when no step
failed or died.
"""

import argparse
import csv
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu import checks, report
from benchmarks.gpu.runner import Job, Result, Runner
from benchmarks.gpu.step import STEPS

# Alone on the GPU, in this order, each with the seconds it may take: first what the rest needs, then what is timed.
FIRST = {"build": 90, "ceilings": 25}
TIMED = {
    "training": 60,
    "generation": 25,
    "network resnet50": 30,
    "network mobilenet_v2": 25,
    "network vit_small": 25,
    "op slim_conv": 45,
    "op slim_linear": 35,
    "op inr_weights": 20,
    "op slim_batch_norm": 35,
}
OTHER_OP_S = 12
TIMED |= {name: OTHER_OP_S for name in STEPS if name.startswith("op ") and name not in TIMED}
TOGETHER_S = 220  # tests, sanitizer, recompilations, and all that is timed once without a clock, to fill the caches
KEPT_S = 230  # of the whole for what is timed
GROUPS = ("build", "ceilings", "tests", "sanitizer", "recompiles", "training", "generation", "networks", "ops")


@dataclass
class Options:
    out: Path
    minutes: float
    only: list[str] | None
    every_shape: bool
    dry: bool

    def wants(self, name: str) -> bool:
        kind = name.split(" ", 1)[0]
        return not self.only or {"network": "networks", "op": "ops"}.get(kind, kind) in self.only


def step_job(options: Options, name: str, seconds: float, how: str) -> Job:
    words = [sys.executable, "-m", "benchmarks.gpu.step", name, "--out", str(options.out), "--how", how]
    threads = {"OMP_NUM_THREADS": "1"} if options.dry or how == "warm" else {}
    compilers = {"TORCHINDUCTOR_COMPILE_THREADS": "2"} if how == "warm" else {}
    if options.every_shape:
        words.append("--every-shape")
    job = Job(f"{name} (warm)" if how == "warm" else name, words, seconds, threads | compilers)
    job.silence = 180  # a compiler may be at work for long
    return job


class Run:
    def __init__(self, options: Options) -> None:
        self.options, self.begin = options, time.monotonic()
        self.runner = Runner(options.out, self.begin + 60 * options.minutes)
        self.results: list[Result] = []
        self.writing = threading.Lock()
        options.out.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.csv", "*.md", "*.png", "*.txt", "items/*.jsonl", "logs/*.txt"):
            for old in options.out.glob(pattern):
                old.unlink()

    def finished(self, result: Result) -> None:
        """Its line in steps.csv, and the report as it stands: a run that is cut off has one too."""
        with self.writing:
            self.write(result)

    def write(self, result: Result) -> None:
        self.results.append(result)
        path = self.options.out / "steps.csv"
        new = not path.exists()
        with path.open("a", newline="") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            if new:
                writer.writerow(["step", "status", "seconds", "told"])
            writer.writerow([result.name, result.status, f"{result.seconds:.1f}", result.told])
        print(f"{time.monotonic() - self.begin:6.1f} s  {result.name}: {result.status}: {result.told}", flush=True)
        report.write(self.options.out, self.options.dry)

    def left(self) -> float:
        return self.runner.until - time.monotonic()

    def alone(self, names: dict[str, int], how: str) -> None:
        whole = self.left()
        chosen = [name for name in names if self.options.wants(name)]
        if self.options.dry:  # one small network stands for all
            small = [name for name in chosen if name.startswith("network ")][:1]
            chosen = [name for name in chosen if not name.startswith("network ") or name in small]
        # A dry run times nothing: on a busy machine it may take what it needs. A few steps have all the time.
        seconds = {name: whole if self.options.dry else names[name] for name in chosen}
        if self.options.only and not self.options.dry and chosen:
            scale = max(1.0, 0.9 * whole / sum(seconds.values()))
            seconds = {name: scale * value for name, value in seconds.items()}
        jobs = [step_job(self.options, n, s, how) for n, s in seconds.items()]
        self.runner.run(jobs, 2 if self.options.dry else 1, finished=self.finished)

    def together(self) -> None:
        options, whole = self.options, self.left()
        timed = [name for name in TIMED if options.wants(name)]
        seconds = whole if options.dry or not timed else min(TOGETHER_S, whole - KEPT_S)
        warm = [] if options.dry else [step_job(options, name, seconds, "warm") for name in timed]
        jobs = []
        if options.wants("recompiles"):
            jobs.append(step_job(options, "recompiles", seconds, "dry" if options.dry else "timed"))
        if options.wants("sanitizer"):
            sanitizers = [] if options.dry else checks.sanitizer_jobs(options.out, seconds)
            jobs += sanitizers
            if not sanitizers:
                told = "dry" if options.dry else "compute-sanitizer is not installed"
                self.finished(Result("sanitizer", "ok", 0.0, told, []))
        if options.wants("tests"):
            jobs += checks.test_jobs(options.out, options.dry, seconds)
        # Two lanes, so that neither waits for all of the other.
        until, cores = time.monotonic() + seconds, max(2, (os.cpu_count() or 2) - 2)
        lanes = [
            (warm, cores // 3 if jobs else cores),
            (jobs, 1 if options.dry else cores - (cores // 3 if warm else 0)),
        ]
        with ThreadPoolExecutor(2) as pool:
            found = [pool.submit(self.runner.run, lane, max(1, n), until, self.finished) for lane, n in lanes]
        for each in found:
            each.result()


def main(options: Options) -> int:
    run = Run(options)
    how = "dry" if options.dry else "timed"
    run.alone(FIRST, how)
    run.together()
    run.alone(TIMED, how)
    bad = [result.name for result in run.results if result.status in ("failed", "died")]
    print(f"{options.out / 'report.md'}{', failed: ' + ', '.join(bad) if bad else ''}")
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", nargs="*", choices=GROUPS, help="these alone, with all the time for them")
    parser.add_argument("--every-shape", action="store_true", help="time each shape of op-shapes.csv (--only ops)")
    arguments = parser.parse_args()
    dry = not torch.cuda.is_available()
    raise SystemExit(main(Options(arguments.out, arguments.minutes, arguments.only, arguments.every_shape, dry)))
