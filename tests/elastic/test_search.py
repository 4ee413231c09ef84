"""Choosing a sub-network: limits, methods, the front, and what an impossible limit says."""

import csv
import itertools
import sys

import pytest
import torch
from torch import nn

from slimkernels import elastic
from slimkernels.models.bsrnn import BSRNN
from tests.elastic.test_depth import Residual

WIDTHS = [0.25, 0.5, 0.75, 1.0]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), *(Residual(32) for _ in range(3)), nn.ReLU(), nn.Linear(32, 2))
    return elastic.convert(net, torch.randn(3, 6), depth=True).train()


def size(m: nn.Module) -> float:
    """A score that grows with the network."""
    known = elastic.plan(m)
    return float(elastic.cost(m, known.current, known.current_depth).params)


def middle(m: nn.Module) -> float:
    """A score that is best for a network that is not the largest."""
    return -abs(size(m) - 3000)


class Groups:
    """A score to which only one width dimension and the depth matter: per-group search has to find that out."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, m: nn.Module) -> float:
        self.calls += 1
        assert not m.training
        assert not torch.is_grad_enabled()
        return float(m[1].a.width) + 10 * sum(not b._skipped for b in (m[2], m[3]))


def test_grid_takes_the_best_score_not_the_largest(model):
    limit = 6000
    result = elastic.search(model, middle, max_params=limit, widths=WIDTHS)
    every = {elastic.cost(model, w, d).params for w in WIDTHS for d in (1 / 3, 2 / 3, 1.0)}
    assert {c.params for c in result.tried} == {p for p in every if p <= limit}
    assert result.best.params == min(every, key=lambda p: abs(p - 3000)) < max(c.params for c in result.tried)
    sub = elastic.extract(model, result.best.width, result.best.depth)
    assert sum(p.numel() for p in sub.parameters()) == result.best.params
    assert elastic.plan(model).current == 1.0
    assert model.training


def test_front_is_what_nothing_beats(model):
    result = elastic.search(model, middle, widths=WIDTHS)
    assert len(result.tried) == 12
    expected = [
        c
        for c in result.tried
        if not any(
            o.score >= c.score and o.macs <= c.macs and (o.score, o.macs) != (c.score, c.macs) for o in result.tried
        )
    ]
    assert sorted(c.macs for c in result.front) == sorted(c.macs for c in expected)
    assert [c.macs for c in result.front] == sorted(c.macs for c in result.front)
    assert all(a.score < b.score for a, b in itertools.pairwise(result.front))


@pytest.mark.parametrize("method", ["greedy", "evolution"])
def test_per_group_finds_what_matters(model, method):
    if method == "evolution":
        pytest.importorskip("pymoo")
    limit = int(0.5 * elastic.cost(model, 1.0).macs)
    score = Groups()
    result = elastic.search(model, score, max_macs=limit, method=method, per_group=True, evaluations=300, seed=1)
    uniform = elastic.search(model, score, max_macs=limit)
    assert result.best.macs <= limit
    assert result.best.score >= uniform.best.score
    with elastic.width(model, result.best.width, result.best.depth), torch.no_grad():
        assert score(model.eval()) == result.best.score
    model.train()
    assert len({repr((c.width, c.depth)) for c in result.tried}) == len(result.tried)


def test_evolution_is_repeatable_and_bounded(model):
    pytest.importorskip("pymoo")
    runs = []
    for _ in range(2):
        score = Groups()
        runs.append(elastic.search(model, score, method="evolution", per_group=True, evaluations=60, seed=3))
        assert score.calls <= 60
    assert [c.score for c in runs[0].tried] == [c.score for c in runs[1].tried]


def test_greedy_without_limits_goes_down_to_the_smallest(model):
    result = elastic.search(model, size, method="greedy")
    assert min(c.params for c in result.tried) == elastic.cost(model, 0.25, 0.1).params
    assert result.best.params == elastic.cost(model, 1.0).params


def test_impossible_limits_say_what_the_smallest_costs(model):
    least = elastic.cost(model, 0.25, 0.1)
    text = (
        rf"expected max_params of at least {least.params:,}, what the smallest sub-network costs \(width 0\.25, depth"
        rf" 0\.333333: {least.params:,} parameters, {least.macs:,} MACs\), got 10"
    )
    with pytest.raises(ValueError, match=f"search: {text}"):
        elastic.search(model, size, max_params=10)
    with pytest.raises(ValueError, match=f"extract: {text}"):
        elastic.extract(model, max_params=10)
    with pytest.raises(ValueError, match=r"search: expected max_latency_ms of at least .* ms\), got 1e-06"):
        elastic.search(model, size, max_latency_ms=1e-6, example_inputs=torch.randn(3, 6))


def test_latency_is_measured_on_the_extracted_network(model):
    result = elastic.search(model, size, max_latency_ms=1e4, max_params=5000, example_inputs=torch.randn(3, 6))
    assert result.axes == ("params", "latency_ms")
    assert all(c.latency_ms is not None and c.latency_ms > 0 for c in result.tried)
    assert result.best.params <= 5000


def test_extract_in_one_line(model):
    for limit in (2000, 5000):
        net = elastic.extract(model, max_params=limit)
        fitting = [c.params for c in elastic.search(model, size).tried if c.params <= limit]
        assert sum(p.numel() for p in net.parameters()) == max(fitting)
    best = elastic.search(model, middle, max_macs=4000).best
    net = elastic.extract(model, max_macs=4000, evaluate=middle)
    assert sum(p.numel() for p in net.parameters()) == best.params
    with pytest.raises(ValueError, match=r"expected either a width .and depth. or limits, got both"):
        elastic.extract(model, 0.5, max_params=1e6)
    with pytest.raises(ValueError, match=r"expected either a width .and depth. or limits, got none"):
        elastic.extract(model)


def test_csv_and_plot(model, tmp_path):
    result = elastic.search(model, middle, max_params=6000)
    result.to_csv(tmp_path / "front.csv")
    with open(tmp_path / "front.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result.tried)
    assert sum(int(row["front"]) for row in rows) == len(result.front)
    best = next(row for row in rows if row["best"] == "1")
    assert (int(best["params"]), float(best["score"])) == (result.best.params, result.best.score)
    result.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"method": "luck"}, "expected method to be one of grid, greedy, evolution, got 'luck'"),
        ({"per_group": True}, "expected method 'greedy' or 'evolution' with per_group=True, got 'grid'"),
        ({"max_macs": -1}, "expected max_macs to be a positive number, got -1"),
        ({"max_latency_ms": 5.0}, "expected example_inputs, as max_latency_ms is given, got None"),
        ({"widths": []}, "expected at least one width, got none"),
        ({"widths": [0.1]}, r"expected width between 0\.25 and 1, got 0\.1"),
    ],
)
def test_wrong_arguments(model, kwargs, text):
    with pytest.raises(ValueError, match=f"search: {text}"):
        elastic.search(model, size, **kwargs)


def test_scores_have_to_be_finite_and_leave_the_model_as_it_was(model):
    with pytest.raises(ValueError, match=r"search: expected evaluate to give a finite score, got nan at width 0\.25"):
        elastic.search(model, lambda _: float("nan"))
    assert elastic.plan(model).current == 1.0
    assert model.training


def test_evolution_without_pymoo_says_what_to_type(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymoo", None)
    for name in [name for name in sys.modules if name.startswith("pymoo.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pymoo is not installed; type \"pip install 'slimkernels\[search\]'\""):
        elastic.search(model, size, method="evolution")


@pytest.mark.parametrize("method", ["grid", "greedy", "evolution"])
def test_interrupted_search_goes_on_where_it_was(method, tmp_path):
    torch.manual_seed(0)
    net = BSRNN(16, 12, 2, bands=[4, 8], channels=1).eval()
    model = elastic.convert(net, torch.randn(1, 5, 24), divisor=4, depth=True)
    calls = []

    def evaluate(m):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return float(m(torch.ones(1, 5, 24)).square().mean())

    options = {"method": method, "per_group": method != "grid", "max_params": 4500, "evaluations": 40}
    stop_at = None
    whole = elastic.search(model, evaluate, **options)
    total, log = len(calls), tmp_path / "search.jsonl"
    calls.clear()
    stop_at = total // 2
    with pytest.raises(KeyboardInterrupt):
        elastic.search(model, evaluate, log=log, **options)
    with log.open("a") as file:
        file.write('{"width": 0.')
    stop_at = None
    resumed = elastic.search(model, evaluate, log=log, **options)
    assert len(calls) == total + 1
    assert resumed.tried == whole.tried
    assert resumed.best == whole.best
    elastic.search(model, evaluate, log=log, **options)
    assert len(calls) == total + 1
    assert elastic.plan(model).current == 1.0

    other = elastic.convert(BSRNN(32, 12, 2, bands=[4, 8], channels=1), torch.randn(1, 5, 24), divisor=4, depth=True)
    with pytest.raises(ValueError, match="expected log to be of this model"):
        elastic.search(other, evaluate, log=log, **(options | {"max_params": 1e9}))
    log.write_text("width,depth\n")
    with pytest.raises(ValueError, match="expected log to be the log of a search"):
        elastic.search(model, evaluate, log=log, **options)


def test_network_with_depth_under_a_latency(tmp_path):
    torch.manual_seed(0)
    net, x = BSRNN(16, 12, 2, bands=[4, 8], channels=1).eval(), torch.randn(1, 5, 24)
    model = elastic.convert(net, x, divisor=4, depth=True)
    found = elastic.search(model, lambda m: float(m(x).abs().mean()), max_latency_ms=1e4, example_inputs=x)
    assert all(c.latency_ms > 0 for c in found.tried)
    assert {c.depth for c in found.tried} == {0.5, 1.0}
    found.to_csv(tmp_path / "front.csv")
    found.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 0
    with pytest.raises(ValueError, match=r"expected max_latency_ms of at least .* what the smallest sub-network costs"):
        elastic.search(model, lambda m: 0.0, max_latency_ms=1e-6, example_inputs=x)
    with pytest.raises(ValueError, match="expected max_params of at least"):
        elastic.extract(model, max_params=10)
    assert sum(p.numel() for p in elastic.extract(model, max_params=4500).parameters()) <= 4500


@pytest.mark.parametrize(
    "content", [b"Notes.\nNo line of these is a score", b"only one line", b"\xff\xfe\n", b"{}\n", b"[]\n"]
)
def test_a_file_that_is_no_log_is_refused_and_left_as_it_is(model, tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected log to be the log of a search, got .*notes\.txt"):
        elastic.search(model, lambda m: 1.0, max_params=1e9, log=path)
    assert path.read_bytes() == content
