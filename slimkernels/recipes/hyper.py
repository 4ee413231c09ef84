"""Weights of a real network generated at every width: residual and from scratch, against slimmable fine-tuning."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from slimkernels import elastic, hyper, train
from slimkernels._copy import deep_copy
from slimkernels.elastic.transform import batch_norms
from slimkernels.models import CifarResNet, DigitCNN
from slimkernels.recipes import results
from slimkernels.recipes.cifar import RESIDUAL, limited
from slimkernels.recipes.cifar_data import Progress, cifar10
from slimkernels.recipes.data import Batches, InOrder, Split, digit_weights, digits, load_into, load_weights, prepared
from slimkernels.recipes.digits import NOTES
from slimkernels.recipes.hyper_arms import BLOCK_ARMS, CIFAR_ARMS, DIGIT_ARMS, Arm, chosen
from slimkernels.recipes.hyper_features import before_last_block
from slimkernels.recipes.hyper_results import line, plot, rows_of, table, verdicts
from slimkernels.recipes.pipeline import Stopped, accuracies, cosine_schedule, parameter_groups, writing
from slimkernels.train.hypernet import MODES

SIXTEENTHS = tuple(k / 16 for k in range(16, 3, -1))
UNSEEN = (13 / 16, 10 / 16, 7 / 16)  # never trained
THIRTYSECONDS = tuple(k / 32 for k in range(32, 7, -1) if k / 32 not in UNSEEN)
BESIDE_UNSEEN = (1.0, *(k / 32 for k in (27, 26, 25, 24, 21, 20, 19, 16, 15, 14, 13)), 0.25)


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
    drawn: Sequence[float] | None = None  # the widths that steps run; None: ``widths`` without ``unseen``
    augmented: bool = False
    flip: bool = False
    extras: Sequence[str] = ()  # what is not generated and trained beside, shared by all widths
    extras_lr: float = 1e-3
    widths_a_step: int = 3
    calibration_batches: int = 8
    samples: Sequence[int] = (1, 10, 50)  # of the noisy weights whose mean is evaluated, for arms with noise
    sampled: Sequence[float] = (1.0, 13 / 16, 0.75, 10 / 16, 0.5, 7 / 16, 0.25)  # widths at which it is
    amp: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def trained(self) -> list[float]:
        return [w for w in self.widths if w not in self.unseen] if self.drawn is None else list(self.drawn)


def digit_recipe(steps: int = 400, batch_size: int = 64, arms: Sequence[str] | None = None) -> Recipe:
    """The digit CNN, which has no batch norm, with all its layers generated."""
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
    """ResNet-20 with its batch norms kept, whose statistics are measured at every width; the channels inside the residual
    blocks are slimmed, and all their convolutions generated (from scratch: every weight and bias of the network but those
    of its norms)."""
    network = CifarResNet(20)
    load_into(network, load_weights(weights), weights)
    return Recipe(
        name="ResNet-20",
        network=network.eval(),
        data=limited(cifar10(data, progress), test_images),
        arms=chosen(CIFAR_ARMS, arms),
        widths=BESIDE_UNSEEN,
        drawn=THIRTYSECONDS,
        convert={"widths": (0.25, 1.0), "divisor": 1, "ignore": RESIDUAL},
        generator={"tensors": "layer*.conv?.weight", "hidden": 64, "layers": 4},
        steps=steps,
        batch_size=batch_size,
        augmented=True,
        flip=True,
        extras=("*bn1.*", "*bn2.*", "linear"),
        amp=amp,
        notes=[] if amp is None else [f"Trained and measured in mixed precision ({amp})."],
    )


def last_block_recipe(
    data: str | Path,
    weights: str | Path,
    *,
    steps: int = 400,
    batch_size: int = 128,
    arms: Sequence[str] | None = None,
    test_images: int | None = None,
    features: str | Path | None = None,
    progress: Progress | None = None,
) -> Recipe:
    """The last block of ResNet-20 and its head, on what the frozen layers before it give.

    Those outputs are computed once, of every training image padded, cropped and mirrored at random once, and rounded to
    float16.

    Args:
        features: a file that keeps them for the next run, or None.
    """
    network = CifarResNet(20)
    load_into(network, load_weights(weights), weights)
    network.eval()
    images = limited(cifar10(data, progress), test_images)
    tail = nn.Sequential()
    for name, part in (("block", network.layer3[2]), ("pool", network.avgpool), ("flat", nn.Flatten())):
        tail.add_module(name, part)
    tail.add_module("linear", network.linear)
    return Recipe(
        name="ResNet-20, last block",
        network=tail.eval(),
        data=before_last_block(network, images, None if features is None else Path(features)),
        arms=chosen(BLOCK_ARMS, arms),
        convert={"widths": (0.25, 1.0), "divisor": 1},
        generator={"tensors": "block.conv?.weight", "hidden": 128, "layers": 4},
        steps=steps,
        batch_size=batch_size,
        extras=("block.bn1", "block.bn2", "linear"),
        notes=[
            "The layers before the block are frozen; their outputs were computed once, of one random crop and reflection of"
            " every training image, in float16."
        ],
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
    """Trains every arm and writes, after each, ``table.csv`` and ``plot.svg`` into ``out``, and the generated networks of
    the first generated arm, ``network-<w>.pt``, at every fourth width.

    Returns: a row per arm and width; the arm "sliced" is the network before any training.
    Raises: Stopped when Ctrl-C ended the training; DataError, CheckpointError, TrainingError with one sentence each.
    """
    console = Console() if console is None else console
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    console.print(f"[bold]{recipe.name}[/bold], {recipe.data.name}", highlight=False)
    common = {"seed": seed, "command": command}
    model = converted(recipe)
    about: dict[str, Any] = {"steps": 0, "seconds": "0.0", "widths_a_step": 0, "samples": ""}
    rows = rows_of(recipe, "sliced", _sliced(recipe, model), about, common)
    kept = False
    for arm in recipe.arms:
        start = time.perf_counter()
        found: dict[float, float] = {}
        for at in recipe.widths[::4] if arm.alone else [None]:
            folder = out / (arm.folder if at is None else f"{arm.folder}-{at:g}")
            if not resume:
                shutil.rmtree(folder, ignore_errors=True)
            torch.manual_seed(seed)
            trainer = make_trainer(recipe, arm, model, folder, seed, console, checkpoint_every, at)
            trainer.fit(steps=recipe.steps, resume=resume)
            if trainer.stopped:
                raise Stopped(
                    f"stopped at step {trainer.step} of {recipe.steps} of arm {arm.name!r}; the same command with --resume"
                    " goes on from there"
                )
            measured = [at] if at is not None else list(recipe.widths)
            found |= {row["width"]: row["accuracy"] for row in trainer.history[-len(measured) :]}
        seconds = time.perf_counter() - start
        about = {"steps": recipe.steps, "seconds": "" if resume else f"{seconds:.1f}"}  # "": part of it ran before
        about |= {"widths_a_step": "alone" if arm.alone else trainer.sampler.count, "samples": ""}
        rows += rows_of(recipe, arm.name, found, about, common)
        console.print(line(arm.name, found, seconds), highlight=False)
        if arm.noise != "none" and isinstance(trainer, train.HypernetTrainer):
            for samples in recipe.samples:
                found = _noisy(recipe, trainer, samples)
                name = f"{arm.name}, mean of {samples}"
                rows += rows_of(recipe, name, found, {**about, "samples": samples}, common)
                console.print(line(name, found, 0.0), highlight=False)
        if arm.mode is not None and not kept:
            _save_networks(trainer.model, recipe, out)
            kept = True
        _write(recipe, rows, out)
    console.print(table(rows, f"{recipe.name} on {recipe.data.name}: accuracy in %; * never trained"))
    for note in [*recipe.notes, *verdicts(rows)]:
        console.print(note, highlight=False)
    console.print(f"written to {out}: table.csv, plot.svg", highlight=False)
    return rows


def converted(recipe: Recipe) -> nn.Module:
    """The elastic network."""
    return elastic.convert(recipe.network, prepared(recipe.data.test_x[:1]), **recipe.convert)


def _loader(recipe: Recipe) -> Batches:
    data = recipe.data
    return Batches(data.train_x, data.train_y, recipe.batch_size, augmented=recipe.augmented, flip=recipe.flip)


def _sliced(recipe: Recipe, model: nn.Module) -> dict[float, float]:
    """Accuracy without any training, but with statistics of every width."""
    model = deep_copy(model)
    if any(hasattr(module, "start_calibration") for module in model.modules()):
        batches = [batch for batch, _ in zip(_loader(recipe), range(recipe.calibration_batches), strict=False)]
        elastic.calibrate(model, batches, list(recipe.widths))
    return accuracies(model, InOrder(recipe.data.test_x, recipe.data.test_y), recipe.widths)


def _noisy(recipe: Recipe, trainer: train.HypernetTrainer, samples: int) -> dict[float, float]:
    """Accuracy with the mean over ``samples`` noisy weights."""
    found = {}
    for w in recipe.sampled:
        plain = trainer.generator.materialize(w, samples, noisy=True)
        batches = [batch for batch, _ in zip(_loader(recipe), range(recipe.calibration_batches), strict=False)]
        train.hypernet.recompute_statistics(plain, batches)
        test = InOrder(recipe.data.test_x, recipe.data.test_y)
        found[w] = train.evaluate(plain, test, [None])[None]["accuracy"]
    return found


def make_trainer(
    recipe: Recipe,
    arm: Arm,
    model: nn.Module,
    folder: Path,
    seed: int,
    console: Console,
    checkpoint_every: int,
    alone: float | None = None,
) -> train.SlimmableTrainer | train.HypernetTrainer:
    """All arms: the same batches, widths, schedule and number of steps; AdamW. ``alone``: the one width to train."""
    rule = arm.trainer.get("rule", MODES[arm.mode]["rule"] if arm.mode else "sandwich")
    sampler = train.WidthSampler(recipe.trained, rule, recipe.widths_a_step if rule == "sandwich" else 1, seed=seed)
    options: dict[str, Any] = {
        "train_loader": _loader(recipe),
        "val_loader": InOrder(recipe.data.test_x, recipe.data.test_y),
        "eval_widths": list(recipe.widths),
        "validate_every": recipe.steps,
        "checkpoint_dir": folder,
        "checkpoint_every": min(checkpoint_every, recipe.steps),
        "clip_grad": 10.0,
        "amp": recipe.amp,
        "seed": seed,
        "progress": not console.quiet,
        "calibration_batches": recipe.calibration_batches,
        **arm.trainer,
        "rule": sampler,
    }
    if arm.mode is None:
        network = deep_copy(model)
        if alone is not None:
            options |= {"rule": train.WidthSampler([alone], "random", 1, seed=seed), "eval_widths": [alone]}
        optimizer = torch.optim.AdamW(parameter_groups(network, 1e-2), lr=arm.lr)
        options["scheduler"] = cosine(optimizer, recipe.steps)
        return train.SlimmableTrainer(network, F.cross_entropy, optimizer, **options)
    settings = {**recipe.generator, **arm.generator}
    if arm.smooth:
        model = deep_copy(model)
        hyper.smooth_permutation(model)
    generator = hyper.WeightGenerator(model, base=arm.base, noise=arm.noise, blocks=arm.blocks, **settings)
    if settings.get("standardized"):  # nothing of the trained network is left
        for norm in batch_norms(generator.target).values():
            norm.reset_parameters()
        last = None if settings["standardized"] is True else 0.25
        hyper.match_outputs(generator, prepared(recipe.data.train_x[:64]), last)
    groups = [{"params": list(generator.networks.parameters()), "lr": arm.lr}]
    extras = recipe.extras if arm.extras is None else arm.extras
    if extras:
        lr = recipe.extras_lr if arm.extras_lr is None else arm.extras_lr
        groups.append({"params": generator.train_extras(list(extras)), "lr": lr})
    if arm.base_lr:
        groups.append({"params": generator.train_base(), "lr": arm.base_lr})
    optimizer = torch.optim.AdamW(groups, lr=arm.lr, weight_decay=0.0)
    options["scheduler"] = cosine(optimizer, recipe.steps)
    if arm.mode == "blockwise":
        options["steps_per_block"] = max(1, recipe.steps // (2 * len(generator.blocks)))  # then all of them
    return train.HypernetTrainer(generator, F.cross_entropy, optimizer, mode=arm.mode, **options)


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(steps, 0.05))


def _write(recipe: Recipe, rows: Sequence[results.Row], out: Path) -> None:
    with writing(out / "table.csv") as aside:
        results.write_csv(rows, aside)
    with writing(out / "plot.svg") as aside:
        title = f"{recipe.name} on {recipe.data.name}, {recipe.steps} steps an arm"
        plot([row for row in rows if not row["samples"]], aside, title)


def _save_networks(generator: Any, recipe: Recipe, out: Path) -> None:
    """Plain networks as state_dicts: they load into the network's class built at that width."""
    for w in recipe.widths[::4]:
        with writing(out / f"network-{w:g}.pt") as aside:
            torch.save(generator.materialize(w).state_dict(), aside)
