"""The trainer of weight generators: NeuMeta, block-wise and residual."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.elastic.plan import Width
from slimkernels.train._common import autocast, call, device_of, map_tensors, move, split_batch
from slimkernels.train.data import iter_is_self
from slimkernels.train.distill import Distillation, distillation
from slimkernels.train.evaluate import Metric, evaluate
from slimkernels.train.fuse import fused_forward
from slimkernels.train.loop import Row, Trainer
from slimkernels.train.progress import by_width
from slimkernels.train.step import LossFn, elastic_widths, make_sampler
from slimkernels.train.widths import WidthSampler, spaced

MODES: dict[str, dict[str, Any]] = {
    "neumeta": {"rule": "random", "distill": None, "weight_norm": 1e-4, "reconstruction": 1.0},
    "blockwise": {"rule": "random", "distill": None, "weight_norm": 1e-4, "reconstruction": 1.0},
    "residual": {"rule": "sandwich", "distill": "kl", "weight_norm": 0.0, "reconstruction": 0.0},
}
TEACHERS = ("full", "pretrained")


class HypernetTrainer(Trainer):
    """Trains a ``hyper.WeightGenerator`` so that the network it makes is good at every width, trained or not.

    A step draws widths, generates the weights at each, runs the target with them and adds up the gradients of

        task or distillation + weight_norm * sum ||W|| + reconstruction * ||W - W_pre||^2 / ||W_pre||^2 (full width only)

    | mode        | generator                | widths a step | losses besides the task |
    |-------------|--------------------------|---------------|-------------------------|
    | `neumeta`   | ``base=None``            | one, random   | weight norm 1e-4, reconstruction 1 |
    | `blockwise` | with ``blocks``          | one, random   | the same |
    | `residual`  | ``base="residual"``      | sandwich      | KL to the full width |

    Mode `blockwise` generates and trains one block after another: each starts as a copy of the one before (with base
    "residual", of its hidden layers: a block starts as the target's own), and earlier ones stay as they are (but see
    ``train_previous``). The blocks to come run at full width with the target's own weights: sliced, they would teach those
    before them noise. Without base, ``reconstruction_steps`` of regression onto the target's own weights
    (``hyper.reconstruct``) come before the first step, and before the first step of every block: a network that does not
    start there learns to give nothing, and its residual branch stays dead.

    Validation generates a plain network at each width (mean over ``eval_samples`` noisy samples) and says in the column
    ``seen`` whether the width is one of those trained.

    Args:
        generator: its ``trained_parameters()`` are what ``optimizer`` gets; not in DistributedDataParallel.
        loss_fn: (output, targets) -> scalar.
        widths: how many widths the rule draws from the target's own, or a list: exactly these.
        rule: as in ``sandwich_step``, or a ``WidthSampler``; None: the mode's.
        distill: `kl`, `ce`, `alpha`, a function, or None; "mode": the mode's. A student's loss is
            ``distill_weight * distillation + (1 - distill_weight) * loss_fn``.
        teacher: "full": the generated network at full width, which learns from the targets; "pretrained": a copy of the
            target as it is now, in evaluation mode, for every width.
        weight_norm, reconstruction: weights of these losses; None: the mode's.
        reconstruction_steps, reconstruction_lr: of ``hyper.reconstruct`` before the first step (of each block).
        samples: noisy samples that a training step averages.
        eval_samples: the same in validation; 1: no noise.
        eval_widths: None: the listed widths and the middles between them, or five over a range.
        steps_per_block: of mode `blockwise`; the last block trains until the end.
        train_previous: in mode `blockwise`, go on training the blocks before.
        calibration_loader, calibration_batches: where the batch-norm statistics of the validated networks come from
            (None: the training data), for targets that have any.
        options: every keyword of ``Trainer``.

    Raises: ValueError when an argument does not fit the mode or the generator.
    Source: Yang et al., Neural Metamorphosis (arXiv 2410.11878); Sommariva et al. (arXiv 2505.05510).
    """

    def __init__(
        self,
        generator: nn.Module,
        loss_fn: LossFn,
        optimizer: torch.optim.Optimizer,
        *,
        mode: str = "residual",
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        widths: int | Sequence[float] | None = None,
        rule: str | WidthSampler | None = None,
        distill: str | Distillation | None = "mode",
        teacher: str = "full",
        temperature: float = 1.0,
        distill_weight: float = 1.0,
        weight_norm: float | None = None,
        reconstruction: float | None = None,
        reconstruction_steps: int = 0,
        reconstruction_lr: float = 6e-3,
        samples: int = 1,
        eval_samples: int = 1,
        eval_widths: Sequence[float] | None = None,
        steps_per_block: int | None = None,
        train_previous: bool = False,
        metrics: Mapping[str, Metric] | None = None,
        calibration_loader: Iterable[Any] | None = None,
        calibration_batches: int | None = 32,
        **options: Any,
    ) -> None:
        from slimkernels import elastic
        from slimkernels.hyper import WeightGenerator

        if not isinstance(generator, WeightGenerator):
            raise ValueError(
                f"HypernetTrainer: expected a hyper.WeightGenerator as it is, got a {type(generator).__name__}"
            )
        _check_mode(mode, generator, steps_per_block)
        if teacher not in TEACHERS:
            raise ValueError(f"HypernetTrainer: expected teacher to be one of {', '.join(TEACHERS)}, got {teacher!r}")
        for name, value in (("samples", samples), ("eval_samples", eval_samples)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"HypernetTrainer: expected {name} to be a positive integer, got {value!r}")
        if (
            isinstance(reconstruction_steps, bool)
            or not isinstance(reconstruction_steps, int)
            or reconstruction_steps < 0
        ):
            raise ValueError(
                f"HypernetTrainer: expected reconstruction_steps to be an integer of at least 0, got {reconstruction_steps!r}"
            )
        if reconstruction_steps and (generator.base is not None or generator.standardized):
            raise ValueError(
                "HypernetTrainer: expected reconstruction_steps with a generator that has no base and no standardized"
                f" weights, got {reconstruction_steps}"
            )
        super().__init__(generator, optimizer, train_loader=train_loader, val_loader=val_loader, **options)
        defaults = MODES[mode]
        self.generator: Any = generator
        self.mode, self.loss_fn, self.metrics = mode, loss_fn, metrics
        self.distill = distillation(defaults["distill"] if distill == "mode" else distill, temperature)
        self.teacher, self.distill_weight = teacher, distill_weight
        # A network of its own: what the target shares with the widths is trained, its batch-norm statistics among it.
        own = teacher == "pretrained"
        self.pretrained: Any = elastic.extract(generator.target, 1.0).eval() if own else None
        self.weight_norm = defaults["weight_norm"] if weight_norm is None else weight_norm
        self.reconstruction = defaults["reconstruction"] if reconstruction is None else reconstruction
        self.reconstruction_steps, self.reconstruction_lr = reconstruction_steps, reconstruction_lr
        self.samples, self.eval_samples = samples, eval_samples
        self.steps_per_block, self.train_previous = steps_per_block, train_previous
        self.block = -1  # of mode "blockwise": the one being trained
        if isinstance(rule, WidthSampler):
            self.sampler = rule
        else:
            chosen = defaults["rule"] if rule is None else rule
            count = widths if not (widths is None and chosen == "random") else 1
            self.sampler = make_sampler(generator.target, count, chosen, seed=self.data.seed)
        self.eval_widths = list(eval_widths) if eval_widths is not None else self._default_eval_widths()
        self.calibration_loader = train_loader if calibration_loader is None else calibration_loader
        self.calibration_batches = calibration_batches
        self._check_widths()

    def training_step(self, batches: list[Any]) -> dict[Any, Tensor]:
        if self.mode == "blockwise":
            self._enter_block()
        elif self.step == 0:
            self._reconstruct(None)
        self.optimizer.zero_grad(set_to_none=True)
        collected: dict[float, list[Tensor]] = {}
        for batch in batches:
            for w, loss in self._passes(batch, 1 / len(batches)).items():
                collected.setdefault(w, []).append(loss)
        self.finish_step()
        return {w: torch.stack(found).mean() for w, found in collected.items()}

    def _passes(self, batch: Any, scale: float) -> dict[float, Tensor]:
        """Forward and backward of every width of the step, one after another; gradients are summed."""
        from slimkernels import elastic

        inputs, targets = split_batch(batch)
        target, widths = self.generator.target, self.sampler.sample()
        losses: dict[float, Tensor] = {}
        taught: Any = None
        if self.distill is not None and (self.teacher == "pretrained" or widths[0] != 1.0):
            taught = self._teach(inputs)
        for w in widths:
            at = self.width_of(w)
            with elastic.width(target, at), fused_forward(target), autocast(self.generator, self.amp):
                weights = self.generator(at, self.samples, blocks=self._blocks())
                output = self.generator.call(inputs, at, weights)
                loss = self._loss(output, targets, taught)
            if self.distill is not None and taught is None:
                taught = map_tensors(output, Tensor.detach)
            losses[w] = loss.detach()
            total = (loss + self._on_weights(weights, w)) * scale
            (total if self.scaler is None else self.scaler.scale(total)).backward()
            del output, weights, loss, total
        return losses

    def _loss(self, output: Any, targets: Any, taught: Any) -> Tensor:
        if self.distill is None or taught is None:
            return self.loss_fn(output, targets)
        loss = self.distill(output, taught)
        if self.distill_weight != 1:
            loss = self.distill_weight * loss + (1 - self.distill_weight) * self.loss_fn(output, targets)
        return loss

    @torch.no_grad()
    def _teach(self, inputs: Any) -> Any:
        """The output that the widths learn from, where no width of the step gives it."""
        with autocast(self.generator, self.amp):
            if self.teacher == "full":
                weights = self.generator(1.0, self.samples, blocks=self._blocks())
                return self.generator.call(inputs, 1.0, weights)
            return call(self.pretrained, inputs)

    def _on_weights(self, weights: Mapping[str, Tensor], width: float) -> Tensor | float:
        """The losses on the generated weights themselves."""
        total: Tensor | float = 0.0
        if self.weight_norm:
            total = total + self.weight_norm * torch.stack([w.float().norm() for w in weights.values()]).sum()
        if self.reconstruction and width == 1.0:
            originals = self.generator.originals()
            distance = [(w.float() - originals[name].float()).square().sum() for name, w in weights.items()]
            size = [originals[name].float().square().sum() for name in weights]
            total = total + self.reconstruction * torch.stack(distance).sum() / torch.stack(size).sum()
        return total

    def _blocks(self) -> int | None:
        return self.block + 1 if self.mode == "blockwise" else None

    def width_of(self, width: float) -> Width:
        """What runs at a width: in mode `blockwise`, until the last block, the width dimensions of the blocks so far, and
        all others in full."""
        if self.mode != "blockwise" or self.block + 1 == len(self.generator.blocks):
            return width
        targets = [t for part in self.generator.networks[: self.block + 1] for t in part.targets]
        groups = [dim.groups for t in targets for dim in t.dims if dim is not None]
        return dict.fromkeys(sorted(set().union(*groups)), width)

    def _enter_block(self) -> None:
        """The block that this step trains: it starts as a copy of the one before, and the ones before are kept."""
        assert self.steps_per_block is not None
        names = self.generator.blocks
        now = min(self.step // self.steps_per_block, len(names) - 1)
        if now == self.block:
            return
        if now > 0:
            copies = [self.generator] if self.ema is None else [self.generator, self.ema.module]
            for generator in copies:
                self._start_as_copy(generator, names[now - 1], names[now], now)
        self.block = now
        self._train_only(now)
        self._reconstruct(now)

    @staticmethod
    @torch.no_grad()
    def _start_as_copy(generator: Any, previous: str, block: str, index: int) -> None:
        """Of a residual only the hidden layers: another block's change of its weights would be noise on this one's."""
        part = generator.networks[index]
        scale = part.scale.clone()
        generator.init_from(previous, block)
        if generator.base is not None:
            part.scale.copy_(scale)
            part.w_out.zero_()
            part.b_out.zero_()

    def _reconstruct(self, block: int | None) -> None:
        if not self.reconstruction_steps:
            return
        from slimkernels.hyper import reconstruct

        reconstruct(self.generator, self.reconstruction_steps, self.reconstruction_lr, block=block)
        if self.ema is not None:
            averages: Any = self.ema.module
            parts = range(len(averages.networks)) if block is None else [block]
            for i in parts:
                averages.networks[i].load_state_dict(self.generator.networks[i].state_dict())

    def _train_only(self, block: int) -> None:
        for i, networks in enumerate(self.generator.networks):
            networks.requires_grad_(i <= block if self.train_previous else i == block)

    def named_losses(self, losses: dict[Any, Tensor]) -> dict[str, Tensor]:
        return by_width(losses, self.sampler.range)

    def validate(self, model: nn.Module) -> list[Row]:
        assert self.val_loader is not None
        generator: Any = model
        rows = []
        for w in self.eval_widths:
            plain = generator.materialize(self.width_of(w), self.eval_samples, blocks=self._blocks())
            batches = itertools.islice(self.calibration_loader, self.calibration_batches)
            with autocast(plain, self.amp):
                recompute_statistics(plain, batches)
            found = evaluate(plain, self.val_loader, [None], self.metrics, amp=self.amp)[None]
            rows.append({"width": w, "seen": self.seen(w), **found})
        return rows

    def seen(self, width: float) -> bool:
        """Whether the sampler draws this width."""
        if self.sampler.range is not None:
            low, high = self.sampler.range
            return low <= width <= high
        return any(abs(width - w) < 1e-6 for w in self.sampler.widths)

    def extra_state(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state_dict(), "mode": self.mode, "block": self.block}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        if state["mode"] != self.mode:
            raise ValueError(f"HypernetTrainer: expected a state of mode {self.mode!r}, got {state['mode']!r}")
        self.sampler.load_state_dict(state["sampler"])
        self.block = state["block"]
        if self.mode == "blockwise" and self.block >= 0:
            self._train_only(self.block)

    def loaders(self) -> list[Any]:
        return [*super().loaders(), self.calibration_loader]

    def _default_eval_widths(self) -> list[float]:
        if self.sampler.range is not None or len(self.sampler.widths) == 1:
            choices = elastic_widths(self.generator.target)
            return spaced((choices[0], 1.0), 5) if isinstance(choices, tuple) else sorted(choices, reverse=True)
        listed = self.sampler.widths
        listed_only = isinstance(elastic_widths(self.generator.target), list)
        middles = [] if listed_only else itertools.pairwise(listed)
        return sorted({*listed, *((a + b) / 2 for a, b in middles)}, reverse=True)

    def _check_widths(self) -> None:
        """Raises what generating raises for a width that the target lacks: now and not after an epoch."""
        from slimkernels import elastic

        plan = elastic.plan(self.generator.target)
        for w in [*self.sampler.widths, *(self.eval_widths if self.val_loader is not None else [])]:
            plan.units("HypernetTrainer", w)
        if self.val_loader is not None and _statistics(self.generator.target):
            shared = self.calibration_loader is self.data.loader
            if iter_is_self(self.calibration_loader) or (
                shared and getattr(self.data.loader, "persistent_workers", False)
            ):
                raise ValueError(
                    "HypernetTrainer: expected a calibration_loader that can be iterated at any time for the target's"
                    f" batch norms, got a {type(self.calibration_loader).__name__}"
                )


def _check_mode(mode: str, generator: Any, steps_per_block: int | None) -> None:
    if mode not in MODES:
        raise ValueError(f"HypernetTrainer: expected mode to be one of {', '.join(MODES)}, got {mode!r}")
    wanted = {"neumeta": None, "residual": "residual"}.get(mode, generator.base)
    if generator.base != wanted:
        raise ValueError(
            f"HypernetTrainer: expected a generator with base={wanted!r} for mode {mode!r}, got base={generator.base!r}"
        )
    if mode == "blockwise":
        if not generator.blocks:
            raise ValueError("HypernetTrainer: expected a generator with blocks for mode 'blockwise', got one without")
        if isinstance(steps_per_block, bool) or not isinstance(steps_per_block, int) or steps_per_block < 1:
            raise ValueError(f"HypernetTrainer: expected steps_per_block for mode 'blockwise', got {steps_per_block!r}")
    elif steps_per_block is not None:
        raise ValueError(f"HypernetTrainer: expected no steps_per_block with mode {mode!r}, got {steps_per_block}")


def _statistics(model: nn.Module) -> list[Any]:
    """The batch norms that keep statistics."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in norms if norm.track_running_stats]


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Batch-norm statistics of a plain network as the mean over ``batches`` of (inputs, targets); does nothing without
    batch norms."""
    norms = _statistics(model)
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in batches:
        call(model, move(split_batch(batch)[0], device_of(model)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
