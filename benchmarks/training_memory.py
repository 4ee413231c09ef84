"""Peak memory of a training step, in a process of its own: what is held, and what the process is resident with.

``held``: the most that the C heap holds during a step (``heap_peak.c`` counts every allocation: tensors, oneDNN's and our
kernels' workspaces, Python's objects) above what it held before the step without gradients. Parameters and the optimizer's
state are thus left out, gradients are in.

``resident``: the same in resident memory, which also has freed blocks that the C heap keeps for later. With
``MALLOC_MMAP_THRESHOLD_=131072`` it gives large ones back at once, and resident memory is then what is held, to a per cent
(``returned``).

The code is loaded and the optimizer's state made by a step of two images before; by one of all images where it is compiled.
"""

import ctypes
import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("heap_peak.c")
ROOT = SOURCE.parent.parent


@dataclass
class Peak:
    held_mb: float
    resident_mb: float
    returned_mb: float

    def note(self) -> str:
        return f"resident +{self.resident_mb:.0f} MiB, with large blocks given back +{self.returned_mb:.0f} MiB"


@cache
def counter() -> tempfile.TemporaryDirectory:
    """Holds ``heap_peak.so``."""
    folder = tempfile.TemporaryDirectory()
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", f"{folder.name}/heap_peak.so", str(SOURCE)], check=True)
    return folder


def of_process(*arguments: str) -> Peak:
    """Runs ``python arguments`` twice; its last line is what ``of_step`` printed."""
    own = {"LD_PRELOAD": f"{counter().name}/heap_peak.so", "PYTHONMALLOC": "malloc"}
    command = [sys.executable, *arguments]

    def run(extra: dict[str, str]) -> list[float]:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ | own | extra
        )
        return [float(part) for part in done.stdout.split()[-2:]]

    held, resident = run({})
    return Peak(held, resident, run({"MALLOC_MMAP_THRESHOLD_": "131072"})[1])


def status_kb(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def of_step(step: Callable[[], object]) -> None:
    """Prints the peaks of one step, in MiB. Runs under ``of_process``."""
    heap = ctypes.CDLL(None)
    heap.heap_held.restype = heap.heap_peak.restype = ctypes.c_longlong
    gc.collect()
    heap.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the resident peak starts from here
    resident = status_kb("VmRSS")
    heap.heap_restart()
    held = heap.heap_held()
    step()
    print((heap.heap_peak() - held) / 2**20, (status_kb("VmHWM") - resident) / 2**10)
