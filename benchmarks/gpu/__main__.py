"""``python -m benchmarks.gpu``: builds, tests and times everything on this machine's GPU in at most 9 minutes.

Without a GPU it is a dry run, which checks the plumbing of each step. The exit status is 0 when no step failed.
"""

import argparse
import csv
from pathlib import Path

import torch

from benchmarks.gpu import checks, report, timings
from benchmarks.gpu.session import Session

# Each with the seconds it may take.
STEPS = {
    "build": (checks.build, 90),
    "ceilings": (checks.ceilings, 20),
    "tests": (checks.tests, 150),
    "tests in tf32": (checks.tests_tf32, 40),
    "recompiles": (checks.recompiles, 30),
    "training": (timings.time_training, 40),
    "generation": (timings.time_generation, 30),
    "networks": (timings.time_networks, 80),
    "ops": (timings.time_ops, 120),
    "sanitizer": (checks.sanitizer, 60),
}


def main(out: Path, minutes: float, only: list[str] | None = None) -> int:
    session = Session(out, dry=not torch.cuda.is_available(), minutes=minutes)
    for name, (step, seconds) in STEPS.items():
        if not only or name in only:
            # A dry run times nothing: on a busy machine it may take what it needs.
            session.run(name, step, session.budget if session.dry else seconds)
            report.write(session)  # after each step: a run that is cut off has one too
    with (session.out / "steps.csv").open(newline="") as opened:
        failed = [row["step"] for row in csv.DictReader(opened) if row["status"] == "failed"]
    session.log(f"{session.out / 'report.md'}{', failed: ' + ', '.join(failed) if failed else ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", nargs="*", choices=list(STEPS))
    arguments = parser.parse_args()
    raise SystemExit(main(arguments.out, arguments.minutes, arguments.only))
