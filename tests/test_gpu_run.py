"""``make gpu``: a step that dies, hangs or takes all the time does not end the others, and what it did is kept."""

import csv
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import __main__ as gpu_run
from benchmarks.gpu import checks, report, timings
from benchmarks.gpu.progress import Progress
from benchmarks.gpu.runner import GRACE_S, ROOT, Job, Result, Runner

TESTS_OF_ALL_KINDS = """
import os, signal, time
import pytest
import torch

def test_fine(): pass
def test_wrong(): assert 1 + 1 == 3, "sums are off"
def test_segfault(): os.kill(os.getpid(), signal.SIGSEGV)
def test_between(): pass
def test_illegal_address():
    def broken(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, broken
def test_left_out(): pytest.skip("no such device")
def test_hangs():
    while True: time.sleep(1)
def test_last(): pass
"""


def run(tmp_path, *names, seconds=60.0, silence=60.0, at_once=1, until=None):
    results = []
    jobs = [
        Job(name, [sys.executable, "-m", "tests.gpu_steps", name, str(tmp_path)], seconds, silence=silence)
        for name in names
    ]
    begin = time.monotonic()
    Runner(tmp_path, begin + (until or 300)).run(jobs, at_once, finished=results.append)
    return {result.name: result for result in results}, time.monotonic() - begin


def test_a_step_that_dies_goes_on_behind_what_it_died_of(tmp_path):
    results, _ = run(tmp_path, "dies", "loses_context", "fails", "dies_at_once", at_once=2)
    died = results["dies"]
    assert died.status == "died"
    assert died.died == ["second: signal SIGSEGV"]
    assert "came to its end; 2 of 3 done; died: second: signal SIGSEGV" in died.told
    lost = results["loses_context"]
    assert lost.died == ["first: CUDA error: an illegal memory access was encountered"]
    assert "1 of 2 done" in lost.told
    assert results["fails"].status == "failed"
    assert "failed: first: ValueError: expected nothing" in results["fails"].told
    assert results["dies_at_once"].died == ["the step: signal SIGABRT; no libcudart.so"]
    assert "came to its end" not in results["dies_at_once"].told


def test_a_step_that_hangs_is_killed_and_goes_on(tmp_path):
    results, _ = run(tmp_path, "hangs", silence=10.0)
    assert results["hangs"].status == "died"
    assert results["hangs"].died == ["first: hung: killed after 10 s without a sign of life"]
    assert "came to its end; 1 of 2 done" in results["hangs"].told


def test_a_step_ends_with_its_time_and_later_ones_are_left_out(tmp_path):
    results, seconds = run(tmp_path, "takes_all_time", "hangs", "fails", seconds=8.0, until=18)
    assert results["takes_all_time"].status == "cut"
    assert results["hangs"].status == "cut"
    assert [event for event, _ in Progress(tmp_path / "items" / "hangs.jsonl").items().values()] == ["cut"]
    assert results["fails"].status == "left out"
    assert seconds < 18 + GRACE_S + 5


def test_progress_survives_a_line_that_was_cut_off(tmp_path):
    progress = Progress(tmp_path / "items" / "step.jsonl")
    progress.start("a")
    progress.done("a", "ok")
    with progress.path.open("a") as opened:
        opened.write('{"item": "b", "eve')
    progress.start("c")
    assert progress.items() == {"a": ("ok", ""), "c": ("start", "")}
    assert (progress.on(), progress.ended()) == (["c"], None)
    progress.end("ok", "all")
    assert progress.ended() == ("ok", "all")


def test_each_test_is_recorded_and_a_fault_costs_that_test_only(tmp_path):
    file = tmp_path / "test_all_kinds.py"
    file.write_text(TESTS_OF_ALL_KINDS)
    job = checks.pytest_job(tmp_path, "tests made up", ["--confcutdir", str(tmp_path), str(file)], 120.0)
    job.silence = 10.0
    results = []
    Runner(tmp_path, time.monotonic() + 200).run([job], finished=results.append)
    found = {
        name.split("::")[1]: outcome
        for name, outcome in Progress(tmp_path / "items" / "tests-made-up.jsonl").items().items()
    }
    assert {name: event for name, (event, _) in found.items()} == {
        "test_fine": "ok",
        "test_wrong": "failed",
        "test_segfault": "died",
        "test_between": "ok",
        "test_illegal_address": "died",
        "test_left_out": "skipped",
        "test_hangs": "died",
        "test_last": "ok",
    }
    assert "sums are off" in found["test_wrong"][1]
    assert found["test_segfault"][1] == "signal SIGSEGV"
    assert found["test_illegal_address"][1] == "CUDA error: an illegal memory access was encountered"
    assert found["test_hangs"][1].startswith("hung: killed after 10 s")
    assert results[0].status == "died"
    assert len(results[0].died) == 3
    assert report.counted(tmp_path) == "3 passed, 1 skipped, 1 failed, 3 died, 0 cut"


def test_the_parts_of_a_test_file_hold_each_test_once(tmp_path):
    file = tmp_path / "test_many.py"
    file.write_text("import pytest\n\n@pytest.mark.parametrize('i', range(7))\ndef test_one(i): pass\n")
    jobs = [
        checks.pytest_job(tmp_path, f"tests {i}", ["--confcutdir", str(tmp_path), str(file), f"--part={i}/3"], 60.0)
        for i in range(3)
    ]
    results = []
    Runner(tmp_path, time.monotonic() + 100).run(jobs, finished=results.append)
    assert [result.status for result in results] == ["ok"] * 3
    names = [name for i in range(3) for name in Progress(tmp_path / "items" / f"tests-{i}.jsonl").items()]
    assert len(names) == len(set(names)) == 7


def test_jobs_for_a_gpu_name_files_that_are_there(tmp_path):
    jobs = checks.test_jobs(tmp_path, False, 10.0)
    files = {word for job in jobs for word in job.words if word.startswith("tests/")}
    assert all((ROOT / file).exists() for file in files)
    assert files == set(checks.test_files())
    assert len({job.name for job in jobs}) == len(jobs)
    assert all(job.environment["SLIMKERNELS_TEST_DEVICE"] == "cuda" for job in jobs)


def test_the_times_of_the_steps_fit_the_whole():
    assert sum(gpu_run.FIRST.values()) + gpu_run.TOGETHER_S <= 60 * gpu_run.MINUTES - gpu_run.KEPT_S + 30
    assert sum(gpu_run.TIMED.values()) + sum(gpu_run.LAST.values()) <= gpu_run.KEPT_S
    assert {name.split()[0] for name in gpu_run.TIMED} == {"training", "generation", "network"}


def finished_run(out, monkeypatch, **options):
    """The steps that a run starts, in their order; each tells what ``ends`` says of it."""
    started, ends = [], options.pop("ends", {})

    def play(self, jobs, at_once=1, until=None, finished=None):
        for job in jobs:
            started.append(job)
            finished(Result(job.name, *ends.get(job.name, ("ok", 1.0, "done")), []))

    monkeypatch.setattr(Runner, "run", play)
    monkeypatch.setattr(checks.shutil, "which", lambda *args, **kwargs: None)
    settings = {"minutes": 9.0, "only": None, "resume": False, "dry": False} | options
    gpu_run.main(gpu_run.Options(out, **settings))
    return started


def test_a_run_that_is_resumed_does_what_was_left_undone_and_no_more(tmp_path, monkeypatch):
    late = {"ops": ("cut", 85.0, "cut: no time"), "network vit_small": ("left out", 0.0, "no time left")}
    late["ops (warm 2 of 4)"] = ("cut", 200.0, "cut: no time")
    first = finished_run(tmp_path, monkeypatch, ends=late)
    names = [job.name for job in first]
    assert names[0] == "build"
    assert names[-1] == "ops"
    assert {"training (warm)", "recompiles", "tests slim_conv 1 of 8", *late} <= set(names)
    Progress(tmp_path / "items" / "ops.jsonl").done("a case", "ok")
    (tmp_path / "ops.csv").write_text("provider,over_ours,back_to_back_over_ours,roofline\nplain,1.6,1.6,\n")
    second = finished_run(tmp_path, monkeypatch, resume=True, minutes=45.0)
    assert [job.name for job in second] == ["build", *(name for name in names if name in late)]
    assert (tmp_path / "ops.csv").exists()
    assert "a case" in Progress(tmp_path / "items" / "ops.jsonl").items()
    with (tmp_path / "steps.csv").open(newline="") as file:
        steps = list(csv.DictReader(file))
    assert len(steps) == len(first) + 1  # the sanitizer is not installed
    assert {row["status"] for row in steps} == {"ok"}
    assert [job.name for job in finished_run(tmp_path, monkeypatch, resume=True)] == ["build"]
    assert len(finished_run(tmp_path, monkeypatch)) == len(first)
    assert not (tmp_path / "ops.csv").exists()


def test_results_of_other_sources_are_not_gone_on_with(tmp_path, monkeypatch):
    finished_run(tmp_path, monkeypatch, only=["build"])
    monkeypatch.setattr(gpu_run, "identity", lambda dry: {"sources": "others"})
    with pytest.raises(SystemExit, match="expected --resume in a folder of the same sources, others, got"):
        finished_run(tmp_path, monkeypatch, only=["build"], resume=True)


def test_a_longer_run_gives_each_step_longer(tmp_path, monkeypatch):
    seconds = {m: {j.name: j.seconds for j in finished_run(tmp_path, monkeypatch, minutes=m)} for m in (9.0, 45.0)}
    assert seconds[45.0]["training"] == 5 * seconds[9.0]["training"]
    assert seconds[9.0]["ops"] >= 85
    assert seconds[45.0]["ops"] > 30 * 60
    assert seconds[45.0]["tests slim_conv 1 of 8"] > 4 * seconds[9.0]["tests slim_conv 1 of 8"]


def test_make_gpu_runs_to_its_end_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: make gpu measures it")
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "steps.csv").open(newline="") as file:
        steps = {row["step"]: row["status"] for row in csv.DictReader(file)}
    assert set(steps) == {"build", "ceilings", "sanitizer", "recompiles", "tests", *list(gpu_run.TIMED)[:3], "ops"}
    assert set(steps.values()) == {"ok"}
    for name in ("ops", "networks", "training", "generation"):
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            assert {row["ms"] for row in csv.DictReader(file)} == {"dry"}, f"{name}.csv holds a time"
    with (tmp_path / "ops.csv").open(newline="") as file:
        assert {row["op"] for row in csv.DictReader(file)} == set(timings.ops())
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"Ran 10 of 1\d\d\d cases, 0 of 1\d\d against torch.compile; a dry run takes one small", text)
    assert "nothing was timed" in text
    assert "Every step came to its end, and none was red." in text
