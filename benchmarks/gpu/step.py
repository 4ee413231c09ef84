"""``python -m benchmarks.gpu.step NAME``: one step in this process. ``benchmarks.gpu`` starts it, and again after a fault."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.gpu import checks, timings
from benchmarks.gpu.session import Session, run

STEPS: dict[str, Callable[[Session], str]] = {
    "build": checks.build,
    "ceilings": checks.ceilings,
    "recompiles": checks.recompiles,
    "training": timings.time_training,
    "generation": timings.time_generation,
    **{f"network {name}": partial(timings.time_network, name=name) for name in timings.NETWORKS},
    "ops": timings.time_ops,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(STEPS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--how", choices=["timed", "warm", "dry"], default="timed")
    parser.add_argument("--part", default="0/1", help="3/8: the fourth of eight equal parts")
    arguments = parser.parse_args()
    number, parts = map(int, arguments.part.split("/"))
    session = Session(arguments.out, arguments.name, arguments.how, (number, parts))
    raise SystemExit(run(STEPS[arguments.name], session))
