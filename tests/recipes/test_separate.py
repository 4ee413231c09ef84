"""The separation experiment on sounds that the test makes: what it writes, resuming, what it refuses."""

import csv
import json
import wave

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from slimkernels import elastic
from slimkernels.cli import app
from slimkernels.models.bsrnn import BSRNN
from slimkernels.recipes import separate, separate_results
from slimkernels.recipes.speech_data import SAMPLE_RATE, Sounds
from tests.helpers import error

SMALL = {"batch_size": 2, "seconds": 0.1, "features": 16, "hidden": 16, "layers": 2}
SETTINGS = {**SMALL, "test_mixtures": 3, "test_seconds": 0.1}


@pytest.fixture
def sounds(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    music = torch.randn(SAMPLE_RATE, generator=generator)
    made = Sounds(0.2 * torch.randn(40_000, generator=generator).cumsum(0).sin(), [music, music[:300]])
    monkeypatch.setattr(separate, "load_sounds", lambda *_: (made, made))
    monkeypatch.setattr(separate, "WIDTHS", (1.0, 0.5))
    return made


def run(out, steps=2, seeds=1, **options):
    settings = separate.Settings(steps=steps, seeds=seeds, **SETTINGS)
    return separate.run(out, settings, console=Console(quiet=True), **options)


def result(out, name, seed=0):
    return json.loads((out / "checkpoints" / f"seed-{seed}" / name / "result.json").read_text())


def test_single_strokes_are_no_music(sounds):
    assert [len(noise) for noise in separate.music(sounds).noises] == [SAMPLE_RATE]


def test_a_mask_of_one_gives_the_mixture():
    mixed, speech = torch.randn(2, 2000), torch.randn(2, 2000)
    x, targets = separate.prepared(mixed, speech)
    assert x.shape[-1] == 2 * sum(separate.BANDS)
    one = torch.tensor([1.0, 0.0]).repeat(x.shape[-1] // 2).expand_as(x)
    assert error(separate.estimate(one, targets), mixed) < 1e-5
    assert separate.loss_fn(one, (targets[0], mixed)) < -50


def test_a_network_trained_alone_has_the_sub_network_s_sizes_and_fresh_weights():
    model = separate.elastic_network(separate.Settings(**SETTINGS), 0)
    taken = elastic.extract(model, 0.5, 0.5)
    alone = separate.alone_network(model, (0.5, 0.5), 1)
    assert [p.shape for p in alone.parameters()] == [p.shape for p in taken.parameters()]
    assert sum(p.numel() for p in alone.parameters()) == elastic.cost(model, 0.5, 0.5).params
    assert not any(type(m).__module__.startswith("slimkernels.nn") for m in alone.modules())
    assert type(alone) is BSRNN
    assert not torch.equal(alone.blocks[0].time.rnn.weight_hh_l0, taken.blocks[0].time.rnn.weight_hh_l0)
    again = separate.alone_network(model, (0.5, 0.5), 1)
    assert all(torch.equal(p, q) for p, q in zip(alone.parameters(), again.parameters(), strict=True))


def test_recipe_writes_what_it_says(sounds, tmp_path):
    rows = run(tmp_path, command="slimkernels train separate")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("checkpoints", "elastic.safetensors", "table.csv", "plot.png"),
        *("mixture.wav", "speech-1x1.wav", "speech-0.5x0.5.wav"),
    }
    with (tmp_path / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == 2 * 4 == len(rows)
    pairs = [("1", "1"), ("0.5", "1"), ("1", "0.5"), ("0.5", "0.5")]
    for way in separate_results.WAYS:
        assert [(row["width"], row["depth"]) for row in read if row["trained"] == way] == pairs
    alone = [row for row in read if row["trained"] == "alone"]
    network = separate.alone_network(separate.elastic_network(separate.Settings(**SETTINGS), 0), (0.5, 1.0), 0)
    assert int(alone[1]["parameters"]) == sum(p.numel() for p in network.parameters())
    assert all(float(row["training_cpu_s"]) > 0 for row in read)
    with wave.open(str(tmp_path / "speech-0.5x0.5.wav")) as file:
        assert (file.getframerate(), file.getnframes()) == (SAMPLE_RATE, SAMPLE_RATE // 10)
    plain = BSRNN(16, 16, 2, separate.BANDS, channels=1)
    loaded = elastic.load(tmp_path / "elastic.safetensors", plain)
    assert elastic.cost(loaded, 0.5, 0.5).params == int(alone[3]["parameters"])
    assert "4 sub-networks alone" in separate_results.times(rows)


def test_a_stopped_run_goes_on_where_it_stopped_and_gives_the_same(sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(separate, "EPOCH", 2)
    whole = run(tmp_path / "whole", steps=3)

    class Killed(BaseException):
        pass

    evaluate = separate.train.evaluate
    calls = []

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return evaluate(*arguments, **options)

    monkeypatch.setattr(separate.train, "evaluate", killed)
    with pytest.raises(Killed):
        run(tmp_path / "cut", steps=3)
    done = result(tmp_path / "cut", "elastic")
    (tmp_path / "cut/checkpoints/seed-0/0.5x1/step-00000003.pt").unlink()  # as if killed between two checkpoints
    resumed = run(tmp_path / "cut", steps=3, resume=True)
    assert [row["si_sdr"] for row in resumed] == [row["si_sdr"] for row in whole]
    assert result(tmp_path / "cut", "elastic") == done  # not trained again, its time kept
    assert result(tmp_path / "cut", "0.5x1")["cpu_seconds"] > 0


def test_summary_over_seeds():
    rows = [
        {"width": "1", "depth": "1", "trained": way, "si_sdr": score, "training_cpu_s": seconds}
        for way, scores, seconds in (("taken out", (1.0, 3.0), 10), ("alone", (4.0, 4.0), 25))
        for score in scores
    ]
    cell = separate_results.summary(rows)["1", "1"]
    assert separate_results.spread(cell["taken out"], "si_sdr") == (2.0, pytest.approx(2**0.5))
    assert separate_results.spread(cell["alone"][:1], "si_sdr") == (4.0, 0.0)
    assert "took 10 CPU seconds" in separate_results.times(rows)
    assert "(2.50 times as much)" in separate_results.times(rows)


def test_missing_folders_are_named_in_one_sentence(tmp_path):
    result = CliRunner().invoke(app, ["train", "separate", "--speech", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "apt-get install asterisk-core-sounds-en-g722" in result.output.replace("\n", " ")
    assert len(list(tmp_path.iterdir())) == 0


def test_slimmable_layers_are_what_is_trained():
    model = separate.elastic_network(separate.Settings(**SETTINGS), 0)
    assert not any(type(m) in (nn.LSTM, nn.Linear) for m in model.blocks.modules())
