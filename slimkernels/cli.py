"""The commands a person types: ``slimkernels info | kernels | demo | train | bench``."""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Run and train one set of weights at any width.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(help="Make a pre-trained network slimmable on real data.", no_args_is_help=True)
app.add_typer(train_app, name="train")

console = Console()

KERNEL_COLUMNS: dict[str, Any] = {
    "kernel": "left",
    "dtype": "left",
    "registers": "right",
    "spills": "right",
    "shared": "right",
    "occupancy": "right",
    "moved": "right",
    "rungs passed": "left",
    "run on a GPU": "left",
}


def fail(message: object) -> NoReturn:
    """One sentence on stderr, exit status 1."""
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {message!s}", highlight=False)
    raise typer.Exit(1)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """What was built, which instruction set is in use, which torch, Triton and CUDA are seen, and why anything is off."""
    from slimkernels import _info

    sections = _info.collect()
    if as_json:
        print(json.dumps(sections, indent=2))
        return
    for title, section in sections.items():
        table = Table(
            title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2, 0, 2)
        )
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in section.items():
            table.add_row(name, text)
        console.print(table)
        console.print()


@app.command()
def kernels(
    target: Annotated[
        str, typer.Option(help="One of the table's targets, for example sm_80, sm_90 or gfx942; or 'all'.")
    ] = "sm_90",
) -> None:
    """The GPU kernels: what each takes on a target, and how it was shown right without a GPU."""
    from slimkernels import gpu_kernels

    rows = gpu_kernels.read()
    targets = sorted({row.target for row in rows})
    if target != "all" and target not in targets:
        fail(f"kernels: expected --target to be all or one of {', '.join(targets)}, got {target!r}")
    shown = [row for row in rows if target in ("all", row.target)]
    table = Table(title=f"GPU kernels, {target}", title_justify="left", title_style="bold", box=None, padding=(0, 1))
    for column, justify in KERNEL_COLUMNS.items():
        table.add_column(column, justify=justify, style="cyan" if column == "kernel" else None, overflow="fold")
    for row in shown:
        name = row.kernel if target != "all" else f"{row.kernel} ({row.target})"
        takes = (row.registers, row.spills, row.shared, row.occupancy)
        table.add_row(name, row.dtype, *takes, row.moved, row.rungs, row.gpu)
    console.print(table)
    console.print(
        "\nregisters a thread; spills and shared memory in bytes; occupancy: a bound; moved: bytes that all kernels of the"
        " op and direction move, over the fewest possible.",
        highlight=False,
    )
    for rung, text in gpu_kernels.RUNGS.items():
        console.print(f"{rung}  {text}", highlight=False)


def run_recipe(
    build: Callable[[], Any],
    out: Path,
    resume: bool,
    seed: int,
    threads: int | None,
    run: Callable[..., Any] | None = None,
) -> None:
    """Builds and runs a recipe (``run``; None: the pipeline's); what a person can mend is told in one sentence."""
    import torch

    from slimkernels.recipes import data, pipeline
    from slimkernels.train import CheckpointError, TrainingError

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        (run or pipeline.run)(build(), out, resume=resume, seed=seed, command=command_line(), console=console)
    except (data.DataError, pipeline.Stopped, CheckpointError, TrainingError, ValueError) as error:
        fail(error)


def command_line() -> str:
    """How this run was started, with bare names for paths: they say what was given, not where it lies."""
    return shlex.join(["slimkernels", *(Path(a).name if "/" in a else a for a in sys.argv[1:])])


Out = Annotated[Path, typer.Option(help="Folder for checkpoints, table, plot and sub-network.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last checkpoint in --out; otherwise start afresh.")
]
Steps = Annotated[int, typer.Option(min=1, help="Fine-tuning steps.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a step.")]
Seed = Annotated[int, typer.Option(help="Of the order of the data, the widths drawn and the augmentation.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads for training; latency is always timed on one.")]
Speech = Annotated[Path, typer.Option(help="Folder with the Asterisk speech prompts (g722).")]
Noise = Annotated[Path, typer.Option(help="Folder with noises and music (flac).")]


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    resume: Resume = False,
    steps: Steps = 700,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Make a digit classifier with real pre-trained weights slimmable, in about a minute, and compare."""
    from slimkernels.recipes import digits

    run_recipe(lambda: digits.recipe(steps, batch_size), out, resume, seed, threads)


@train_app.command()
def cifar(
    data: Annotated[
        Path, typer.Option(help="CIFAR-10: class folders, a zip of them, or its python or binary batches.")
    ],
    weights: Annotated[
        Path, typer.Option(help="Trained ResNet-20 weights (a state_dict; keys may start with module.).")
    ],
    out: Out = Path("runs/cifar"),
    resume: Resume = False,
    steps: Steps = 400,
    batch_size: BatchSize = 128,
    lr: Annotated[float, typer.Option(min=0, help="Highest learning rate of the cosine schedule.")] = 0.05,
    slim: Annotated[
        str, typer.Option(help="'blocks': channels inside residual blocks; 'all': those between them too.")
    ] = "blocks",
    test_images: Annotated[int | None, typer.Option(min=10, help="Test on so many images instead of all.")] = None,
    amp: Annotated[str | None, typer.Option(help="'bf16' for mixed precision in training.")] = None,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Make a pre-trained CIFAR ResNet-20 slimmable and compare widths in one table."""
    from rich.progress import Progress

    from slimkernels.recipes import cifar as cifar_recipe

    def build() -> Any:
        with Progress(console=console, transient=True) as bar:
            tasks = {part: bar.add_task(f"reading {part} images", total=None) for part in ("train", "test")}
            return cifar_recipe.recipe(
                data,
                weights,
                steps=steps,
                batch_size=batch_size,
                lr=lr,
                slim=slim,
                test_images=test_images,
                amp=amp,
                progress=lambda part, done, total: bar.update(tasks[part], completed=done, total=total),
            )

    run_recipe(build, out, resume, seed, threads)


@train_app.command("hyper")
def hypernet(
    recipe: Annotated[str, typer.Option(help="'digits', 'cifar' or 'last-block' (of the CIFAR network).")] = "digits",
    data: Annotated[Path | None, typer.Option(help="For cifar: the images, as for train cifar.")] = None,
    weights: Annotated[Path | None, typer.Option(help="For cifar: the trained weights, as for train cifar.")] = None,
    out: Out = Path("runs/hyper"),
    resume: Resume = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps of every arm.")] = 400,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a step (64 digits, 128 others).")] = None,
    arms: Annotated[str | None, typer.Option(help="Some of the arms only: how their names begin, with ';'.")] = None,
    test_images: Annotated[int | None, typer.Option(min=10, help="For cifar: test on so many images.")] = None,
    hold_out: Annotated[
        int | None,
        typer.Option(min=10, help="Keep so many training images out and measure on them, not on the test images."),
    ] = None,
    amp: Annotated[str | None, typer.Option(help="For cifar: 'bf16' for mixed precision.")] = None,
    features: Annotated[
        Path | None, typer.Option(help="For last-block: file that keeps the frozen layers' outputs for the next run.")
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Generate a network's weights at every width, and compare with slimmable fine-tuning of the same budget."""
    from slimkernels.recipes import hyper
    from slimkernels.recipes.data import held_out

    names = None if arms is None else [name.strip() for name in arms.split(";")]
    if recipe not in ("digits", "cifar", "last-block"):
        fail(f"train hyper: expected --recipe to be digits, cifar or last-block, got {recipe!r}")

    def build() -> Any:
        if recipe == "digits":
            return hyper.digit_recipe(steps, batch_size or 64, names)
        if data is None or weights is None:
            raise ValueError(f"train hyper: expected --data and --weights with --recipe {recipe}, got none")
        options: dict[str, Any] = {
            "steps": steps,
            "batch_size": batch_size or 128,
            "arms": names,
            "test_images": test_images,
        }
        if recipe == "last-block":
            return hyper.last_block_recipe(data, weights, features=features, **options)
        return hyper.cifar_recipe(data, weights, amp=amp, **options)

    def prepared() -> Any:
        made = build()
        if hold_out is not None:
            made.data = held_out(made.data, hold_out)
        return made

    run_recipe(prepared, out, resume, seed, threads, hyper.run)


@train_app.command()
def enhance(
    out: Out = Path("runs/enhance"),
    resume: Resume = False,
    speech: Speech = Path("/usr/share/asterisk/sounds"),
    noise: Noise = Path("/usr/share/sonic-pi/samples"),
    steps: Steps = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Mixtures a step.")] = 8,
    lr: Annotated[float, typer.Option(min=0, help="Highest learning rate of the cosine schedule.")] = 1e-3,
    distill: Annotated[float, typer.Option(min=0, help="Weight of distillation from the published network.")] = 1.0,
    seeds: Annotated[int, typer.Option(min=1, help="So many repetitions with seeds 0, 1, ...")] = 1,
    threads: Threads = None,
) -> None:
    """Make the pre-trained speech enhancer NSNet2 slimmable on real speech, and compare widths in one table."""
    from slimkernels.recipes import enhance as recipe

    settings = recipe.Settings(steps=steps, batch_size=batch_size, lr=lr, distill=distill, seeds=seeds)

    def run(settings: Any, out: Path, *, seed: int, **options: Any) -> None:
        recipe.run(out, settings, speech=speech, noise=noise, **options)

    run_recipe(lambda: settings, out, resume, 0, threads, run)


@train_app.command()
def separate(
    out: Out = Path("runs/separate"),
    resume: Resume = False,
    speech: Speech = Path("/usr/share/asterisk/sounds"),
    noise: Noise = Path("/usr/share/sonic-pi/samples"),
    steps: Annotated[int, typer.Option(min=1, help="Steps of every training.")] = 800,
    batch_size: Annotated[int, typer.Option(min=1, help="Mixtures a step.")] = 8,
    lr: Annotated[float, typer.Option(min=0, help="Highest learning rate of the cosine schedule.")] = 2e-3,
    seeds: Annotated[int, typer.Option(min=1, help="So many repetitions with seeds 0, 1, ...")] = 3,
    threads: Threads = None,
) -> None:
    """Train a band-split RNN once at all widths and depths, and its sub-networks alone, to separate speech from music."""
    from slimkernels.recipes import separate as recipe

    settings = recipe.Settings(steps=steps, batch_size=batch_size, lr=lr, seeds=seeds)

    def run(settings: Any, out: Path, *, seed: int, **options: Any) -> None:
        recipe.run(out, settings, speech=speech, noise=noise, **options)

    run_recipe(lambda: settings, out, resume, 0, threads, run)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    op: Annotated[str | None, typer.Argument(help="One op, for example slim_linear; all of them by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes and repetitions.")] = False,
) -> None:
    """Time the ops against plain PyTorch on this machine, from a source checkout; further options go to benchmarks.run."""
    if not Path("benchmarks/run.py").is_file():
        fail(
            "bench: expected to run in a source checkout of slimkernels (a folder with benchmarks/run.py), got another folder"
        )
    command = [sys.executable, "-m", "benchmarks.run"] + ([op] if op else []) + (["--quick"] if quick else [])
    raise typer.Exit(subprocess.run(command + context.args, check=False).returncode)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
