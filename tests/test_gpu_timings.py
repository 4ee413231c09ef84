"""The lines of ``make gpu`` that a dry run leaves out: timing, memory, rooflines and the report, with CUDA's clock played."""

import csv
import time

import pytest
import torch

from benchmarks import inr_resnet50
from benchmarks.gpu import checks, report, timings
from benchmarks.gpu import session as gpu_session
from benchmarks.gpu.runner import Result
from benchmarks.gpu.session import Session, run


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


@pytest.fixture
def session(tmp_path, monkeypatch):
    """Makes sessions whose GPU is the CPU, with small shapes and nothing to compile."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a made-up GPU")
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    monkeypatch.setattr(gpu_session, "FLUSH_BYTES", 2**10)
    monkeypatch.setattr(timings, "captured", lambda call: call)
    monkeypatch.setattr(timings, "BATCH", 2)
    monkeypatch.setattr(timings, "GPU_MACS", 2**14)
    monkeypatch.setattr(timings, "GPU_ELEMENTS", 2**12)
    monkeypatch.setattr(timings, "NETWORKS", {"resnet50": timings.DRY_NETWORK})
    tensors, active = inr_resnet50.target()
    monkeypatch.setattr(inr_resnet50, "target", lambda: (tensors[:2], active[:2]))
    monkeypatch.setattr(Session, "timing", quick(Session.timing))

    def make(step, how="timed"):
        (tmp_path / "ceilings.csv").write_text(
            "what,per_second\nmemory,1e9\nbfloat16,1e9\nfloat16,1e9\ntf32,1e9\nfloat32,1e9\n"
        )
        made = Session(tmp_path, step, how)
        made.device = torch.device("cpu")
        return made

    return make


def quick(timing):
    return lambda self, call, seconds=0.1: timing(self, call, 0.001)


def rows(path):
    with path.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_an_op_is_timed_and_its_roofline_known(session, tmp_path):
    made = session("op slim_layer_norm")
    assert run(lambda s: timings.time_op(s, "slim_layer_norm"), made) == 0
    found = rows(tmp_path / "ops.csv")
    assert {row["provider"] for row in found} >= {"slimkernels", "plain", "slice", "compile"}
    assert {row["mode"] for row in found} == {"forward", "full"}
    for row in found:
        assert row["gate"] == "ok"
        assert float(row["ms"]) > 0
        assert float(row["back_to_back_ms"]) > 0
        assert float(row["roofline"]) > 0
        if row["provider"] == "slimkernels":
            assert row["over_ours"] == row["back_to_back_over_ours"] == "1.000"
    lines = report.goals(tmp_path / "ops.csv")
    assert any(line.startswith("- roofline:") for line in lines)
    again = session("op slim_layer_norm")
    run(lambda s: timings.time_op(s, "slim_layer_norm"), again)
    assert rows(tmp_path / "ops.csv") == found, "what was done is done again"


def test_a_warm_run_writes_no_row(session, tmp_path):
    made = session("op slim_layer_norm", "warm")
    assert run(lambda s: timings.time_op(s, "slim_layer_norm"), made) == 0
    assert not (tmp_path / "ops.csv").exists()
    assert made.progress.path.name == "op-slim_layer_norm-(warm).jsonl"


def test_networks_training_and_generation_are_timed(session, tmp_path):
    for name, step in {
        "network resnet50": lambda s: timings.time_network(s, "resnet50"),
        "training": timings.time_training,
        "generation": timings.time_generation,
    }.items():
        made = session(name)
        assert run(step, made) == 0, made.progress.items()
    assert {row["provider"] for row in rows(tmp_path / "networks.csv")} == {
        *("elastic", "plain", "deployed", "compile", "elastic, in a graph"),
    }
    assert len(rows(tmp_path / "training.csv")) == 3
    assert len(rows(tmp_path / "generation.csv")) == 2
    for file in ("networks", "training", "generation"):
        assert all(float(row["ms"]) > 0 for row in rows(tmp_path / f"{file}.csv"))


def test_ceilings_and_the_report(session, tmp_path, monkeypatch):
    kept = torch.get_float32_matmul_precision()
    empty = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, **options: empty(min(size, 2**10), **options))
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **options: draw(*(min(n, 16) for n in size), **options))
    made = session("ceilings")
    (tmp_path / "ceilings.csv").unlink()
    assert run(checks.ceilings, made) == 0
    torch.set_float32_matmul_precision(kept)
    assert [row["what"] for row in rows(tmp_path / "ceilings.csv")] == [
        "memory",
        "bfloat16",
        "float16",
        "tf32",
        "float32",
    ]
    assert set(session("training").ceilings) == {"memory", "bfloat16", "float16", "tf32", "float32"}
    results = [
        Result("ceilings", "ok", 1.0, "a made-up GPU; 5 of 5 done", []),
        Result("op slim_conv", "died", 9.0, "3 of 4 done; died: case 4: signal SIGSEGV", ["case 4: signal SIGSEGV"]),
        Result("op slim_gru", "cut", 9.0, "cut: no time", []),
    ]
    with (tmp_path / "steps.csv").open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["step", "status", "seconds", "told"])
        writer.writerows([r.name, r.status, r.seconds, r.told] for r in results)
    report.write(tmp_path, dry=False)
    text = (tmp_path / "report.md").read_text()
    assert "a made-up GPU, CUDA" in text
    assert "- **op slim_conv** died: 3 of 4 done; died: case 4: signal SIGSEGV" in text
    assert "- no time was left for all of: op slim_gru" in text
