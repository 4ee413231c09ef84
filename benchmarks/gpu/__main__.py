"""``python -m benchmarks.gpu``: builds, tests and times everything on this machine's GPU in at most 9 minutes.

Every step is a process of its own with a deadline: one that dies or hangs does not end the others, and goes on behind
what it died of. Nine minutes hold the tests, the networks and the first cases of each op, network and dtype; the report
says how many of how many. ``--minutes 45`` times more of them, and ``--resume`` does what an earlier run left undone, in
its folder. Without a GPU it is a dry run, which checks the plumbing of each step. The exit status is 0 when no step
failed or died.
"""

import argparse
import csv
import hashlib
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu import checks, report
from benchmarks.gpu.progress import Progress
from benchmarks.gpu.runner import ROOT, Job, Result, Runner
from benchmarks.gpu.session import job_name

# Alone on the GPU, in this order, each with the seconds it may take: first what the rest needs, then what is timed.
FIRST = {"build": 90, "ceilings": 25}
TIMED = {
    "training": 60,
    "generation": 25,
    "network resnet50": 30,
    "network mobilenet_v2": 25,
    "network vit_small": 25,
}
LAST = {"ops": 85}  # at least; it takes all that is left
TOGETHER_S = 200  # tests, sanitizer, recompilations, and all that is timed once without a clock, to fill the caches
KEPT_S = 250  # of the whole for what is timed
MINUTES = 9.0  # for which the seconds above are meant; in a longer run they are as much longer
WARM_PARTS = 4  # of the ops, each a process
GROUPS = ("build", "ceilings", "tests", "sanitizer", "recompiles", "training", "generation", "networks", "ops")


@dataclass
class Options:
    out: Path
    minutes: float
    only: list[str] | None
    resume: bool
    dry: bool

    def wants(self, name: str) -> bool:
        kind = name.split(" ", 1)[0]
        return not self.only or {"network": "networks"}.get(kind, kind) in self.only

    def longer(self, seconds: float) -> float:
        return seconds * max(1.0, self.minutes / MINUTES)


def step_job(options: Options, name: str, seconds: float, how: str, part: tuple[int, int] = (0, 1)) -> Job:
    words = [sys.executable, "-m", "benchmarks.gpu.step", name, "--out", str(options.out), "--how", how]
    words.append(f"--part={part[0]}/{part[1]}")
    threads = {"OMP_NUM_THREADS": "1"} if options.dry or how == "warm" else {}
    compilers = {"TORCHINDUCTOR_COMPILE_THREADS": "2"} if how == "warm" else {}
    job = Job(job_name(name, how, part), words, seconds, threads | compilers)
    job.silence = 90 if name == "ops" else 180  # a compiler may be at work for long
    return job


def identity(dry: bool) -> dict[str, str]:
    """What one folder's results have in common: the sources, torch and the GPU, read without a CUDA context."""
    digest = hashlib.sha256()
    folders = {"slimkernels": "*.py", "benchmarks": "*.py", "tests": "*.py", "csrc/cuda": "*.*"}
    for path in sorted(p for folder, kind in folders.items() for p in (ROOT / folder).rglob(kind)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    told = [p.read_text() for p in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    models = [line.partition(":")[2].strip() for text in told for line in text.splitlines() if "Model" in line]
    gpu = "none: a dry run" if dry else ", ".join(models) or "a GPU"
    return {"sources": digest.hexdigest()[:16], "torch": torch.__version__, "GPU": gpu}


class Run:
    def __init__(self, options: Options) -> None:
        self.options, self.begin = options, time.monotonic()
        self.runner = Runner(options.out, self.begin + 60 * options.minutes)
        self.results: list[Result] = []
        self.writing = threading.Lock()
        self.steps: dict[str, list[str]] = {}  # the rows of steps.csv
        self.done: set[str] = set()  # steps of an earlier run that have nothing left to do
        options.out.mkdir(parents=True, exist_ok=True)
        known, about = options.out / "run.json", identity(options.dry)
        if options.resume and known.exists():
            self.reopen(json.loads(known.read_text()), about)
        else:
            for pattern in ("*.csv", "*.md", "*.png", "*.txt", "items/*.jsonl", "logs/*.txt"):
                for old in options.out.glob(pattern):
                    old.unlink()
        known.write_text(json.dumps(about))

    def reopen(self, before: dict[str, str], now: dict[str, str]) -> None:
        """Takes up the run in this folder: of what it came to the end of nothing is done again, but for the build."""
        for what, value in now.items():
            if before.get(what) != value:
                raise SystemExit(
                    f"make gpu: expected --resume in a folder of the same {what}, {value}, got {before.get(what)}; choose"
                    " another --out, or leave --resume out"
                )
        for path in sorted((self.options.out / "items").glob("*.jsonl")):
            Progress(path).reopen()
        path = self.options.out / "steps.csv"
        if path.exists():
            with path.open(newline="") as opened:
                self.steps = {row[0]: row for row in list(csv.reader(opened))[1:]}
        late = {name for name, row in self.steps.items() if row[1] in ("cut", "left out")}
        self.done = self.steps.keys() - late - {"build"}
        (self.options.out / "items" / "build.jsonl").unlink(missing_ok=True)

    def finished(self, result: Result) -> None:
        """Its line in steps.csv, and the report as it stands: a run that is cut off has one too."""
        with self.writing:
            self.write(result)

    def write(self, result: Result) -> None:
        self.results.append(result)
        self.steps[result.name] = [result.name, result.status, f"{result.seconds:.1f}", result.told]
        aside = self.options.out / "steps.tmp"
        with aside.open("w", newline="") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            writer.writerow(["step", "status", "seconds", "told"])
            writer.writerows(self.steps.values())
        aside.replace(self.options.out / "steps.csv")
        print(f"{time.monotonic() - self.begin:6.1f} s  {result.name}: {result.status}: {result.told}", flush=True)
        report.write(self.options.out, self.options.dry)

    def left(self) -> float:
        return self.runner.until - time.monotonic()

    def alone(self, names: dict[str, int], how: str) -> None:
        options, whole = self.options, self.left()
        chosen = [name for name in names if options.wants(name)]
        if options.dry:  # one small network stands for all
            small = [name for name in chosen if name.startswith("network ")][:1]
            chosen = [name for name in chosen if not name.startswith("network ") or name in small]
        chosen = [name for name in chosen if name not in self.done]
        # A dry run times nothing: on a busy machine it may take what it needs. A few steps have all the time.
        seconds = {n: whole if options.dry or n in LAST else options.longer(names[n]) for n in chosen}
        if options.only and not options.dry and chosen:
            scale = max(1.0, 0.9 * whole / sum(seconds.values()))
            seconds = {name: scale * value for name, value in seconds.items()}
        jobs = [step_job(options, n, s, how) for n, s in seconds.items()]
        self.runner.run(jobs, 2 if options.dry else 1, finished=self.finished)

    def together(self) -> None:
        options, whole = self.options, self.left()
        timed = [name for name in (*TIMED, *LAST) if options.wants(name) and name not in self.done]
        seconds = min(options.longer(TOGETHER_S), whole - options.longer(KEPT_S))
        if options.dry or not timed:
            seconds = whole
        warm = []
        for name in [] if options.dry else timed:
            parts = WARM_PARTS if name == "ops" else 1
            warm += [step_job(options, name, seconds, "warm", (part, parts)) for part in range(parts)]
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
        warm, jobs = ([job for job in lane if job.name not in self.done] for lane in (warm, jobs))
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
    run.alone(LAST, how)
    bad = [result.name for result in run.results if result.status in ("failed", "died")]
    print(f"{options.out / 'report.md'}{', failed: ' + ', '.join(bad) if bad else ''}")
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--only", nargs="*", choices=GROUPS, help="these alone, with all the time for them")
    parser.add_argument("--resume", action="store_true", help="what the run in that folder left undone, and no more")
    arguments = parser.parse_args()
    dry = not torch.cuda.is_available()
    raise SystemExit(main(Options(arguments.out, arguments.minutes, arguments.only, arguments.resume, dry)))
