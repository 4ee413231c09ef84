"""The commands a person types: ``slimkernels info | demo | train | bench``."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, NoReturn

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
