"""A plugin of pytest for ``make gpu``: each test's outcome is written as it ends, and a lost CUDA context ends the process.

A kernel's fault shows in the test that launched it, because each test ends with a synchronisation; the tests that an
earlier process has behind it are left out. ``-p benchmarks.gpu.outcomes``.
"""

import os
from pathlib import Path

import pytest

from benchmarks.gpu.progress import CONTEXT_LOST, Progress, context_error


def pytest_addoption(parser):
    group = parser.getgroup("make gpu")
    group.addoption("--progress", type=Path, help="file of the outcomes")
    group.addoption("--part", default="0/1", help="3/8: the fourth of eight equal parts")


def pytest_configure(config):
    config.pluginmanager.register(Outcomes(config), "slimkernels-outcomes")


class Outcomes:
    def __init__(self, config) -> None:
        self.progress = Progress(config.getoption("progress"))
        self.part, self.parts = map(int, config.getoption("part").split("/"))
        self.outcome, self.told, self.count = "ok", "", {"ok": 0, "failed": 0, "skipped": 0}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        seen = self.progress.items()
        kept = [t for i, t in enumerate(items) if i % self.parts == self.part and t.nodeid not in seen]
        config.hook.pytest_deselected(items=[t for t in items if t not in set(kept)])
        items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.progress.start(item.nodeid)
        self.outcome, self.told = "ok", ""
        result = yield
        if lost := context_error():
            self.progress.done(item.nodeid, "died", lost)
            os._exit(CONTEXT_LOST)
        self.progress.done(item.nodeid, self.outcome, self.told)
        self.count[self.outcome] += 1
        return result

    def pytest_runtest_logreport(self, report):
        if report.failed and self.outcome != "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            self.outcome, self.told = "failed", (crash.message if crash else report.longreprtext).split("\n")[0]
        elif report.skipped and self.outcome == "ok":
            self.outcome = "skipped"
            self.told = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.when

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        # 0: all passed, 1: some failed, 5: an earlier process had run them all.
        fine = exitstatus in (0, 1, 5)
        self.progress.end("ok" if fine else "failed", "" if fine else f"pytest ended with exit status {exitstatus}")
