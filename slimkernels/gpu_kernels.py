"""The table of the GPU kernels: what each takes on each target, and how it was shown right without a GPU.

``gpu_kernels.csv`` is generated in a source checkout by ``python -m tests.emulation.table``.
"""

import csv
from dataclasses import dataclass, fields
from pathlib import Path

PATH = Path(__file__).with_name("gpu_kernels.csv")

RUNGS = {
    "T1": "interpreted: indexing, masks, bounds, races between programs",
    "T2": "compiled ahead of time: no spills, shared memory within the limit, the right instructions",
    "T3": "the compiled code executed on the CPU",
    "C1": "compiled by nvcc without a warning or a spill",
    "C2": "run on CPU fibers in three orders of threads, bounds and barriers checked",
    "C3": "nvcc's PTX executed on the CPU",
    "C4": "the built library loads on a torch without a GPU",
}


@dataclass(frozen=True)
class Row:
    """One kernel for one dtype and target; "" where a column does not apply or was not counted."""

    kernel: str
    op: str
    direction: str
    dtype: str
    target: str
    registers: str  # a thread
    spills: str  # bytes
    shared: str  # bytes a block; where the launch decides them, of a small shape
    occupancy: str  # the most of a multiprocessor's warps that registers and shared memory let reside
    limiter: str  # what bounds it
    moved: str  # bytes that all kernels of this op and direction move, over the fewest possible
    rungs: str
    gpu: str  # when it was run on a GPU
    compiler: str
    source: str  # of what the row was made: changes with the code of the kernel and its launcher, not with comments


COLUMNS = [field.name for field in fields(Row)]


def read() -> list[Row]:
    """The rows, or ValueError where the table is of another version."""
    with PATH.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"gpu_kernels: expected the columns {COLUMNS}, got {reader.fieldnames}")
        return [Row(**row) for row in reader]
