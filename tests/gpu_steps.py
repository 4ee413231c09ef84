"""Steps that do what no step should: ``tests/test_gpu_run.py``, which has no GPU to break, runs them.

``python -m tests.gpu_steps NAME OUT``
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.session import Session, run


def dies(session: Session) -> str:
    """Its second item ends the process, as a fault in native code does."""
    for name in ("first", "second", "third"):
        if session.todo(name):
            with session.item(name):
                if name == "second":
                    os.kill(os.getpid(), signal.SIGSEGV)
    return "came to its end"


def dies_at_once(session: Session) -> str:
    print("no libcudart.so")
    os.kill(os.getpid(), signal.SIGABRT)
    return "came to its end"


def hangs(session: Session) -> str:
    """Its first item waits for ever, as a kernel with a missing barrier does."""
    for name in ("first", "second"):
        if session.todo(name):
            with session.item(name):
                while name == "first":
                    time.sleep(1)
    return "came to its end"


def loses_context(session: Session) -> str:
    """After its first item every call of CUDA fails, as after an illegal address."""

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore words")

    for name in ("first", "second"):
        if session.todo(name):
            if name == "first":
                torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, broken
            with session.item(name):
                pass
    return "came to its end"


def fails(session: Session) -> str:
    for name in ("first", "second"):
        if session.todo(name):
            with session.item(name):
                if name == "first":
                    raise ValueError("expected nothing")
    return "came to its end"


def takes_all_time(session: Session) -> str:
    done = 0
    while session.todo(str(done)):
        with session.item(str(done)):
            time.sleep(0.2)
        done += 1
    return f"cut: after {done} items"


if __name__ == "__main__":
    step, out = sys.argv[1:]
    raise SystemExit(run(globals()[step], Session(Path(out), step, "dry")))
