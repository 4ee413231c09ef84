"""Weights of a real network generated at every width: residual and from scratch, against slimmable fine-tuning."""

import copy
import datetime
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from slimkernels import elastic, hyper, train
from slimkernels._extension import cpp_info
from slimkernels._version import __version__
from slimkernels.models import CifarResNet, DigitCNN
from slimkernels.recipes import results
from slimkernels.recipes.cifar import RESIDUAL, limited
from slimkernels.recipes.cifar_data import Progress, cifar10
from slimkernels.recipes.data import (
    Batches,
    InOrder,
    Split,
    digit_weights,
    digits,
    load_into,
    load_weights,
    prepared,
)
from slimkernels.recipes.digits import NOTES
from slimkernels.recipes.pipeline import Stopped, accuracies, cosine_schedule, parameter_groups, writing
from slimkernels.train.hypernet import MODES

SIXTEENTHS = tuple(k / 16 for k in range(16, 3, -1))
UNSEEN = (13 / 16, 10 / 16, 7 / 16)  # never trained


@dataclass(frozen=True)
class Arm:
    """One way to get the widths. ``mode`` None: slimmable fine-tuning of the weights themselves."""

    name: str
    mode: str | None = None
    tensors: str | Sequence[str] = "*"
    noise: str = "axis"
    blocks: Sequence[str] | None = None
    slims: Sequence[str] = ()  # blocks whose channels shrink; none given: all of them
    lr: float = 5e-3
    matched: bool = False  # generated layers start with outputs as large as the target's
    trainer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        return "residual" if self.mode == "residual" else None

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name)


@dataclass
class Recipe:
    """A network, its data and the arms that are compared: every arm runs the same steps and batches, and the same widths
    but for arms that draw one a step."""

    name: str
    network: nn.Module
    data: Split
    arms: Sequence[Arm]
    convert: Mapping[str, Any]
    generator: Mapping[str, Any]
    steps: int
    batch_size: int
    widths: Sequence[float] = SIXTEENTHS
    unseen: Sequence[float] = UNSEEN
    augmented: bool = False
    flip: bool = False
    blocks: Sequence[str] = ()  # that ``Arm.slims`` may name
    widths_a_step: int = 3
    eval_samples: int = 1
    amp: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def trained(self) -> list[float]:
        return [w for w in self.widths if w not in self.unseen]


# The same number of passes a step as the others. Reconstruction and weight norm pull weights that are not the trained
# ones' neighbours to zero: without them nothing but the labels is learned from.
SCRATCH: Mapping[str, Any] = {"rule": "sandwich", "reconstruction": 0.0, "weight_norm": 0.0, "clip_grad": 1.0}
DIGIT_ARMS = (
    Arm("slimmable", lr=1.5e-3),
    Arm("residual, axis noise", "residual", lr=2e-3),
    Arm("residual, element noise", "residual", noise="element", lr=2e-3),
    Arm("scratch, axis noise", "neumeta", lr=1e-3, matched=True, trainer=SCRATCH),
    Arm("scratch, element noise", "neumeta", noise="element", lr=1e-3, matched=True, trainer=SCRATCH),
)
BLOCKS = tuple(f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(3))
LAST = BLOCKS[-1:]
STAGE = BLOCKS[-3:]
CIFAR_ARMS = (
    Arm("slimmable", lr=2e-4),
    Arm("residual", "residual", lr=5e-4),
    Arm("last block: slimmable", slims=LAST, lr=2e-4),
    Arm("last block: neumeta", "neumeta", LAST, slims=LAST, lr=5e-4),
    Arm("last stage: slimmable", slims=STAGE, lr=2e-4),
    Arm("last stage: blockwise", "blockwise", STAGE, blocks=STAGE, slims=STAGE, lr=5e-4),
)


def chosen(arms: Sequence[Arm], names: Sequence[str] | None) -> list[Arm]:
    """The arms whose names begin so; None: all of them."""
    if names is None:
        return list(arms)
    found: list[Arm] = []
    for name in names:
        fitting = [arm for arm in arms if arm.name.startswith(name) and arm not in found]
        if not fitting:
            raise ValueError(f"train hyper: expected arms of {'; '.join(a.name for a in arms)}, got {name!r}")
        found += fitting
    return found


def digit_recipe(steps: int = 400, batch_size: int = 64, arms: Sequence[str] | None = None) -> Recipe:
    """The digit CNN with all its layers generated."""
    network = DigitCNN()
    load_into(network, digit_weights(), "the packaged digit weights")
    return Recipe(
        name="digit CNN",
        network=network,
        data=digits(),
        arms=chosen(DIGIT_ARMS, arms),
        convert={"widths": (0.25, 1.0), "divisor": 2},
        generator={"hidden": 64, "layers": 3, "bands": 4, "tile": {"fc_layers.0.weight": (4, 1)}},
        steps=steps,
        batch_size=batch_size,
        notes=list(NOTES),
    )


def cifar_recipe(
    data: str | Path,
    weights: str | Path,
    *,
    steps: int = 400,
    batch_size: int = 128,
    arms: Sequence[str] | None = None,
    test_images: int | None = None,
    amp: str | None = None,
    progress: Progress | None = None,
) -> Recipe:
    """ResNet-20 with its batch norms folded; the channels inside the residual blocks are slimmed."""
    network = CifarResNet(20)
    load_into(network, load_weights(weights), weights)
    return Recipe(
        name="ResNet-20, batch norms folded",
        network=hyper.fold_batch_norm(network.eval(), torch.zeros(1, 3, 32, 32)),
        data=limited(cifar10(data, progress), test_images),
        arms=chosen(CIFAR_ARMS, arms),
        convert={"widths": (0.25, 1.0), "divisor": 1, "ignore": RESIDUAL},
        generator={"hidden": 128, "layers": 4, "bands": 4},
        steps=steps,
        batch_size=batch_size,
        augmented=True,
        flip=True,
        blocks=BLOCKS,
        amp=amp,
    )


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    seed: int = 0,
    command: str = "",
    console: Console | None = None,
    checkpoint_every: int = 100,
) -> list[results.Row]:
    """Trains every arm and writes ``table.csv`` and ``plot.svg`` into ``out``, and the generated networks of the first
    generated arm, ``network-<w>.pt``, at every fourth width.

    Returns: a row per arm and width; the arm "sliced" is the network before any training.
    Raises: Stopped when Ctrl-C ended the training; DataError, CheckpointError, TrainingError with one sentence each.
    """
    console = Console() if console is None else console
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    test = InOrder(recipe.data.test_x, recipe.data.test_y)
    console.print(f"[bold]{recipe.name}[/bold], {recipe.data.name}", highlight=False)
    common = {"seed": seed, "command": command}
    rows: list[results.Row] = []
    models: dict[tuple[str, ...], nn.Module] = {}
    kept = False
    for arm in recipe.arms:
        slims = tuple(arm.slims)
        if slims not in models:
            models[slims] = converted(recipe, slims)
            name = arm.name.rpartition(": ")[0] + ": sliced" if slims else "sliced"
            about: dict[str, Any] = {"steps": 0, "seconds": "0.0", "widths_a_step": 0}
            rows += _rows(recipe, name, accuracies(models[slims], test, recipe.widths), about, common)
        folder = out / arm.folder
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        torch.manual_seed(seed)
        trainer = make_trainer(recipe, arm, models[slims], folder, seed, console, checkpoint_every)
        start = time.perf_counter()
        trainer.fit(steps=recipe.steps, resume=resume)
        if trainer.stopped:
            raise Stopped(
                f"stopped at step {trainer.step} of {recipe.steps} of arm {arm.name!r}; the same command with --resume"
                " goes on from there"
            )
        seconds = time.perf_counter() - start
        found = {row["width"]: row["accuracy"] for row in trainer.history[-len(recipe.widths) :]}
        about = {"steps": recipe.steps, "seconds": "" if resume else f"{seconds:.1f}"}  # "": part of it ran before
        about["widths_a_step"] = trainer.sampler.count
        rows += _rows(recipe, arm.name, found, about, common)
        console.print(_line(arm.name, found, seconds), highlight=False)
        if arm.mode is not None and not kept:
            _save_networks(trainer.model, recipe, out)
            kept = True
    with writing(out / "table.csv") as aside:
        results.write_csv(rows, aside)
    with writing(out / "plot.svg") as aside:
        plot(rows, aside, f"{recipe.name} on {recipe.data.name}, {recipe.steps} steps an arm")
    console.print(table(rows, f"{recipe.name} on {recipe.data.name}: accuracy in %; * never trained"))
    for note in [*recipe.notes, *verdicts(rows)]:
        console.print(note, highlight=False)
    console.print(f"written to {out}: table.csv, plot.svg", highlight=False)
    return rows


def converted(recipe: Recipe, slims: Sequence[str] = ()) -> nn.Module:
    """The elastic network; with ``slims`` only the channels of those blocks shrink."""
    options = dict(recipe.convert)
    if slims:
        options["ignore"] = [*options.get("ignore", ()), *(b for b in recipe.blocks if b not in slims)]
    return elastic.convert(recipe.network, prepared(recipe.data.test_x[:1]), **options)


def make_trainer(
    recipe: Recipe,
    arm: Arm,
    model: nn.Module,
    folder: Path,
    seed: int,
    console: Console,
    checkpoint_every: int,
) -> train.SlimmableTrainer | train.HypernetTrainer:
    """All arms: the same batches, widths, schedule and number of steps; AdamW."""
    rule = arm.trainer.get("rule", MODES[arm.mode]["rule"] if arm.mode else "sandwich")
    sampler = train.WidthSampler(recipe.trained, rule, recipe.widths_a_step if rule == "sandwich" else 1, seed=seed)
    loader = Batches(
        recipe.data.train_x, recipe.data.train_y, recipe.batch_size, augmented=recipe.augmented, flip=recipe.flip
    )
    options: dict[str, Any] = {
        "train_loader": loader,
        "val_loader": InOrder(recipe.data.test_x, recipe.data.test_y),
        "eval_widths": list(recipe.widths),
        "validate_every": recipe.steps,
        "checkpoint_dir": folder,
        "checkpoint_every": min(checkpoint_every, recipe.steps),
        "clip_grad": 10.0,
        "amp": recipe.amp,
        "seed": seed,
        "progress": not console.quiet,
        **arm.trainer,
        "rule": sampler,
    }
    if arm.mode is None:
        network = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(parameter_groups(network, 1e-2), lr=arm.lr)
        options["scheduler"] = cosine(optimizer, recipe.steps)
        return train.SlimmableTrainer(network, F.cross_entropy, optimizer, **options)
    generator = hyper.WeightGenerator(
        model, arm.tensors, base=arm.base, noise=arm.noise, blocks=arm.blocks, **recipe.generator
    )
    if arm.matched:
        hyper.match_outputs(generator, prepared(recipe.data.train_x[:64]))
    optimizer = torch.optim.AdamW(generator.trained_parameters(), lr=arm.lr, weight_decay=0.0)
    options["scheduler"] = cosine(optimizer, recipe.steps)
    if arm.mode == "blockwise":
        options["steps_per_block"] = max(1, recipe.steps // len(generator.blocks))
    return train.HypernetTrainer(
        generator, F.cross_entropy, optimizer, mode=arm.mode, eval_samples=recipe.eval_samples, **options
    )


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(steps, 0.05))


def _rows(
    recipe: Recipe, arm: str, accuracy: Mapping[float, float], about: Mapping[str, Any], common: Mapping[str, Any]
) -> list[results.Row]:
    found = []
    for w in recipe.widths:
        row: results.Row = {"network": recipe.name, "data": recipe.data.name, "arm": arm, "width": f"{w:g}"}
        row |= {
            "trained": "no" if w in recipe.unseen or arm.endswith("sliced") else "yes",
            "accuracy": f"{accuracy[w]:.4f}",
        }
        row |= {**about, "batch_size": recipe.batch_size}
        row |= {"train_images": len(recipe.data.train_x), "test_images": len(recipe.data.test_x)}
        row |= {"threads": torch.get_num_threads(), "cpu": results.cpu_name()}
        row |= {"isa": cpp_info().get("isa", "PyTorch reference"), "torch": torch.__version__}
        row |= {"slimkernels": __version__, "date": datetime.date.today().isoformat(), **common}
        row["note"] = " ".join(recipe.notes)
        found.append(row)
    return found


def _line(arm: str, accuracy: Mapping[float, float], seconds: float) -> str:
    return f"{arm} ({seconds:.0f} s): " + "  ".join(f"{w:g}: {value:.4f}" for w, value in accuracy.items())


def by_arm(rows: Sequence[results.Row]) -> dict[str, list[results.Row]]:
    found: dict[str, list[results.Row]] = {}
    for row in rows:
        found.setdefault(row["arm"], []).append(row)
    return found


def table(rows: Sequence[results.Row], title: str) -> Table:
    """A row per width, a column per arm."""
    arms = by_arm(rows)
    drawn = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    drawn.add_column("width", justify="right")
    for arm in arms:
        drawn.add_column(arm, justify="right")
    for row in next(iter(arms.values())):
        cells = [row["width"]]
        for found in arms.values():
            mine = next(r for r in found if r["width"] == row["width"])
            star = "*" if mine["trained"] == "no" and not mine["arm"].endswith("sliced") else ""
            cells.append(f"{100 * float(mine['accuracy']):.1f}{star}")
        drawn.add_row(*cells)
    return drawn


def verdicts(rows: Sequence[results.Row]) -> list[str]:
    """For every trained arm: how far its unseen widths are below the mean of their two trained neighbours, and the mean
    accuracy."""
    lines = []
    for arm, found in by_arm(rows).items():
        accuracy = [100 * float(row["accuracy"]) for row in found]
        gaps = [
            (accuracy[i - 1] + accuracy[i + 1]) / 2 - accuracy[i]
            for i, row in enumerate(found)
            if not arm.endswith("sliced") and row["trained"] == "no" and 0 < i < len(found) - 1
        ]
        worst = f", unseen widths at most {max(gaps):.1f} points below the mean of their neighbours" if gaps else ""
        lines.append(f"{arm}: mean {sum(accuracy) / len(accuracy):.1f}, lowest {min(accuracy):.1f}{worst}")
    return lines


def plot(rows: Sequence[results.Row], path: Path, title: str) -> None:
    """Accuracy over width, a line an arm; rings stand for widths that were never trained.

    Raises: RuntimeError when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("plot: matplotlib is not installed; type 'pip install matplotlib'") from None
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for arm, found in by_arm(rows).items():
        widths, accuracy = ([float(row[key]) for row in found] for key in ("width", "accuracy"))
        style = {"linestyle": "--", "color": "0.6"} if arm.endswith("sliced") else {"marker": "o", "markersize": 4}
        (line,) = axes.plot(widths, accuracy, label=arm, linewidth=1.5, **style)
        unseen = [(w, a) for w, a, row in zip(widths, accuracy, found, strict=True) if row["trained"] == "no"]
        if not arm.endswith("sliced"):
            axes.plot(*zip(*unseen, strict=True), "o", color=line.get_color(), fillstyle="none", markersize=10)
    axes.set_xlabel("width (rings: never trained)")
    axes.set_ylabel("test accuracy")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def _save_networks(generator: Any, recipe: Recipe, out: Path) -> None:
    """Plain networks as state_dicts: they load into the network's class built at that width."""
    for w in recipe.widths[::4]:
        with writing(out / f"network-{w:g}.pt") as aside:
            torch.save(generator.materialize(w, recipe.eval_samples).state_dict(), aside)
