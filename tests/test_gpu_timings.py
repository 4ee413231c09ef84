"""The lines of ``make gpu`` that a dry run leaves out: timing, memory, rooflines and the report, with CUDA's clock played."""

import csv
import time

import pytest
import torch

from benchmarks import inr_resnet50, shapes
from benchmarks import run as bench
from benchmarks.gpu import checks, order, report, timings
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
    monkeypatch.setattr(Session, "samples", quick(Session.samples))

    def make(step, how="timed", part=(0, 1)):
        (tmp_path / "ceilings.csv").write_text(
            "what,per_second\nmemory,1e9\nbfloat16,1e9\nfloat16,1e9\ntf32,1e9\nfloat32,1e9\n"
        )
        made = Session(tmp_path, step, how, part)
        made.device = torch.device("cpu")
        return made

    return make


def quick(samples):
    return lambda self, call, seconds: samples(self, call, 0.001)


def rows(path):
    with path.open(newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.fixture
def one_op(monkeypatch):
    """Layer norm alone, and of it the shortest cases, two of them compiled."""
    monkeypatch.setattr(timings, "ops", lambda: ["slim_layer_norm"])
    items = [item for item in order.items(["slim_layer_norm"]) if item.case.shape == "N6304-C128"]
    monkeypatch.setattr(order, "items", lambda ops: items)
    return items


def test_ops_are_timed_and_their_rooflines_known(session, one_op, tmp_path):
    assert run(timings.time_ops, session("ops")) == 0
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
    compiled = sum(item.compiled for item in one_op)
    assert compiled
    assert sum(row["provider"] == "compile" for row in found) == 2 * compiled
    assert sum(row["provider"] == "slimkernels" for row in found) == 2 * (len(one_op) - compiled)
    lines = report.goals(tmp_path / "ops.csv")
    assert any(line.startswith("- roofline:") for line in lines)
    told = f"Timed {len(one_op) - compiled} of {len(one_op) - compiled} cases, {compiled} of {compiled} against"
    assert report.coverage(tmp_path, False)[0] == f"{told} torch.compile."
    run(timings.time_ops, session("ops"))
    assert rows(tmp_path / "ops.csv") == found, "what was done is done again"


def test_ops_that_were_cut_off_go_on_with_the_next_case(session, one_op, tmp_path, monkeypatch):
    first, times = session("ops"), iter([60.0] * 4)
    monkeypatch.setattr(first, "left", lambda: next(times, -1.0))
    run(timings.time_ops, first)
    assert first.progress.ended()[1].startswith("cut: no time for slim_layer_norm ViT-S/16")
    before = rows(tmp_path / "ops.csv")
    done = [name for name, (event, _) in first.progress.items().items() if event == "ok"]
    assert done == [item.name for item in one_op[: len(done)]]
    assert 0 < len(done) < len(one_op)
    assert "goes on with the others" in report.coverage(tmp_path, False)[0]
    first.progress.start(one_op[len(done)].name)  # and died there
    first.progress.reopen()
    assert first.progress.ended() is None
    run(timings.time_ops, session("ops"))
    found = rows(tmp_path / "ops.csv")
    assert found[: len(before)] == before
    keys = [(row["shape"], row["width"], row["dtype"], row["mode"], row["provider"]) for row in found]
    assert len(set(keys)) == len(keys)
    assert "goes on" not in report.coverage(tmp_path, False)[0]


def test_the_parts_of_a_warm_run_are_all_and_write_no_row(session, one_op, tmp_path):
    names = []
    for part in range(4):
        made = session("ops", "warm", (part, 4))
        assert run(timings.time_ops, made) == 0
        assert made.progress.path.name == f"ops-(warm-{part + 1}-of-4).jsonl"
        names += made.progress.items()
    assert sorted(names) == sorted(item.name for item in one_op)
    assert not (tmp_path / "ops.csv").exists()
    assert not (tmp_path / "plan.csv").exists()


def test_the_order_covers_what_there_is_before_it_goes_into_depth(monkeypatch):
    monkeypatch.setattr(shapes, "MAX_MACS", timings.GPU_MACS)
    monkeypatch.setattr(shapes, "MAX_ELEMENTS", timings.GPU_ELEMENTS)
    items = order.items(timings.ops())
    eager = [item for item in items if not item.compiled]
    assert len({item.name for item in items}) == len(items)
    every = {f"{op} {bench.named(case)}" for op in timings.ops() for case in order.ranked(op)}
    assert {item.name for item in eager} == every
    kinds = {(item.op, *order.kind(item.case)) for item in items}
    first = [(item.op, *order.kind(item.case)) for item in items[: len(kinds)]]
    assert set(first) == kinds, "a second case of a kind comes before the first one of another"
    assert {item.op for item in items[:10]} == set(timings.ops())
    assert {item.case.width for item in items[:10]} == {1.0}
    compiled = {item.op for item in items if item.compiled}
    assert {item.op for item in items[len(kinds) : len(kinds) + len(compiled)] if item.compiled} == compiled
    assert [item.name for item in items] == [item.name for item in order.items(timings.ops())]


def test_a_kind_has_no_sizes():
    def kind(shape):
        return order.SIZES.sub("#", shape)

    assert kind("N32-I64-O128-14x14-k3s1") == kind("N8-I16-O16-7x7-k3s1") != kind("N32-I64-O64-14x14-k1s1")
    assert kind("N1-I16-O16-4096-k2s1d4-dw") == kind("N1-I8-O8-4096-k2s1d256-dw") != kind("N1-I8-O8-4096-k2s1-dw")


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
