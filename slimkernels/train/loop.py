"""The one training loop: steps, epochs, checkpoints, exact resume, progress. What a step is, a subclass says."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.train._common import device_of, move, unwrap
from slimkernels.train.checkpoint import CheckpointError, CheckpointStore, read
from slimkernels.train.data import DataStream, EmptyEpochError, isolated_rng, rng_state, set_rng_state
from slimkernels.train.ema import Ema
from slimkernels.train.interrupt import Interrupt
from slimkernels.train.progress import Display, label
from slimkernels.train.ranks import gather, rank_and_size
from slimkernels.train.step import optimizer_step

Row = dict[str, Any]  # one line of a validation table: step, weights ("model" or "ema"), width, metrics


class TrainingError(RuntimeError):
    """Training cannot go on; the sentence says at which step, why, and what is on disk."""


class _Interrupted(Exception):
    """The loader failed because of Ctrl-C."""


class Trainer:
    """A loop around a training step that a subclass gives (``training_step``, ``validate``, ``extra_state``).

    Two runs with the same seed and data give the same losses; a run that was killed and resumed gives the same losses
    as one that was not: a checkpoint holds the model, optimizer, scheduler, scaler, EMA, what the subclass adds, every
    random state and the position in the epoch's data. Validation draws no random number from the training's generators.

    Ctrl-C ends the run after the current step with a checkpoint (a second one at once, without).

    Args:
        model: also in DistributedDataParallel; rank 0 writes and shows.
        train_loader: iterated once an epoch; see ``DataStream`` for how its order is seeded.
        scheduler: stepped after every optimizer step, or every epoch (``scheduler_interval="epoch"``).
        amp: `bf16`, `fp16` (with a gradient scaler) or None.
        clip_grad: largest norm of all gradients together, or None.
        accumulate: batches a step, whose gradients are averaged; the last step of an epoch takes what is left.
        ema: decay of an exponential moving average of the weights, or None; it is validated beside the model.
        validate_every: steps, or `epoch`.
        log_dir: where TensorBoard event files go, or None.
        checkpoint_dir: where checkpoints go, or None. They are written every ``checkpoint_every`` steps (or each
            `epoch`), at the end, on Ctrl-C and when the loader raises; the newest ``keep`` stay.
        on_step: called with (step, losses) after each step.

    Raises: ValueError when an argument does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        scheduler_interval: str = "step",
        amp: str | None = None,
        clip_grad: float | None = None,
        accumulate: int = 1,
        ema: float | None = None,
        validate_every: int | str = "epoch",
        log_dir: str | os.PathLike | None = None,
        log_every: int = 10,
        checkpoint_dir: str | os.PathLike | None = None,
        checkpoint_every: int | str = "epoch",
        keep: int = 3,
        seed: int = 0,
        progress: bool = True,
        on_step: Callable[[int, dict[Any, Tensor]], None] | None = None,
    ) -> None:
        name = type(self).__name__
        for argument, value in (("validate_every", validate_every), ("checkpoint_every", checkpoint_every)):
            if value != "epoch" and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected {argument} to be a number of steps or 'epoch', got {value!r}")
        if not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"{name}: expected accumulate to be a number of batches, got {accumulate!r}")
        if scheduler_interval not in ("step", "epoch"):
            raise ValueError(f"{name}: expected scheduler_interval 'step' or 'epoch', got {scheduler_interval!r}")
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError(f"{name}: expected a scheduler that needs no metric, got ReduceLROnPlateau")
        if amp not in (None, "bf16", "fp16"):
            raise ValueError(f"{name}: expected amp to be 'bf16', 'fp16' or None, got {amp!r}")
        self.model, self.optimizer = model, optimizer
        self.device = device_of(model)
        self.rank, self.world_size = rank_and_size()
        self.data = DataStream(train_loader, seed, self.rank)
        self.val_loader = val_loader
        self.scheduler, self.scheduler_interval = scheduler, scheduler_interval
        self.amp, self.clip_grad, self.accumulate = amp, clip_grad, accumulate
        self.scaler = torch.amp.GradScaler(self.device.type) if amp == "fp16" else None
        self.ema = None if ema is None else Ema(unwrap(model), ema)
        self.validate_every, self.checkpoint_every = validate_every, checkpoint_every
        self.store = None if checkpoint_dir is None else CheckpointStore(checkpoint_dir, keep)
        self.display = Display(progress and self.rank == 0, log_dir if self.rank == 0 else None, log_every)
        self.on_step = on_step
        self.step = 0  # optimizer steps done
        self.history: list[Row] = []  # every validation row so far
        self._saved: tuple[int, int, int | None] | None = None  # what the last checkpoint written or read stands for
        self._validated: int | None = None
        self._rng: dict[str, Any] | None = None  # of before the fetch that failed; None: the present state counts
        self._interrupt = Interrupt(self.display.say)
        self.stopped = False  # the last fit ended with Ctrl-C, on some rank

    def training_step(self, batches: list[Any]) -> dict[Any, Tensor]:
        """Zeroes gradients, runs forward and backward of every batch (``accumulate`` of them, or fewer at the end of an
        epoch) and calls ``finish_step``; returns detached losses by name."""
        raise NotImplementedError(f"{type(self).__name__} has no training_step")

    def validate(self, model: nn.Module) -> list[Row]:
        """Metrics of the model (or its EMA), a row per width; only called with a ``val_loader``."""
        raise NotImplementedError(f"{type(self).__name__} has no validate")

    def extra_state(self) -> dict[str, Any]:
        """What a subclass adds to the checkpoint: plain data and tensors."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes back what ``extra_state`` gave."""

    def loaders(self) -> list[Any]:
        """The loaders that a validation reads: their own random generators are left as they were."""
        return [self.data.loader, self.val_loader]

    def named_losses(self, losses: dict[Any, Tensor]) -> dict[str, Tensor]:
        """The losses of a step under names that come back every step, for the progress bar and TensorBoard."""
        return {label(key): loss for key, loss in losses.items()}

    def finish_step(self) -> None:
        """Clips, steps the optimizer and the scheduler, updates the EMA."""
        stepped = optimizer_step(self.model, self.optimizer, scaler=self.scaler, clip_grad=self.clip_grad)
        if stepped and self.scheduler is not None and self.scheduler_interval == "step":
            self.scheduler.step()
        if stepped and self.ema is not None:
            self.ema.update(unwrap(self.model))

    def fit(
        self, *, epochs: int | None = None, steps: int | None = None, resume: bool | str | os.PathLike = False
    ) -> list[Row]:
        """Trains until so many epochs or optimizer steps are done in total, resumed ones included.

        Args:
            resume: True goes on from the newest readable checkpoint in ``checkpoint_dir``, and starts at step 0 when
                there is none; a path goes on from that file.

        Returns: the history: one row per validation, width and kind of weights.
        Raises: ValueError when neither or both of epochs and steps are given, or when ``checkpoint_dir`` holds an
            earlier run that
            is not resumed; TrainingError when the loader raises; CheckpointError when no checkpoint can be read or it
            belongs to another model.
        """
        if (epochs is None) == (steps is None):
            raise ValueError(f"{type(self).__name__}: expected either epochs or steps, got {epochs} and {steps}")
        self._begin(resume)
        if len(set(gather(self.step, self.world_size))) > 1:
            raise CheckpointError(
                f"checkpoint: expected all ranks to resume at one step, got {self.step} on rank {self.rank}; "
                "checkpoint_dir has to be one directory that every rank sees"
            )
        if not unwrap(self.model).training:
            self.model.train()  # else the user's choice stands, module by module
        self.stopped = False
        with self._interrupt.handled(), self.display.running(self.step, self._total(epochs, steps)):
            while not self._done(epochs, steps) and not self._stop_asked():
                try:
                    batches = self._next_batches()
                except _Interrupted:
                    break
                if not batches:
                    self._end_epoch()
                    continue
                losses = self.training_step([move(batch, self.device) for batch in batches])
                self.step += 1
                self.display.step(self.step, self.data.epoch, self.named_losses(losses), self.optimizer)
                if self.on_step is not None:
                    self.on_step(self.step, losses)
                self._every_steps()
            if not self.stopped:
                self._validate()
            self._save()
            if self.stopped:
                self.display.say(f"Stopped at step {self.step}. {self._on_disk()}")
        return self.history

    def save(self) -> Path | None:
        """Writes a checkpoint of this moment; rank 0 does, on all ranks' call. Returns its path."""
        assert self.store is not None, "save() needs checkpoint_dir"
        state = self.state_dict()
        return self.store.save(state, self.step) if self.rank == 0 else None

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step's result depends on."""
        rng = rng_state() if self._rng is None else self._rng
        return {
            "kind": type(self).__name__,
            "step": self.step,
            "epoch": self.data.epoch,
            "position": self.data.position,
            "seed": self.data.seed,
            "model": unwrap(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "rng": gather(rng, self.world_size),
            "history": self.history,
            "validated": self._validated,
            "extra": self.extra_state(),
        }

    def load_state_dict(self, state: dict[str, Any], source: str = "the checkpoint") -> None:
        """Goes on from a saved state: loads everything, returns to the position in the data, restores the random
        states.

        Raises: CheckpointError when the state belongs to another trainer, model, seed or number of ranks.
        """
        if len(state["rng"]) != self.world_size:
            raise CheckpointError(
                f"checkpoint: {source} was written by {len(state['rng'])} ranks, got {self.world_size}"
            )
        for name, ours in (("kind", type(self).__name__), ("seed", self.data.seed)):
            if state[name] != ours:
                raise CheckpointError(f"checkpoint: {source} was written with {name} {state[name]!r}, got {ours!r}")
        parts = {"scheduler": self.scheduler, "scaler": self.scaler, "ema": self.ema}
        for name, part in parts.items():
            if (state[name] is None) != (part is None):
                has, now = ("no", "one") if state[name] is None else ("a", "none")
                raise CheckpointError(f"checkpoint: {source} was written with {has} {name}, got {now} now")
        try:
            unwrap(self.model).load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"checkpoint: {source} belongs to another model or optimizer ({reason})") from error
        try:
            self.load_extra_state(state["extra"])
            self.data.seek(state["epoch"], state["position"])
        except ValueError as error:
            raise CheckpointError(f"checkpoint: {source} belongs to another run: {error}") from error
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
        self.step, self.history, self._validated = state["step"], list(state["history"]), state["validated"]
        set_rng_state(state["rng"][self.rank])
        self._rng = None
        self._saved = (self.step, self.data.epoch, self._validated)

    def _begin(self, resume: bool | str | os.PathLike) -> None:
        if isinstance(resume, (str, os.PathLike)):
            self.load_state_dict(read(resume), str(resume))
            return
        if resume:
            if self.store is None:
                raise ValueError(f"{type(self).__name__}: expected checkpoint_dir to resume from, got None")
            found = self.store.latest()
            if found is None:
                self.display.say(f"No checkpoint in {self.store.directory}: starting at step 0.")
                return
            state, path, failures = found
            for failure in failures:
                self.display.say(f"{failure}; falling back to {path}.", warn=True)
            self.load_state_dict(state, str(path))
            self.display.say(f"Resumed at step {self.step} from {path}.")
        elif self.step == 0 and self.store is not None and self.store.steps():
            raise ValueError(
                f"{type(self).__name__}: expected an empty checkpoint_dir for a new run, got {self.store.directory} "
                f"with a checkpoint of step {self.store.steps()[0]}; give resume=True, another directory, or clear it "
                "(trainer.store.clear())"
            )

    def _next_batches(self) -> list[Any]:
        """The batches of the next step; none at the end of an epoch.

        When the loader fails, the position goes back to where the last step left it.
        """
        if self.data.lost and self._rng is not None:  # an earlier fit ended with an error of the loader
            self.data.seek(self.data.epoch, self.data.position)
            set_rng_state(self._rng)
        self._rng = rng_state()
        start = self.data.position
        batches: list[Any] = []
        try:
            while len(batches) < self.accumulate and (batch := self.data.next_batch()) is not None:
                batches.append(batch)
        except EmptyEpochError:
            raise
        except Exception as error:
            where = f"step {self.step + 1} (epoch {self.data.epoch + 1}, batch {self.data.position + 1})"
            self.data.position = start
            if self._interrupt.pressed and self.world_size == 1:  # Ctrl-C reached the loader's worker processes too
                self.stopped = True
                raise _Interrupted from error
            if self.world_size == 1:  # else the other ranks are not here
                self._save()
            raise TrainingError(
                f"{type(self).__name__}: the training loader failed at {where}: {_reason(error)}. {self._on_disk()}"
            ) from error
        self._rng = None
        return batches

    def _end_epoch(self) -> None:
        self.data.next_epoch()
        if self.scheduler is not None and self.scheduler_interval == "epoch":
            self.scheduler.step()
        if self.validate_every == "epoch":
            self._validate()
        if self.checkpoint_every == "epoch":
            self._save()

    def _every_steps(self) -> None:
        if isinstance(self.validate_every, int) and self.step % self.validate_every == 0:
            self._validate()
        if isinstance(self.checkpoint_every, int) and self.step % self.checkpoint_every == 0:
            self._save()

    def _validate(self) -> None:
        if self.val_loader is None or self._validated == self.step:
            return
        rows: list[Row] = []
        with isolated_rng(*self.loaders()), self._validation_named():
            rows += [{"step": self.step, "weights": "model", **row} for row in self.validate(unwrap(self.model))]
            if self.ema is not None:
                rows += [{"step": self.step, "weights": "ema", **row} for row in self.validate(self.ema.module)]
        self.history += rows
        self._validated = self.step
        self.display.validation(self.step, rows)

    @contextmanager
    def _validation_named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise TrainingError(
                f"{type(self).__name__}: the validation after step {self.step} failed: {_reason(error)}. "
                f"{self._on_disk()}"
            ) from error

    def _save(self) -> None:
        at = (self.step, self.data.epoch, self._validated)
        if self.store is not None and self._saved != at and self.step > 0:
            self.save()
            if self.world_size > 1:
                torch.distributed.barrier()  # no rank looks for the file before it is there
            self._saved = at

    def _on_disk(self) -> str:
        steps = self.store.steps() if self.store is not None else []
        if self.store is None or not steps:
            return (
                "There is no checkpoint."
                if self.store is not None
                else "No checkpoint_dir was given: nothing is saved."
            )
        return f"The checkpoint of step {steps[0]} is {self.store.path(steps[0])}; go on with fit(resume=True)."

    def _total(self, epochs: int | None, steps: int | None) -> int | None:
        return steps if steps is not None else (len(self.data) * (epochs or 0) or None)

    def _done(self, epochs: int | None, steps: int | None) -> bool:
        return self.step >= steps if steps is not None else self.data.epoch >= (epochs or 0)

    def _stop_asked(self) -> bool:
        """Whether Ctrl-C was pressed; the ranks agree, every few steps, so that none waits for another."""
        if self.world_size == 1:
            self.stopped = self._interrupt.pressed
        elif self.step % 10 == 0:
            flag = torch.tensor(float(self._interrupt.pressed), device=self.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.stopped = bool(flag.item())
        return self.stopped


def _reason(error: BaseException) -> str:
    """The error in one line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
