"""The one path of every recipe: convert, measure, train, calibrate, measure again, compare, save."""

import copy
import functools
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels import elastic, train
from slimkernels.recipes import latency, results
from slimkernels.recipes.data import Batches, DataError, InOrder, Split, load_into, load_weights, prepared


class Stopped(RuntimeError):
    """Ctrl-C ended the training; the sentence says how to go on."""


@dataclass
class Recipe:
    """What differs between two recipes."""

    name: str  # of the network, as in the table
    network: nn.Module  # plain, with its trained weights
    plain: Callable[
        [nn.Module], nn.Module
    ]  # an extracted sub-network -> a plain network built at that width, untrained
    data: Split
    widths: Sequence[float]  # of the table, widest first
    convert: Mapping[str, Any]  # keywords of elastic.convert
    steps: int
    batch_size: int
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    notes: list[str] = field(default_factory=list)  # what has to be said beside the numbers
    trainer: Mapping[str, Any] = field(default_factory=dict)  # keywords of SlimmableTrainer
    augmented: bool = True
    flip: bool = False
    warmup: float = 0.05  # share of the steps in which the learning rate rises
    weight_decay: float = 0.0
    calibration_images: int = 0  # 0: the network has no batch norm
    latency_batches: Sequence[int] = (1, 64)
    keep_width: float = 0.5  # of the sub-network that is written out
    label_smoothing: float = 0.0


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    seed: int = 0,
    command: str = "",
    console: Console | None = None,
    checkpoint_every: int = 100,
    latency_seconds: float = 6.0,
) -> list[results.Row]:
    """Runs the recipe and writes ``elastic.safetensors``, ``subnetwork-<w>.pt``, ``table.csv`` and ``plot.png`` into ``out``.

    Returns: one row per width.
    Raises: Stopped when Ctrl-C ended the training; DataError, CheckpointError, TrainingError with one sentence each.
    """
    console = Console() if console is None else console
    out = folder_for(Path(out), resume, ("elastic.safetensors", "table.csv", "plot.png", "subnetwork-*.pt"))
    torch.manual_seed(seed)
    widths = sorted(recipe.widths, reverse=True)
    test = InOrder(recipe.data.test_x, recipe.data.test_y)
    example = prepared(recipe.data.test_x[:1])
    model = elastic.convert(recipe.network, example, **recipe.convert)
    console.print(f"[bold]{recipe.name}[/bold], {recipe.data.name}: {_counts(recipe.data)}", highlight=False)
    console.print(elastic.report(model))

    with console.status("accuracy of the sliced network, before training"):
        before = accuracies(model, test, widths)
    console.print(f"before training: {_line(before)}", highlight=False)

    trainer = make_trainer(recipe, model, out / "checkpoints", seed, console, checkpoint_every)
    trainer.fit(steps=recipe.steps, resume=resume)
    if trainer.stopped:
        raise Stopped(
            f"stopped at step {trainer.step} of {recipe.steps}; the same command with --resume goes on from there"
        )

    with console.status("calibrating and measuring accuracy"):
        if recipe.calibration_images:
            elastic.calibrate(model, calibration_batches(recipe.data, recipe.calibration_images, seed), widths)
        after = accuracies(model, test, widths)
    console.print(f"after {recipe.steps} steps: {_line(after)}", highlight=False)

    with console.status("latency: deployed and elastic, slicing code and plain networks in turns, one thread"):
        networks, inputs = contestants(recipe, model, widths)
        timings = latency.interleaved(networks, inputs, latency_seconds)
    rows = results.rows(recipe, model, widths, before, after, timings, seed=seed, command=command)

    with writing(out / "elastic.safetensors") as aside:
        elastic.save(model, aside)
    kept = save_subnetwork(recipe, networks[recipe.keep_width]["plain"], out, test, after[recipe.keep_width])
    with writing(out / "table.csv") as aside:
        results.write_csv(rows, aside)
    with writing(out / "plot.png") as aside:
        results.plot(rows, aside, recipe)
    console.print(results.table(rows, recipe))
    for note in recipe.notes:
        console.print(note, highlight=False)
    console.print(f"written to {out}: elastic.safetensors, {kept.name}, table.csv, plot.png", highlight=False)
    return rows


def accuracies(model: nn.Module, batches: InOrder, widths: Sequence[float]) -> dict[float, float]:
    found = train.evaluate(model, batches, list(widths))
    return {w: found[w]["accuracy"] for w in widths}


def make_trainer(
    recipe: Recipe, model: nn.Module, checkpoints: Path, seed: int, console: Console, checkpoint_every: int
) -> train.SlimmableTrainer:
    optimizer = recipe.optimizer(parameter_groups(model, recipe.weight_decay))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(recipe.steps, recipe.warmup))
    loader = Batches(
        recipe.data.train_x, recipe.data.train_y, recipe.batch_size, augmented=recipe.augmented, flip=recipe.flip
    )
    return train.SlimmableTrainer(
        model,
        functools.partial(F.cross_entropy, label_smoothing=recipe.label_smoothing),
        optimizer,
        train_loader=loader,
        scheduler=schedule,
        checkpoint_dir=checkpoints,
        checkpoint_every=min(checkpoint_every, recipe.steps),
        seed=seed,
        progress=not console.quiet,
        **recipe.trainer,
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of layers decay; biases and the parameters of norms do not. Fixed parameters are left out."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def cosine_schedule(steps: int, warmup: float) -> Callable[[int], float]:
    """Factor of the learning rate: it rises for the share ``warmup`` of the steps, then falls to 0."""
    rise = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))

    return factor


def calibration_batches(data: Split, images: int, seed: int, size: int = 250) -> InOrder:
    """Training images that are not augmented, drawn once."""
    chosen = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(seed))[:images]
    return InOrder(data.train_x[chosen], data.train_y[chosen], size)


def contestants(
    recipe: Recipe, model: nn.Module, widths: Sequence[float]
) -> tuple[dict[float, dict[str, nn.Module]], dict[int, Tensor]]:
    """width -> the elastic model deployed at it, the model itself, slicing code, a plain network built at it; all four checked
    to compute the same.

    All of them run channels-last, the faster layout for each of them on a CPU.
    """
    images = {n: prepared(recipe.data.test_x[:n]) for n in recipe.latency_batches}
    inputs = {n: x.contiguous(memory_format=torch.channels_last) for n, x in images.items()}
    model = channels_last(copy.deepcopy(model).eval())
    full = elastic.extract(model, 1.0).eval()
    networks: dict[float, dict[str, nn.Module]] = {}
    for w in widths:
        extracted = elastic.extract(model, w).eval()
        plain = recipe.plain(extracted).eval()
        load_into(plain, extracted.state_dict(), f"the sub-network at width {w:g}")
        view = elastic.view(model, w).eval()
        networks[w] = {"deployed": elastic.deploy(model, widths=[w]), "slimkernels": view}
        networks[w] |= {"slicing": latency.slicing_network(full, extracted), "plain": plain}
        for network in (networks[w]["slicing"], plain):
            channels_last(network)
        latency.check_same(networks[w], next(iter(inputs.values())))
    return networks, inputs


def channels_last(network: nn.Module) -> nn.Module:
    """``network`` itself, its 4-dimensional weights stored channels-last."""
    to: Any = network.to  # torch's annotations leave memory_format out
    return to(memory_format=torch.channels_last)


def save_subnetwork(recipe: Recipe, plain: nn.Module, out: Path, test: InOrder, expected: float) -> Path:
    """Writes the weights of a plain sub-network, reads them back into a new one and checks that it is as accurate."""
    path = out / f"subnetwork-{recipe.keep_width:g}.pt"
    with writing(path) as aside:
        torch.save({key: value.clone() for key, value in plain.state_dict().items()}, aside)
    read = recipe.plain(plain)
    load_into(read, load_weights(path), path)
    actual = train.evaluate(read, test, [None])[None]["accuracy"]
    if abs(actual - expected) > 2 / len(test.x):
        raise RuntimeError(f"{path}: expected accuracy {expected:.4f} of the sub-network read back, got {actual:.4f}")
    return path


@contextmanager
def writing(path: Path):
    """Gives a path to write to; the file appears under ``path`` when it is whole, or not at all."""
    aside = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def folder_for(out: Path, resume: bool, written: Sequence[str]) -> Path:
    """The folder, made where it is missing; without what an earlier run wrote (globs) unless that is resumed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not resume:
            for old in [path for pattern in written for path in out.glob(pattern)]:
                old.unlink()
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
    except OSError as error:
        raise DataError(f"expected a folder to write to, got {out} ({error.strerror})") from error
    return out


def _counts(data: Split) -> str:
    return f"{len(data.train_x):,} images to train on, {len(data.test_x):,} to test"


def _line(values: Mapping[float, float]) -> str:
    return "  ".join(f"{w:g}: {value:.4f}" for w, value in values.items())
