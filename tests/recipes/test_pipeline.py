"""The whole path of the recipes on a few steps: what it writes, resuming, and that it compares like with like."""

import csv
import io

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from slimkernels import elastic
from slimkernels.cli import app
from slimkernels.models import CifarResNet, DigitCNN
from slimkernels.recipes import cifar, digits, latency, pipeline, results
from slimkernels.recipes.data import DataError, Split, load_into, load_weights

QUIET = {"console": Console(quiet=True), "latency_seconds": 0.05}


def small(split: Split, train: int = 96, test: int = 60) -> Split:
    return Split(split.train_x[:train], split.train_y[:train], split.test_x[:test], split.test_y[:test], split.name)


@pytest.fixture
def demo():
    def build(steps: int = 3) -> pipeline.Recipe:
        recipe = digits.recipe(steps, batch_size=16)
        recipe.data = small(recipe.data)
        recipe.widths = (1.0, 0.5, 0.125)
        recipe.latency_batches = (1, 2)
        return recipe

    return build


def made_cifar(classes: int = 10) -> Split:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (60, 3, 32, 32), generator=generator, dtype=torch.uint8)
    y = torch.arange(60) % classes
    return Split(x[:40], y[:40], x[40:], y[40:], "made-up images")


def test_demo_writes_what_it_says(demo, tmp_path):
    rows = pipeline.run(demo(), tmp_path, command="slimkernels demo", **QUIET)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoints", "elastic.safetensors", "subnetwork-0.5.pt", "table.csv", "plot.png"}
    with (tmp_path / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["width"] for row in read] == ["1", "0.5", "0.125"]
    assert int(read[0]["parameters"]) == 390_410
    assert int(read[1]["macs"]) == 14 * 14 * 9 * 16 * 32 + 28 * 28 * 9 * 16 + 7 * 7 * 9 * 32 * 64 + 576 * 128 + 1280
    assert all(float(row["slimkernels_batch1_p50_ms"]) > 0 for row in read)
    assert "probably part of the data" in read[0]["note"]
    assert read[0]["command"] == "slimkernels demo"
    assert str(rows[0]["accuracy_after"]) == read[0]["accuracy_after"]
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    plain = DigitCNN((16, 32, 64), 128)
    load_into(plain, load_weights(tmp_path / "subnetwork-0.5.pt"), "subnetwork")
    loaded = elastic.load(tmp_path / "elastic.safetensors", DigitCNN())
    x = torch.randn(3, 1, 28, 28)
    with elastic.width(loaded, 0.5):
        torch.testing.assert_close(loaded(x), plain(x), rtol=1e-4, atol=1e-5)


def test_resumed_demo_ends_where_an_uninterrupted_one_does(demo, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = pipeline.run(demo(4), whole, **QUIET)
    first = demo(4)
    model = elastic.convert(first.network, first.data.test_x[:1], **first.convert)
    trainer = pipeline.make_trainer(first, model, parts / "checkpoints", 0, QUIET["console"], 2)
    trainer.fit(steps=2)
    actual = pipeline.run(demo(4), parts, resume=True, **QUIET)
    assert [row["accuracy_after"] for row in actual] == [row["accuracy_after"] for row in expected]
    states = [torch.load(d / "checkpoints" / "step-00000004.pt", weights_only=True)["model"] for d in (whole, parts)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_without_resume_a_run_starts_afresh(demo, tmp_path):
    pipeline.run(demo(2), tmp_path, **QUIET)
    (tmp_path / "mine.txt").write_text("kept")
    rows = pipeline.run(demo(1), tmp_path, **QUIET)
    assert rows[0]["steps"] == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.pt"]
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    def failing():
        with pipeline.writing(tmp_path / "table.csv") as aside:
            aside.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        failing()
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_file_is_one_sentence(demo, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"expected a folder to write to, got .*file"):
        pipeline.run(demo(), tmp_path / "file", **QUIET)


@pytest.mark.parametrize("slim", ["blocks", "all"])
def test_cifar_recipe(tmp_path, monkeypatch, slim):
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in CifarResNet().state_dict().items()}}, tmp_path / "weights.th"
    )
    monkeypatch.setattr(cifar, "cifar10", lambda path, progress: made_cifar())
    recipe = cifar.recipe("anywhere", tmp_path / "weights.th", steps=2, batch_size=8, slim=slim)
    recipe.latency_batches, recipe.widths, recipe.calibration_images = (1,), (1.0, 0.5), 20
    recipe.convert = {**recipe.convert, "widths": [0.5, 1.0]}
    rows = pipeline.run(recipe, tmp_path / "out", **QUIET)
    half = CifarResNet(20, (16, 32, 64) if slim == "blocks" else (8, 16, 32), (8, 16, 32))
    load_into(half, load_weights(tmp_path / "out" / "subnetwork-0.5.pt"), "subnetwork")
    trained = sum(p.numel() for p in half.parameters())
    assert rows[1]["parameters"] == trained
    with pytest.raises(ValueError, match="expected slim to be 'blocks' or 'all', got 'x'"):
        cifar.recipe("anywhere", tmp_path / "weights.th", slim="x")


def test_limited_takes_a_fixed_part_and_says_so():
    data = cifar.limited(made_cifar(), 12)
    assert data.name == "made-up images, 12 test images"
    assert torch.equal(data.test_x, cifar.limited(made_cifar(), 12).test_x)
    assert cifar.limited(made_cifar(), None).name == "made-up images"


def test_slicing_network_computes_what_the_plain_one_does():
    full, half = CifarResNet(8, (4, 8, 16)), CifarResNet(8, (4, 8, 16), (2, 4, 8))
    with torch.no_grad():
        for name, p in half.named_parameters():
            p.copy_(full.get_parameter(name)[tuple(slice(0, n) for n in p.shape)])
    for module in half.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
    sliced = latency.slicing_network(full.eval(), half.eval())
    x = torch.randn(2, 3, 16, 16)
    latency.check_same({"slicing": sliced, "plain": half}, x)
    with pytest.raises(RuntimeError, match="expected slicing to compute what the plain network does"):
        latency.check_same({"slicing": full, "plain": half}, x)
    with pytest.raises(ValueError, match="expected Linear, Conv2d and BatchNorm2d layers, got LayerNorm"):
        latency.slicing_network(nn.Sequential(nn.LayerNorm(3)), nn.Sequential(nn.LayerNorm(3)))


def test_latency_keeps_the_number_of_threads():
    torch.set_num_threads(2)
    try:
        networks = {1.0: {"plain": nn.Linear(4, 4)}, 0.5: {"plain": nn.Linear(4, 4)}}
        found = latency.interleaved(networks, {1: torch.randn(1, 4)}, budget=0.01)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert set(found) == {(1.0, "plain", 1), (0.5, "plain", 1)}
    timing = found[1.0, "plain", 1]
    assert 0 < timing.p20 <= timing.p50 <= timing.p80


def test_schedule_rises_then_falls():
    factor = pipeline.cosine_schedule(100, 0.1)
    values = [factor(step) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[10] == pytest.approx(1.0)
    assert values[100] == pytest.approx(0.0)
    assert max(values) == pytest.approx(1.0)


def test_commands_tell_in_one_sentence_what_is_wrong(tmp_path):
    weights = tmp_path / "weights.th"
    weights.write_bytes(b"half a file")
    run = CliRunner().invoke
    result = run(app, ["train", "cifar", "--data", str(tmp_path / "none"), "--weights", str(weights)])
    assert result.exit_code == 1
    assert result.output.count("error:") == 1
    assert "weights.th is damaged" in result.output
    torch.save(CifarResNet().state_dict(), weights)
    result = run(app, ["train", "cifar", "--data", str(tmp_path / "none"), "--weights", str(weights)])
    assert result.exit_code == 1
    assert "does not exist" in result.output
    result = run(app, ["demo", "--out", str(weights), "--steps", "1"])
    assert result.exit_code == 1
    assert "expected a folder to write to" in result.output
    assert "Traceback" not in result.output


def test_table_fits_a_terminal():
    recipe = digits.recipe()
    timing = {
        f"{p}_batch{b}_{q}_ms": "123.4567" for p in latency.PROVIDERS for b in (1, 64) for q in ("p20", "p50", "p80")
    }
    row = {
        "width": "0.125",
        "parameters": 390_410,
        "macs": 40_813_184,
        "accuracy_before": "0.9970",
        "accuracy_after": "1.0000",
    }
    console = Console(width=80, record=True, file=io.StringIO())
    small = {"macs": 145_856} | dict.fromkeys(timing, "0.1234")
    console.print(results.table([row | timing, row | small], recipe))
    text = console.export_text()
    assert "…" not in text
    assert "390,410" in text
