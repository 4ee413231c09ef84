"""Runs steps as processes of their own, each with a deadline, and goes on after one that died or hung."""

import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu.progress import CONTEXT_LOST, Progress, file_name

ROOT = Path(__file__).parent.parent.parent
GRACE_S = 5.0  # after its deadline a step that watches its clock ends by itself
STARTUP_S = 60.0  # until a process that imports torch must have told something


@dataclass
class Job:
    """A process to run. What it does goes to ``items/<name>.jsonl``, what it prints to ``logs/<name>.txt``."""

    name: str
    words: list[str]
    seconds: float  # of all its processes together
    environment: dict[str, str] = field(default_factory=dict)
    silence: float = 120.0  # seconds without a new event after which it hangs
    red: dict[int, str] = field(default_factory=dict)  # exit statuses that make it red whatever it says itself


@dataclass
class Result:
    name: str
    status: str  # ok, failed, died, cut or left out
    seconds: float
    told: str
    died: list[str]  # items, and how


@dataclass
class Running:
    job: Job
    progress: Progress
    process: subprocess.Popen
    begin: float  # of the first process
    born: float  # of this one
    items: int  # that earlier ones had


class Runner:
    def __init__(self, out: Path, until: float) -> None:
        self.out, self.until = out, until  # time.monotonic() of the end of the whole run

    def run(
        self,
        jobs: Iterable[Job],
        at_once: int = 1,
        until: float | None = None,
        finished: Callable[[Result], None] = lambda result: None,
    ) -> None:
        """Runs ``jobs`` in their order, ``at_once`` at a time; ``finished`` hears of each."""
        until = min(self.until, until or self.until)
        waiting, running = deque(jobs), list[Running]()
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.popleft()
                    if time.monotonic() >= until:
                        finished(Result(job.name, "left out", 0.0, "no time left", []))
                    else:
                        running.append(self.start(job, time.monotonic(), until))
                for each in list(running):
                    how = self.over(each, until)
                    if how is None:
                        continue
                    running.remove(each)
                    if again := self.again(each, how, until):
                        running.append(again)
                    else:
                        finished(self.result(each, how))
                time.sleep(0.05)
        finally:
            for each in running:
                kill(each.process)

    def start(self, job: Job, begin: float, until: float) -> Running:
        progress = Progress(self.out / "items" / f"{file_name(job.name)}.jsonl")
        log = self.out / "logs" / f"{file_name(job.name)}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        seconds = min(begin + job.seconds, until) - time.monotonic()
        environment = os.environ | job.environment | {"SLIMKERNELS_GPU_UNTIL": str(time.time() + seconds)}
        with log.open("ab") as opened:
            process = subprocess.Popen(
                job.words, cwd=ROOT, env=environment, stdout=opened, stderr=subprocess.STDOUT, start_new_session=True
            )
        return Running(job, progress, process, begin, time.monotonic(), len(progress.items()))

    def over(self, running: Running, until: float) -> str | None:
        """How the process ended; None while it runs. One that is late or hangs is killed."""
        status, now = running.process.poll(), time.monotonic()
        if status is not None:
            kill(running.process)  # what it left behind
            if status in running.job.red:
                return running.job.red[status]
            if status == CONTEXT_LOST:
                return "its CUDA context was lost"
            return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        if now > min(running.begin + running.job.seconds, until) + GRACE_S:
            kill(running.process)
            return "cut"
        path = running.progress.path
        heard = time.time() - path.stat().st_mtime if path.exists() else float("inf")
        alive = now - running.born
        told = heard < alive  # since this process was born
        silence = running.job.silence if told else max(running.job.silence, STARTUP_S)
        if min(heard, alive) > silence:
            kill(running.process)
            return f"hung: killed after {silence:.0f} s without a sign of life"
        return None

    def again(self, old: Running, how: str, until: float) -> Running | None:
        """The next process of a job whose last one died in the middle of an item."""
        if old.progress.ended() is not None:
            return None
        for item in old.progress.on():
            old.progress.done(item, "cut" if how == "cut" else "died", how)
        late = time.monotonic() > min(old.begin + old.job.seconds, until)
        if how == "cut" or late or len(old.progress.items()) == old.items:
            return None
        return self.start(old.job, old.begin, until)

    def result(self, running: Running, how: str) -> Result:
        items = running.progress.items()
        died = [f"{item}: {told}" for item, (event, told) in items.items() if event == "died"]
        failed = [f"{item}: {told}" for item, (event, told) in items.items() if event == "failed"]
        late = [f"no time for the rest of {item}" for item, (event, _) in items.items() if event == "cut"]
        fine = sum(event in ("ok", "skipped") for event, _ in items.values())
        status, told = running.progress.ended() or ("cut" if how == "cut" else "died", "")
        if how in running.job.red.values():
            status, told = "failed", how
        if status == "died" and not died:
            died.append(f"the step: {how}; {last_line(self.out / 'logs' / f'{file_name(running.job.name)}.txt')}")
        counted = f"{fine} of {len(items)} done" if items else ""
        bad = [f"died: {each}" for each in died] + [f"failed: {each}" for each in failed]
        words = "; ".join(
            filter(None, [told, counted, *late, *bad[:3], f"{len(bad) - 3} more" if len(bad) > 3 else ""])
        )
        if died:
            status = "died"
        elif failed:
            status = "failed"
        elif status == "ok" and told.startswith("cut"):
            status = "cut"
        return Result(running.job.name, status, time.monotonic() - running.begin, words, died)


def last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.exists() else []
    return lines[-1][:300] if lines else "it printed nothing"


def kill(process: subprocess.Popen) -> None:
    """The process and its children, which are in a session of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
