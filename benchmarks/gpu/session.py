"""One run of ``make gpu``: its folder, its clock, and how a call is timed."""

import csv
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


class Session:
    """Results are written as they come, so that a run that is cut off keeps what it has.

    ``dry``: a machine without a GPU. Every step runs with tiny shapes on the CPU and times nothing.
    """

    def __init__(self, out: Path, dry: bool, minutes: float) -> None:
        self.out, self.dry = out, dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.start, self.budget = time.monotonic(), 60 * minutes
        self.step, self.step_ends = "", float("inf")
        self.ceilings: dict[str, float] = {}  # bytes/s of "memory", FLOP/s of each dtype
        self.files: dict[str, list[str]] = {}
        out.mkdir(parents=True, exist_ok=True)
        for old in [*out.glob("*.csv"), *out.glob("*.md"), *out.glob("*.png"), *out.glob("*.txt")]:
            old.unlink()

    def left(self) -> float:
        """Seconds that this step may still take."""
        now = time.monotonic()
        return min(self.start + self.budget, self.step_ends) - now

    def row(self, file: str, **values: object) -> None:
        """One more line of ``<file>.csv``; the columns are those of its first."""
        path = self.out / f"{file}.csv"
        columns = self.files.setdefault(file, list(values))
        if missing := set(values) - set(columns):
            raise ValueError(f"{file}.csv has no columns {missing}")
        new = not path.exists()
        with path.open("a", newline="") as opened:
            writer = csv.DictWriter(opened, columns, restval="", lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(values)

    def log(self, text: str) -> None:
        line = f"{time.monotonic() - self.start:6.1f} s  {text}"
        print(line, flush=True)
        with (self.out / "log.txt").open("a") as opened:
            opened.write(line + "\n")

    def run(self, name: str, step: Callable[["Session"], str], seconds: float) -> None:
        """A step: what it says, or the error that ended it, becomes a line of ``steps.csv``. The others go on."""
        self.step, begin = name, time.monotonic()
        self.step_ends = begin + seconds
        if self.left() <= 0:
            status, told = "left out", "no time left"
        else:
            try:
                status, told = "ok", step(self)
            except Exception as error:  # the report names it, and the exit status is not 0
                status, told = "failed", f"{type(error).__name__}: {error}"
                (self.out / f"error-{name}.txt").write_text(traceback.format_exc())
        if told.startswith("red:"):
            status = "failed"
        self.row("steps", step=name, status=status, seconds=f"{time.monotonic() - begin:.1f}", told=told)
        self.log(f"{name}: {status}: {told}")

    def milliseconds(self, call: Callable[[], object], seconds: float = 0.3) -> float:
        """Median of one call by CUDA events; dry: the call is made once and the time is nan."""
        if self.dry:
            call()
            return float("nan")
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        samples: list[float] = []
        end = time.monotonic() + min(seconds, max(self.left(), 0.05))
        while len(samples) < 10 or (time.monotonic() < end and len(samples) < 500):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            call()
            last.record()
            last.synchronize()
            samples.append(first.elapsed_time(last))
        return statistics.median(samples)

    def memory(self, call: Callable[[], object]) -> float:
        """Highest MiB allocated in one call above what was there before; dry: nan."""
        if self.dry:
            call()
            return float("nan")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def bound(self, flops: float, bytes_: float, dtype: torch.dtype) -> float:
        """Milliseconds that the roofline measured on this machine allows at best; nan in a dry run."""
        if self.dry:
            return float("nan")
        name = str(dtype).removeprefix("torch.")
        return 1e3 * max(flops / self.ceilings[name], bytes_ / self.ceilings["memory"])
