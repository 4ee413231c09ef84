"""The recipe of generated weights on a few steps: what it writes, resuming, and what it refuses."""

import csv

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from slimkernels.cli import app
from slimkernels.models import CifarResNet, DigitCNN
from slimkernels.recipes import hyper
from slimkernels.recipes.data import Split, load_into, load_weights

QUIET = {"console": Console(quiet=True)}


def small(split: Split, train: int = 64, test: int = 40) -> Split:
    return Split(split.train_x[:train], split.train_y[:train], split.test_x[:test], split.test_y[:test], split.name)


def digit_recipe(steps: int, arms: list[str]) -> hyper.Recipe:
    recipe = hyper.digit_recipe(steps, 16, arms)
    recipe.data = small(recipe.data)
    recipe.widths, recipe.unseen = (1.0, 0.75, 0.5, 0.375, 0.25), (0.375,)
    recipe.generator = {**recipe.generator, "hidden": 16}
    return recipe


def test_digits_writes_what_it_says(tmp_path):
    rows = hyper.run(digit_recipe(2, ["slimmable", "residual, axis"]), tmp_path, command="slimkernels", **QUIET)
    with (tmp_path / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["accuracy"] for row in read] == [row["accuracy"] for row in rows]
    assert [row["arm"] for row in read[::5]] == ["sliced", "slimmable", "residual, axis noise"]
    assert [row["trained"] for row in read[5:10]] == ["yes", "yes", "yes", "no", "yes"]
    assert "probably part of the data" in read[0]["note"]
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    plain = DigitCNN((8, 16, 32), 64)
    load_into(plain, load_weights(tmp_path / "network-0.25.pt"), "network")
    assert len(hyper.verdicts(rows)) == 3


def test_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    arms = ["residual, element"]
    expected = hyper.run(digit_recipe(4, arms), tmp_path / "whole", **QUIET)
    recipe = digit_recipe(4, arms)
    model = hyper.converted(recipe)
    torch.manual_seed(0)
    folder = tmp_path / "parts" / recipe.arms[0].folder
    hyper.make_trainer(recipe, recipe.arms[0], model, folder, 0, QUIET["console"], 2).fit(steps=2)
    actual = hyper.run(digit_recipe(4, arms), tmp_path / "parts", resume=True, **QUIET)
    assert [row["accuracy"] for row in actual] == [row["accuracy"] for row in expected]


def test_every_cifar_arm_runs(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (40, 3, 32, 32), generator=generator, dtype=torch.uint8)
    y = torch.arange(40) % 10
    monkeypatch.setattr(hyper, "cifar10", lambda *_: Split(x[:24], y[:24], x[24:], y[24:], "made-up images"))
    torch.save(CifarResNet(20).state_dict(), tmp_path / "weights.pt")
    recipe = hyper.cifar_recipe("data", tmp_path / "weights.pt", steps=3, batch_size=4)
    recipe.widths, recipe.unseen = (1.0, 0.5, 0.25), (0.5,)
    recipe.generator = {"hidden": 8, "layers": 2, "bands": 2}
    rows = hyper.run(recipe, tmp_path / "out", **QUIET)
    assert len(rows) == 3 * (3 + len(hyper.CIFAR_ARMS))
    assert [row["arm"] for row in rows[::3]][3:6] == [
        "last block: sliced",
        "last block: slimmable",
        "last block: neumeta",
    ]
    last = hyper.elastic.plan(hyper.converted(recipe, hyper.LAST))
    assert list(last.groups) == ["layer3.2.conv1"]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"train hyper: expected arms of slimmable; .*, got 'none'"):
        hyper.digit_recipe(arms=["none"])
    for arguments, text in (
        (["--recipe", "speech"], "expected --recipe to be digits or cifar"),
        (["--recipe", "cifar"], "expected --data and --weights with --recipe cifar"),
    ):
        result = CliRunner().invoke(app, ["train", "hyper", "--out", str(tmp_path), *arguments])
        assert result.exit_code == 1
        assert text in " ".join(result.output.split())
