"""What a person sees of a run: a progress bar, validation tables, TensorBoard."""

import importlib.util
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor

_log = logging.getLogger("slimkernels.train")


class Display:
    """Shows the run on the terminal (``enabled``) and in TensorBoard event files (``log_dir``); silent otherwise.

    Raises: RuntimeError when ``log_dir`` is given and TensorBoard is not installed.
    """

    def __init__(self, enabled: bool, log_dir: str | os.PathLike | None, log_every: int) -> None:
        if log_dir is not None and importlib.util.find_spec("tensorboard") is None:
            raise RuntimeError(
                "train: log_dir needs TensorBoard, which is not installed; type: pip install tensorboard"
            )
        self.enabled, self.log_dir, self.log_every = enabled, log_dir, max(log_every, 1)
        self.console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._writer: Any = None

    @contextmanager
    def running(self, step: int, total: int | None) -> Iterator[None]:
        """The bar and the event file are open inside; events after ``step``, of a run that was killed, are dropped."""
        if self.log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(os.fspath(self.log_dir), purge_step=step + 1)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        try:
            with Progress(*columns, console=self.console, disable=not self.enabled) as self._bar:
                self._task = self._bar.add_task("training", total=total, completed=step)
                yield
        finally:
            self._bar = self._task = None
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def step(self, step: int, epoch: int, losses: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        """One step is done. The losses, by name, are read from the device only every ``log_every`` steps."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)
        if step % self.log_every or not (self.enabled or self._writer):
            return
        values = {name: float(loss) for name, loss in losses.items()}
        if self._bar is not None and self._task is not None:
            first = next(iter(values.values()), math.nan)
            self._bar.update(self._task, description=f"epoch {epoch + 1}  loss {first:.4f}")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"loss/{name}", value, step)
            self._writer.add_scalar("lr", optimizer.param_groups[0]["lr"], step)

    def validation(self, step: int, rows: list[dict[str, Any]]) -> None:
        """A table of the validation rows."""
        if self._writer is not None:
            for row in rows:
                where = "val" if row["weights"] == "model" else f"val_{row['weights']}"
                for name, value in row.items():
                    if name not in ("step", "weights", "width", "depth"):
                        subnet = (row["width"], row["depth"]) if "depth" in row else row.get("width")
                        self._writer.add_scalar(f"{where}/{name}/{label(subnet)}", value, step)
        if self.enabled and rows:
            names = list(rows[0])[1:]
            table = Table(*names, title=f"validation at step {step}")
            for row in rows:
                table.add_row(*(label(row.get(name)) for name in names))
            self.console.print(table)

    def say(self, text: str, warn: bool = False) -> None:
        """One sentence to the person at the terminal, or to the log of ``slimkernels.train``."""
        if self.enabled:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            _log.log(logging.WARNING if warn else logging.INFO, text)


def label(value: Any) -> str:
    if isinstance(value, tuple):  # (width, depth)
        return " x ".join(label(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def by_width(losses: dict[Any, Tensor], bounds: tuple[Any, Any] | None) -> dict[str, Tensor]:
    """Losses of widths, or pairs (width, depth), by name; with bounds (the largest and the smallest one) the
    random ones between them, others every step, go under `between`."""
    fixed = {label(w): loss for w, loss in losses.items() if bounds is None or w in bounds}
    between = [loss for w, loss in losses.items() if bounds is not None and w not in bounds]
    return {**fixed, "between": torch.stack(between).mean()} if between else fixed
