"""The trainer of slimmable networks."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.train._common import autocast, unwrap
from slimkernels.train.data import iter_is_self
from slimkernels.train.distill import Distillation, distillation
from slimkernels.train.evaluate import Metric, evaluate
from slimkernels.train.loop import Row, Trainer
from slimkernels.train.progress import by_width
from slimkernels.train.step import LossFn, accumulate_passes, as_pair, elastic_depths, elastic_widths, make_sampler
from slimkernels.train.widths import WidthSampler, spaced


class SlimmableTrainer(Trainer):
    """Trains an elastic model with the steps of ``sandwich_step`` and validates it at several widths.

    Args:
        model: what ``elastic.convert`` gave, as it is, compiled or in DistributedDataParallel.
        loss_fn: (output, targets) -> scalar.
        train_loader: gives (inputs, targets).
        val_loader: likewise; None: no validation.
        widths, depths, rule, distill, temperature, distill_weight: see ``sandwich_step``; ``rule`` may be a ``WidthSampler``.
        eval_widths: the widths of the validation; None: the model's listed ones, or four over its range.
        eval_depths: the depths of the validation, each at every one of those widths, for a model with elastic depth; None:
            the smallest and the full one.
        metrics: name -> (output, targets) -> values, or a torchmetrics object; None: top-1 accuracy.
        calibrate: recompute batch-norm statistics of the evaluated widths before each validation. None: when the
            model's norm mode is `universal`.
        calibration_loader: where those statistics come from; None: the training data.
        calibration_batches: at most so many batches of it; None: all.
        options: every keyword of ``Trainer``: scheduler, amp, clip_grad, ema, checkpoint_dir, seed and so on.

    Raises: ValueError when an argument does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: torch.optim.Optimizer,
        *,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        widths: int | Sequence[float] | None = None,
        depths: Sequence[float] | None = None,
        rule: str | WidthSampler = "sandwich",
        distill: str | Distillation | None = "kl",
        temperature: float = 1.0,
        distill_weight: float = 1.0,
        eval_widths: Sequence[float] | None = None,
        eval_depths: Sequence[float] | None = None,
        metrics: Mapping[str, Metric] | None = None,
        calibrate: bool | None = None,
        calibration_loader: Iterable[Any] | None = None,
        calibration_batches: int | None = 32,
        **options: Any,
    ) -> None:
        super().__init__(model, optimizer, train_loader=train_loader, val_loader=val_loader, **options)
        self.loss_fn, self.metrics = loss_fn, metrics
        self.distill, self.distill_weight = distillation(distill, temperature), distill_weight
        known = elastic_depths(model)
        if isinstance(rule, WidthSampler):
            self.sampler = rule
        else:
            depths = known if depths is None else depths
            self.sampler = make_sampler(model, widths, rule, depths=depths, seed=self.data.seed)
        if eval_depths is None and known is not None:
            eval_depths = [known[0], known[-1]]
        self.eval_depths = None if eval_depths is None else sorted({float(d) for d in eval_depths})
        self.eval_widths = list(eval_widths) if eval_widths is not None else self._default_eval_widths()
        self.calibrate = self._needs_calibration() if calibrate is None else calibrate
        self.calibration_loader = train_loader if calibration_loader is None else calibration_loader
        self.calibration_batches = calibration_batches
        self._check_legal([*self.sampler.widths, *(self.eval_widths if val_loader is not None else [])])
        self._check_legal([(1.0, d) for d in [*(self.sampler.depths or []), *(self.eval_depths or [])]])
        if self.calibrate and val_loader is not None:
            self._check_calibration_loader()

    def training_step(self, batches: list[Any]) -> dict[Any, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        collected: dict[Any, list[Tensor]] = {}
        for i, batch in enumerate(batches):
            losses = accumulate_passes(
                self.model,
                batch,
                self.loss_fn,
                self.sampler.sample(),
                distill=self.distill if self.sampler.teaches else None,
                distill_weight=self.distill_weight,
                amp=self.amp,
                scaler=self.scaler,
                scale=1 / len(batches),
                reduce=i == len(batches) - 1,
            )
            for w, loss in losses.items():
                collected.setdefault(w, []).append(loss)
        self.finish_step()
        return {w: found[0] if len(found) == 1 else torch.stack(found).mean() for w, found in collected.items()}

    def named_losses(self, losses: dict[Any, Tensor]) -> dict[str, Tensor]:
        varies = self.sampler.range is not None or self.sampler.depths is not None
        return by_width(losses, self.sampler.ends if varies else None)

    def validate(self, model: nn.Module) -> list[Row]:
        assert self.val_loader is not None
        if self.eval_depths is None:
            if self.calibrate:
                self._calibrate(model)
            found = evaluate(model, self.val_loader, self.eval_widths, self.metrics, amp=self.amp)
            return [{"width": w, **metrics} for w, metrics in found.items()]
        rows: list[Row] = []
        for depth in self.eval_depths:  # the deepest last: its batch-norm statistics are those that stay
            if self.calibrate:
                self._calibrate(model, depth)
            found = evaluate(model, self.val_loader, [(w, depth) for w in self.eval_widths], self.metrics, amp=self.amp)
            rows = [{"width": w, "depth": d, **metrics} for (w, d), metrics in found.items()] + rows
        return rows

    def extra_state(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state_dict()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])

    def loaders(self) -> list[Any]:
        return [*super().loaders(), self.calibration_loader]

    def _calibrate(self, model: nn.Module, depth: float | None = None) -> None:
        from slimkernels import elastic

        batches = itertools.islice(self.calibration_loader, self.calibration_batches)
        with autocast(model, self.amp):
            elastic.calibrate(model, batches, self.eval_widths, depth=depth)
        if (
            self.world_size > 1
        ):  # each rank saw its own data: rank 0's statistics stand for all, as they do in a checkpoint
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _default_eval_widths(self) -> list[float]:
        choices = elastic_widths(self.model)
        return spaced(choices, 4) if isinstance(choices, tuple) else sorted(choices, reverse=True)

    def _needs_calibration(self) -> bool:
        from slimkernels import elastic

        inner = unwrap(self.model)
        has_statistics = any(hasattr(module, "start_calibration") for module in inner.modules())
        return has_statistics and elastic.plan(inner).norm == "universal"

    def _check_legal(self, widths: Sequence[Any]) -> None:
        """Raises what ``elastic.width`` raises for a width or pair (width, depth) that the model does not take:
        now and not after an epoch."""
        from slimkernels import elastic

        for w in widths:
            with elastic.width(unwrap(self.model), *as_pair(w)):
                pass

    def _check_calibration_loader(self) -> None:
        shared = self.calibration_loader is self.data.loader
        if shared and getattr(self.data.loader, "persistent_workers", False):
            raise ValueError(
                "SlimmableTrainer: expected calibration_loader, since a train_loader with persistent_workers cannot be "
                "read a second time in mid-epoch, got None"
            )
        if iter_is_self(self.calibration_loader):
            kind = type(self.calibration_loader).__name__
            raise ValueError(
                f"SlimmableTrainer: expected a calibration_loader that can be iterated every time, got a {kind}"
            )
