"""The benchmark harness: its gate can be red, its rows are complete, and its tables are those of the CSV."""

import csv
import re

import pytest
import torch
from torch import nn

from benchmarks import deploy_page, harness, report, run, training_memory
from benchmarks.shapes import reduced, shapes


class Wrong(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.001


def case(ours_kind=nn.Linear, modes=harness.MODES):
    def build():
        torch.manual_seed(0)
        plain, ours, sliced = nn.Linear(8, 6), ours_kind(8, 6), nn.Linear(8, 6)
        ours.load_state_dict(plain.state_dict())
        sliced.load_state_dict(plain.state_dict())
        return harness.Problem(ours, plain, sliced, (torch.randn(5, 8, requires_grad=True),))

    return harness.Case("net", 0.5, "N5-I8-O6", torch.float32, build, modes)


def test_harness_measures_every_provider_and_mode():
    rows = list(harness.measure(case(), 0.001))
    assert [(r["mode"], r["provider"]) for r in rows] == [
        (mode, provider) for mode in harness.MODES for provider in ("slimkernels", "plain", "slice")
    ]
    assert all(r["gate"] == "ok" and float(r["p20_us"]) <= float(r["p50_us"]) <= float(r["p80_us"]) for r in rows)
    assert set().union(*rows) <= set(run.COLUMNS)


def test_harness_gives_no_time_to_a_wrong_result():
    rows = list(harness.measure(case(Wrong), 0.001))
    ours = [r for r in rows if r["provider"] == "slimkernels"]
    assert all("against float64" in r["gate"] and "p50_us" not in r for r in ours)
    assert all("ratio" not in r for r in rows)


def test_harness_sees_a_gradient_outside_the_slice():
    class Full(nn.Linear):
        def forward(self, x):
            return (
                nn.functional.linear(x, self.weight[:6], self.bias[:6])
                + 0 * self.weight.sum()
                + self.weight[7, 0] * 0.1
            )

    def build():
        ours, plain = Full(8, 8), nn.Linear(8, 6)
        with torch.no_grad():
            ours.weight[7, 0] = 0
            plain.weight.copy_(ours.weight[:6])
            plain.bias.copy_(ours.bias[:6])
        return harness.Problem(ours, plain, None, (torch.randn(5, 8, requires_grad=True),))

    one = harness.Case("net", 0.5, "s", torch.float32, build, ("full",))
    (ours, plain) = harness.measure(one, 0.001)
    assert ours["gate"] != "ok"
    assert plain["gate"] == "ok"


def test_harness_counts_memory():
    assert harness.extra_bytes(lambda: torch.ones(1000) + torch.ones(1000)) == 12000


def test_peak_of_a_process_counts_tensors_and_every_other_block_of_the_heap():
    script = """
import ctypes
import torch
from benchmarks.training_memory import of_step

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
libc.free.argtypes = [ctypes.c_void_p]
before = torch.ones(2**21)

def step():
    own = libc.malloc(8 * 2**20)
    libc.memset(own, 1, 8 * 2**20)
    y = torch.ones(2**21)
    libc.free(own)
    return y + torch.ones(2**18)[0]

of_step(step)
"""
    peak = training_memory.of_process("-c", script)
    assert 17 <= peak.held_mb < 17.3  # 8 + 8 and, when the first 8 are gone, 8 + 8 + 1
    assert 16 <= peak.returned_mb < 24  # pages of code that a step loads are in it
    assert peak.note().startswith("resident")


def test_shapes_of_every_op_and_the_batch_rule():
    for op in ("conv2d", "dwconv2d", "conv1d", "linear", "layernorm", "groupnorm", "bilstm"):
        everything, quick = shapes(op), shapes(op, quick=True)
        assert {s.width for s in everything} == {0.25, 0.5, 0.75, 1.0}
        assert 0 < len(quick) < len(everything)
        assert {s.net for s in quick} == {s.net for s in everything}
    assert reduced(4, 10, 10) == (4, "")
    batch, note = reduced(100352, 384 * 96, 480)
    assert batch * 384 * 96 <= 2**27 < 2 * (batch + 1) * 384 * 96
    assert note.startswith("batch 100352 halved")
    with pytest.raises(ValueError, match=r"expected op to be one that op-shapes\.csv lists, got 'conv9d'"):
        shapes("conv9d")


def test_an_unknown_op_is_an_error():
    with pytest.raises(ValueError, match=r"bench: expected op to be one of .*slim_linear.*, got 'nothing'"):
        run.main("nothing")


def test_a_run_replaces_the_rows_of_its_op(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)

    class Bench:
        @staticmethod
        def cases(quick):
            yield case(modes=("forward",))

    monkeypatch.setattr(run.importlib, "import_module", lambda name: Bench)
    for op in ("one", "two", "one"):
        assert run.run_op(op, True, 1) == 0
    with run.results_file().open() as file:
        rows = list(csv.DictReader(file))
    assert [row["op"] for row in rows] == ["one"] * 3 + ["two"] * 3
    assert list(rows[0]) == run.COLUMNS
    assert re.fullmatch(r"[a-z0-9-]+\.csv", run.results_file().name)
    assert run.run_op("one", True, 2) == 0
    assert {row["threads"] for row in run.read(run.results_file(2))} == {"2"}
    assert {row["threads"] for row in run.read(run.results_file())} == {"1"}  # the table and plots of one thread stay
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.all_ops() == ["one", "two"]
    assert {row["threads"] for row in report.one_thread_rows()} == {"1"}
    assert "2 thread(s)" in report.table()


def test_a_run_of_some_cases_replaces_their_rows_only(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)

    class Bench:
        @staticmethod
        def cases(quick):
            for dtype in (torch.float32, torch.bfloat16):
                made = case(modes=("forward",))
                made.dtype = dtype
                yield made

    monkeypatch.setattr(run.importlib, "import_module", lambda name: Bench)
    assert run.run_op("one", True, 1) == 0
    before = run.read(run.results_file())
    assert run.run_op("one", False, 1, "bfloat16") == 0
    after = run.read(run.results_file())
    assert sorted((r["dtype"], r["run"]) for r in after) == [("bfloat16", "full")] * 3 + [("float32", "quick")] * 3
    assert [r for r in after if r["run"] == "quick"] == [r for r in before if r["dtype"] == "float32"]
    assert run.run_op("one", False, 1, "float32") == 0
    assert [r["dtype"] for r in run.read(run.results_file())] == ["float32"] * 3 + ["bfloat16"] * 3  # where they were
    with pytest.raises(ValueError, match=r"bench: expected a case of one with 'float64' in its name, got none"):
        run.run_op("one", True, 1, "float64")
    with pytest.raises(ValueError, match="bench: expected an op beside --only, got none"):
        run.main(only="float32")


def test_tables_and_plots_of_the_ops_are_not_stale():
    assert report.stale() == []


def test_page_of_deployed_networks_is_not_stale():
    assert deploy_page.stale() == []


def test_inr_scaling_measures_share_memory_and_samples():
    from benchmarks import inr_scaling

    share = inr_scaling.gemm_share(["resnet20-last-block"], 0.0)
    assert [row["dtype"] for row in share] == ["float32", "bfloat16"]
    for row in share:  # how fast is not asked: other work on the machine may fall on either
        speed, gemm = float(row["gflops"]), float(row["gemm_gflops"])
        assert speed > 0
        assert float(row["share"]) == pytest.approx(speed / gemm, rel=0.05, abs=2e-3)
    small, large = inr_scaling.memory([8, 32])
    assert large["coordinates"] == 2 * 32 * 33
    growth = [float(large[f"{name}_mib"]) - float(small[f"{name}_mib"]) for name in ("eager", "recompute")]
    assert growth[1] < 0.1 * growth[0]


def test_roofline_is_in_gflops_and_its_line_the_best_that_the_machine_reached():
    ceiling = {"net": deploy_page.CEILING, "dtype": "float32", "us": "10000"}
    product = ceiling | {"operation": deploy_page.PRODUCT}
    rows = [
        product | {"runs_on": "F.linear", "mflops": "1000"},
        product | {"runs_on": "oneDNN", "mflops": "2000"},  # 2e9 operations in 10 ms
        product | {"runs_on": "oneDNN", "mflops": "9000", "dtype": "bfloat16"},
        ceiling | {"operation": deploy_page.COPY, "kbytes": "280000"},  # 280 MB in 10 ms
    ]
    assert deploy_page.roof(rows, "float32") == (200.0, 28.0)
    assert deploy_page.roof(rows, "bfloat16") == (900.0, 28.0)
