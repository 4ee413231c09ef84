"""The recipe of generated weights on a few steps: what it writes, resuming, and what it refuses."""

import csv
import dataclasses

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import merge_hyper, recipe_tables
from slimkernels.cli import app
from slimkernels.models import CifarResNet, DigitCNN
from slimkernels.recipes import hyper, hyper_arms, hyper_results
from slimkernels.recipes.data import Split, load_into, load_weights, prepared

QUIET = {"console": Console(quiet=True)}


def small(split: Split, train: int = 64, test: int = 40) -> Split:
    return Split(split.train_x[:train], split.train_y[:train], split.test_x[:test], split.test_y[:test], split.name)


def digit_recipe(steps: int, arms: list[str]) -> hyper.Recipe:
    recipe = hyper.digit_recipe(steps, 16, arms)
    recipe.data = small(recipe.data)
    recipe.widths, recipe.unseen = (1.0, 0.75, 0.5, 0.375, 0.25), (0.375,)
    recipe.generator = {**recipe.generator, "hidden": 16}
    recipe.samples, recipe.sampled = (1, 2), (0.5, 0.375)
    return recipe


def test_digits_writes_what_it_says(tmp_path):
    rows = hyper.run(digit_recipe(2, ["slimmable", "residual, axis"]), tmp_path, command="slimkernels", **QUIET)
    with (tmp_path / "table.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["accuracy"] for row in read] == [row["accuracy"] for row in rows]
    assert [row["arm"] for row in read[:15:5]] == ["sliced", "slimmable", "residual, axis noise"]
    assert [row["trained"] for row in read[5:10]] == ["yes", "yes", "yes", "no", "yes"]
    sampled = [(row["arm"], row["samples"], row["width"]) for row in read[15:]]
    assert sampled == [(f"residual, axis noise, mean of {k}", str(k), w) for k in (1, 2) for w in ("0.5", "0.375")]
    assert "probably part of the data" in read[0]["note"]
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    plain = DigitCNN((8, 16, 32), 64)
    load_into(plain, load_weights(tmp_path / "network-0.25.pt"), "network")
    assert len(hyper.verdicts(rows)) == 5


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


def cifar_files(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (40, 3, 32, 32), generator=generator, dtype=torch.uint8)
    y = torch.arange(40) % 10
    monkeypatch.setattr(hyper, "cifar10", lambda *_: Split(x[:24], y[:24], x[24:], y[24:], "made-up images"))
    network = CifarResNet(20)
    for m in network.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    return network.eval(), x


def tiny(recipe):
    recipe.widths, recipe.unseen, recipe.samples, recipe.sampled = (1.0, 0.5, 0.25), (0.5,), (2,), (0.5,)
    recipe.drawn = None if recipe.drawn is None else (1.0, 0.75, 0.25)
    recipe.generator = {**recipe.generator, "hidden": 8, "layers": 2, "bands": 2}
    recipe.arms = [
        dataclasses.replace(arm, trainer={**arm.trainer, "reconstruction_steps": 2})
        if "reconstruction_steps" in arm.trainer
        else arm
        for arm in recipe.arms
    ]
    return recipe


def test_every_cifar_arm_runs(tmp_path, monkeypatch):
    cifar_files(tmp_path, monkeypatch)
    recipe = tiny(hyper.cifar_recipe("data", tmp_path / "weights.pt", steps=2, batch_size=4))
    rows = hyper.run(recipe, tmp_path / "out", **QUIET)
    arms = [row["arm"] for row in rows]
    assert {arm: arms.count(arm) for arm in arms} == {
        "sliced": 3, "slimmable": 3, "alone": 1, "residual": 3, "residual, base trained": 3, "scratch": 3, "blockwise": 3,
        "blockwise, base trained": 3
    }  # fmt: skip
    made = {
        arm.name: hyper.make_trainer(recipe, arm, hyper.converted(recipe), tmp_path / "t", 0, QUIET["console"], 2)
        for arm in recipe.arms
        if arm.name in ("residual", "residual, base trained", "scratch")
    }
    names = {name: {t.name for t in trainer.generator.targets} for name, trainer in made.items()}
    assert names["residual"] == {f"{block}.conv{i}.weight" for block in hyper_arms.BLOCKS for i in (1, 2)}
    assert names["scratch"] == names["residual"] | {"conv1.weight", "linear.weight", "linear.bias"}
    trained = {name: {id(p) for p in t.generator.extras()} for name, t in made.items()}
    assert len(trained["residual, base trained"]) == len(trained["residual"]) + 18
    assert made["residual"].sampler.widths == [1.0, 0.75, 0.25]
    norms = [m for name in ("residual", "scratch") for m in made[name].generator.target.modules() if hasattr(m, "eps")]
    assert [bool((m.weight == 1).all()) for m in norms] == [False] * 19 + [True] * 19


def test_whole_networks_are_trained_at_other_widths_than_are_measured(tmp_path, monkeypatch):
    cifar_files(tmp_path, monkeypatch)
    recipe = hyper.cifar_recipe("data", tmp_path / "weights.pt", amp="bf16")
    assert not set(recipe.trained) & set(recipe.unseen)
    assert set(recipe.unseen) < set(recipe.widths)
    assert set(recipe.widths) < set(recipe.trained) | set(recipe.unseen)
    for unseen in recipe.unseen:
        at = recipe.widths.index(unseen)
        assert {recipe.widths[at - 1], recipe.widths[at + 1]} == {unseen - 1 / 32, unseen + 1 / 32}
    assert recipe.notes == ["Trained and measured in mixed precision (bf16)."]


def test_the_table_has_every_arm_that_ended(tmp_path, monkeypatch):
    recipe = digit_recipe(2, ["slimmable", "residual, axis"])
    monkeypatch.setattr(hyper.train.HypernetTrainer, "fit", lambda self, **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hyper.run(recipe, tmp_path, **QUIET)
    with (tmp_path / "table.csv").open() as file:
        assert [row["arm"] for row in csv.DictReader(file)] == ["sliced"] * 5 + ["slimmable"] * 5


def test_verdicts_name_the_distance_to_the_better_neighbour():
    rows = [
        {"arm": "residual", "width": w, "trained": "no" if w == "0.75" else "yes", "accuracy": a}
        for w, a in (("1", "0.9"), ("0.75", "0.8"), ("0.5", "0.78"))
    ]
    assert hyper_results.verdicts(rows) == [
        "residual: mean 82.7, lowest 78.0, unseen widths at most 10.0 points below a neighbour, 4.0 below the mean of both"
    ]


def test_every_arm_of_the_last_block_runs(tmp_path, monkeypatch):
    network, x = cifar_files(tmp_path, monkeypatch)
    files = {"weights": tmp_path / "weights.pt", "features": tmp_path / "features.pt"}
    recipe = tiny(hyper.last_block_recipe("data", **files, steps=2, batch_size=4))
    with torch.no_grad():  # the frozen layers and the block give what the network does
        expected, got = network(prepared(x[24:])), recipe.network(prepared(recipe.data.test_x))
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    rows = hyper.run(recipe, tmp_path / "out", **QUIET)
    assert [row["arm"] for row in rows if row["samples"]] == [
        f"{arm}, {noise} noise, mean of 2" for arm in ("residual", "neumeta") for noise in ("axis", "element")
    ]
    again = hyper.last_block_recipe("data", **files)
    assert torch.equal(again.data.train_x, recipe.data.train_x)
    torch.save(CifarResNet(20).state_dict(), files["weights"])
    with pytest.raises(ValueError, match="expected a features file of these weights and images"):
        hyper.last_block_recipe("data", **files)


def test_held_out_images_stand_for_the_test_images(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(hyper, "run", lambda recipe, out, **_: ran.append(recipe))
    arguments = ["train", "hyper", "--steps", "1", "--hold-out", "100", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (len(ran[0].data.train_y), len(ran[0].data.test_y)) == (3900, 100)
    assert ran[0].data.name == "MNIST 5k, 100 training images held out"


def run_of(seed, accuracy, arms=("residual",), steps="4"):
    about = {"network": "net", "data": "images", "steps": steps, "batch_size": "2", "samples": "", "seed": str(seed)}
    about |= {"train_images": "40", "test_images": "20", "note": "", "command": f"train --seed {seed}"}
    return [
        {**about, "arm": arm, "width": w, "trained": "no" if arm == "sliced" else "yes", "accuracy": str(accuracy)}
        for arm in ("sliced", *arms)
        for w in ("1", "0.5")
    ]


def test_merged_runs(tmp_path):
    first, second = run_of(0, 0.5, ("residual", "alone")), run_of(1, 0.75)
    rows = merge_hyper.merged([first, second])
    assert [(row["arm"], row["seed"]) for row in rows[::2]] == [
        ("sliced", "0"), ("residual", "0"), ("residual", "1"), ("alone", "0")
    ]  # fmt: skip
    assert "| residual | 2 | 62.5 ± 17.7 |" in recipe_tables.hyper_markdown(rows)
    assert "| alone | 1 | 50.0 |" in recipe_tables.hyper_markdown(rows)
    assert recipe_tables.hyper_markdown(rows).endswith("\n```sh\ntrain\n```")
    hyper_results.plot(rows, tmp_path / "plot.svg", "title")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    with pytest.raises(ValueError, match="expected each arm once a seed, got 'residual' twice, seed 0"):
        merge_hyper.merged([first, first])
    with pytest.raises(ValueError, match="expected runs of one steps, got 4, 5"):
        merge_hyper.merged([first, run_of(1, 0.5, steps="5")])


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"train hyper: expected arms of slimmable; .*, got 'none'"):
        hyper.digit_recipe(arms=["none"])
    for arguments, text in (
        (["--recipe", "speech"], "expected --recipe to be digits, cifar or last-block"),
        (["--recipe", "cifar"], "expected --data and --weights with --recipe cifar"),
    ):
        result = CliRunner().invoke(app, ["train", "hyper", "--out", str(tmp_path), *arguments])
        assert result.exit_code == 1
        assert text in " ".join(result.output.split())
