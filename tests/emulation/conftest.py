"""Rungs that show GPU kernels right without a GPU.

Triton's interpreter takes a process of its own: kernels are either compiled or interpreted, which ``TRITON_INTERPRET``
decides when they are imported. So tests marked ``interpreted`` run with ``TRITON_INTERPRET=1`` and the others without.
"""

import importlib.util
import os

import pytest

# What takes long runs in `make test-gpu-emulated` only.
EVERYTHING = os.environ.get("SLIMKERNELS_EMULATE_ALL") == "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COUNTS = pytest.StashKey[tuple[int, int]]()
HAS_TRITON = importlib.util.find_spec("triton") is not None

# Triton 3.9 warns that its default will change; the kernels are meant to be fused.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

if INTERPRETED and HAS_TRITON:
    from tests.emulation import interpreter

    interpreter.install()


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreted: on Triton's interpreter, in a process with TRITON_INTERPRET=1")
    config.addinivalue_line("markers", "slow_emulation: runs in make test-gpu-emulated only")


def pytest_collection_modifyitems(config, items):
    """Only the tests of this process's kind stay; the summary tells of the others."""
    here = [item for item in items if config.rootpath / "tests" / "emulation" in item.path.parents]
    others = [item for item in here if bool(item.get_closest_marker("interpreted")) != INTERPRETED]
    slow = [item for item in here if item not in others and item.get_closest_marker("slow_emulation")]
    left = others + ([] if EVERYTHING else slow)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]
    config.stash[COUNTS] = len(others), 0 if EVERYTHING else len(slow)


def pytest_terminal_summary(terminalreporter, config):
    others, slow = config.stash.get(COUNTS, (0, 0))
    need = "without TRITON_INTERPRET=1 (kernels compiled)" if INTERPRETED else "with TRITON_INTERPRET=1"
    if others:
        terminalreporter.write_line(f"{others} tests of tests/emulation run in another process, {need}: see make test")
    if slow:
        terminalreporter.write_line(f"{slow} slow tests of tests/emulation run in make test-gpu-emulated only")
