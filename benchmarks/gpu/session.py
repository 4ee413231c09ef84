"""What a step of ``make gpu`` works with: its folder, its clock, its items, and how a call is timed."""

import contextlib
import csv
import fcntl
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.gpu.progress import CONTEXT_LOST, Progress, context_error, file_name

FLUSH_BYTES = 2**28  # more than the last-level cache of any GPU at hand
Samples = tuple[list[float], list[float]]  # ms: with cold caches; of calls one behind the other


def job_name(step: str, how: str, part: tuple[int, int] = (0, 1)) -> str:
    """Of a step's process, in the list of steps."""
    if how != "warm":
        return step
    return f"{step} (warm)" if part[1] == 1 else f"{step} (warm {part[0] + 1} of {part[1]})"


class Session:
    """One step in a process of its own. Results are written as they come: a step that dies or is cut keeps what it has.

    ``how``: "timed"; "warm" runs all once, to fill the compilers' caches, and writes no row; "dry" does that with tiny
    shapes on the CPU and writes rows without times. ``part``: (3, 8) is the fourth of eight equal parts.
    """

    def __init__(self, out: Path, step: str, how: str, part: tuple[int, int] = (0, 1)) -> None:
        self.out, self.step, self.how, self.part = out, step, how, part
        self.dry = how == "dry"
        self.device = torch.device("cpu" if self.dry else "cuda")
        self.until = float(os.environ.get("SLIMKERNELS_GPU_UNTIL", "inf"))
        self.progress = Progress(out / "items" / f"{file_name(job_name(step, how, part))}.jsonl")
        self.seen = self.progress.items()
        self.ceilings = self._ceilings()  # bytes/s of "memory", FLOP/s of each precision
        self._flushed: torch.Tensor | None = None

    def left(self) -> float:
        """Seconds that this step may still take."""
        return self.until - time.time()

    @contextlib.contextmanager
    def item(self, name: str) -> Iterator[None]:
        """A part of the step whose error does not end the others. After a lost CUDA context the process ends, and the
        next one goes on behind this item."""
        self.progress.start(name)
        try:
            yield
        except Exception as error:  # the report names it, and the exit status is not 0
            told = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            traceback.print_exc()
            self._end_if_lost(name)
            self.progress.done(name, "failed", told)
        else:
            self._end_if_lost(name)
            self.progress.done(name, "ok")

    def todo(self, name: str) -> bool:
        """Whether an item is still to be done, and there is time for it."""
        return name not in self.seen and self.left() > 0

    def _end_if_lost(self, name: str) -> None:
        if lost := context_error():
            self.progress.done(name, "died", lost)
            os._exit(CONTEXT_LOST)

    def row(self, file: str, **values: object) -> None:
        """One more line of ``<file>.csv``; the columns are those of its first."""
        if self.how == "warm":
            return
        with (self.out / f"{file}.csv").open("a+", newline="") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)  # other steps may write here too
            opened.seek(0)
            header = next(csv.reader(opened), None)
            columns = header or list(values)
            if missing := set(values) - set(columns):
                raise ValueError(f"{file}.csv has no columns {missing}")
            writer = csv.DictWriter(opened, columns, restval="", lineterminator="\n")
            if header is None:
                writer.writeheader()
            writer.writerow(values)

    def timing(self, call: Callable[[], object], seconds: float = 0.1) -> tuple[float, float]:
        """Medians of ``samples``; nan where nothing is timed."""
        cold, behind = self.samples(call, seconds)
        return median(cold), median(behind)

    def samples(self, call: Callable[[], object], seconds: float) -> Samples:
        """Milliseconds of one call by CUDA events: of the GPU's work with cold caches, and of calls one behind the other, in
        which the CPU's part shows where it is longer; ``seconds`` for each of the two, and ten calls in any case. Not
        timed: the call is made once."""
        if self.how != "timed":
            call()
            return [], []
        if self._flushed is None:
            with torch.inference_mode(False):  # what is made within it cannot be written outside
                self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        seconds = min(seconds, max(self.left(), 0.02))
        cold: list[float] = []
        end = time.monotonic() + seconds
        while not cold or (time.monotonic() < end and len(cold) < 500):
            # The CPU runs ahead while the cache is overwritten, so that the launches do not count.
            pairs = [self._one(call) for _ in range(10)]
            torch.cuda.synchronize()
            cold += [first.elapsed_time(last) for first, last in pairs]
        behind: list[float] = []
        end = time.monotonic() + seconds
        repeats = max(1, min(100, int(2 / max(statistics.median(cold), 1e-3))))  # about 2 ms
        while not behind or (time.monotonic() < end and len(behind) < 100):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(repeats):
                call()
            last.record()
            last.synchronize()
            behind.append(first.elapsed_time(last) / repeats)
        return cold, behind

    def _one(self, call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        assert self._flushed is not None
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        first.record()
        call()
        last.record()
        return first, last

    def milliseconds(self, call: Callable[[], object], seconds: float = 0.3) -> float:
        """Of calls one behind the other: what a loop over whole networks takes."""
        return self.timing(call, seconds)[1]

    def memory(self, call: Callable[[], object]) -> float:
        """Highest MiB allocated in one call above what was there before; not timed: nan."""
        if self.how != "timed":
            call()
            return float("nan")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def bound(self, flops: float, bytes_: float, precision: str) -> float:
        """Milliseconds that the roofline measured on this machine allows at best; nan where it was not measured."""
        if precision not in self.ceilings or "memory" not in self.ceilings:
            return float("nan")
        return 1e3 * max(flops / self.ceilings[precision], bytes_ / self.ceilings["memory"])

    def _ceilings(self) -> dict[str, float]:
        path = self.out / "ceilings.csv"
        if self.dry or not path.exists():
            return {}
        with path.open(newline="") as opened:
            return {row["what"]: float(row["per_second"]) for row in csv.DictReader(opened)}


def median(samples: list[float]) -> float:
    return statistics.median(samples) if samples else float("nan")


def run(step: Callable[[Session], str], session: Session) -> int:
    """The exit status: 0 where the step came to its end and nothing was wrong."""
    try:
        status, told = "ok", step(session)
    except Exception as error:  # the report names it, and the exit status is not 0
        traceback.print_exc()
        status, told = "failed", f"{type(error).__name__}: {error}"
    if told.startswith("red:"):
        status = "failed"
    session.progress.end(status, told)
    return 0 if status == "ok" else 1
