"""One training step of a slimmable network, for any training loop."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from slimkernels.ops._recipes import recomputed_outputs
from slimkernels.ops._slots import flush, gradient_slots
from slimkernels.train._common import (
    autocast,
    call,
    is_compiled,
    map_tensors,
    split_batch,
    unwrap,
    without_reduction,
)
from slimkernels.train.distill import Distillation, distillation
from slimkernels.train.fuse import fused_forward
from slimkernels.train.unreached import all_reached
from slimkernels.train.widths import WidthSampler, check_widths

LossFn = Callable[[Any, Any], Tensor]  # (output, targets) -> scalar


def sandwich_step(
    model: nn.Module,
    batch: tuple[Any, Any],
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer | None,
    *,
    widths: int | Sequence[float] | None = None,
    depths: Sequence[float] | None = None,
    distill: str | Distillation | None = "kl",
    rule: str | WidthSampler = "sandwich",
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    distill_weight: float = 1.0,
    amp: str | None = None,
    scaler: torch.amp.GradScaler | None = None,
    clip_grad: float | None = None,
    recompute: bool = False,
) -> dict[Any, Tensor]:
    """Trains several widths of an elastic model on one batch: their gradients are summed, then the optimizer steps
    once.

    Every width's backward runs right after its forward, so the activations of one width at most are alive. With the
    rules `sandwich` and `all` the widest network runs first and learns from the targets; its detached output teaches
    the others (in-place distillation). With `random` and `alternate`, or ``distill=None``, every width learns from the
    targets. The model's width is the same after the step as before, also when the step raises.

    Under DistributedDataParallel the gradients are reduced once, in the last pass, those of parameters included that
    only other passes use (the affine parameters of other widths in a switchable batch norm, skipped blocks). Parameters
    that no pass uses need ``find_unused_parameters=True``, as in any DistributedDataParallel model. Under FSDP2
    (``fully_shard``) every pass reduces its own gradients, which are of full size.

    Args:
        model: what ``elastic.convert`` gave, as it is, compiled, in DistributedDataParallel or sharded by
            ``fully_shard``.
        batch: (inputs, targets); inputs are a tensor, a tuple of arguments or a dict of keyword arguments.
        loss_fn: (output, targets) -> scalar.
        optimizer: None leaves zeroing the gradients, clipping and stepping to the caller: the gradients are added to
            those there.
        widths: how many widths the rule draws from the model's own (None: 4, or 1 for `random`), or a list: exactly
            these (for `random`: one of these; for `alternate`: one after another).
        depths: ratios of the depth that the rule draws from, for a model that was converted with ``depth=True``; None:
            every number of blocks. The rule then draws pairs (width, depth).
        distill: `kl`, `ce`, `alpha`, a function (student output, teacher output) -> scalar, or None.
        rule: `sandwich`, `all`, `random` or `alternate`, or a ``WidthSampler`` of your own, which then decides the
            widths and depths (`progressive` needs its schedule).
        generator: the CPU generator that random widths are drawn from. None: one that is seeded with 0 and kept for
            this model, so that every rank draws the same.
        temperature: of the named distillation losses.
        distill_weight: a student's loss is ``weight * distillation + (1 - weight) * loss_fn``.
        amp: `bf16` or `fp16` autocast of the forward passes; None leaves the caller's setting.
        scaler: a gradient scaler for fp16; the losses are scaled by it and the optimizer steps through it.
        clip_grad: largest norm of all gradients together, clipped before the optimizer steps.
        recompute: outputs of batch norms are computed again in backward where that frees memory, instead of being kept
            beside the norm's input: the same numbers, less memory, one more pass over them.

    Returns: each width's loss, detached, in the order in which they ran; by (width, depth) where the model's depth is
        elastic.
    Raises: ValueError when the batch is no pair, a width is not in (0, 1] or an argument's name is unknown; TypeError
        when
        distillation is asked by name and the outputs are not tensors.
    Source: Yu and Huang, Universally Slimmable Networks (arXiv 1903.05134), section 3.
    """
    sampler = _sampler(model, widths, depths, rule, generator)
    if optimizer is None and clip_grad is not None:
        raise ValueError("sandwich_step: expected optimizer when clip_grad is given, got None")
    if optimizer is not None:
        optimizer.zero_grad(set_to_none=True)
    losses = accumulate_passes(
        model,
        batch,
        loss_fn,
        sampler.sample(),
        distill=distillation(distill, temperature) if sampler.teaches else None,
        distill_weight=distill_weight,
        amp=amp,
        scaler=scaler,
        recompute=recompute,
    )
    if optimizer is not None:
        optimizer_step(model, optimizer, scaler=scaler, clip_grad=clip_grad)
    return losses


def accumulate_passes(
    model: nn.Module,
    batch: tuple[Any, Any],
    loss_fn: LossFn,
    widths: Sequence[Any],
    *,
    distill: Distillation | None = None,
    distill_weight: float = 1.0,
    amp: str | None = None,
    scaler: torch.amp.GradScaler | None = None,
    scale: float = 1.0,
    reduce: bool = True,
    recompute: bool = False,
) -> dict[Any, Tensor]:
    """Forward and backward of every width, or pair (width, depth), in turn; the gradients add up in ``.grad``, reduced
    over ranks in the last pass.

    With ``distill`` the first width is the teacher. ``scale`` multiplies the gradients; ``reduce=False`` leaves them to this
    rank, for all but the last of several batches whose gradients add up.

    Convolutions, batch norms and linear layers add their gradients straight to the active slice of one buffer a
    parameter; the last pass hands the sums to autograd, so that hooks on a parameter run once. Nothing is left of them
    when a pass raises.
    Batch norms run together with the additions and activations after them (``train.fuse``). A compiled model does
    neither: every pass adds a gradient of full size to ``.grad``.

    Returns: each width's loss, detached.
    """
    from slimkernels import elastic

    inner, compiled = unwrap(model), is_compiled(model)
    inputs, targets = split_batch(batch)
    losses: dict[Any, Tensor] = {}
    teacher: Any = None
    recomputed = recomputed_outputs() if recompute and not compiled else nullcontext()
    with gradient_slots([] if compiled else inner.parameters()) as slots, recomputed:
        for i, w in enumerate(widths):
            last = i == len(widths) - 1
            for slot in slots if last else ():
                slot.last = True
            reduction = nullcontext() if last and reduce else without_reduction(model)
            if last and reduce and slots and isinstance(model, DistributedDataParallel):
                reduction = all_reached(inner, slots)
            with elastic.width(inner, *as_pair(w)), nullcontext() if compiled else fused_forward(inner), reduction:
                with autocast(inner, amp):
                    output = call(model, inputs)
                    if distill is None or i == 0:
                        loss = loss_fn(output, targets)
                    else:
                        loss = distill(output, teacher)
                        if distill_weight != 1:
                            loss = distill_weight * loss + (1 - distill_weight) * loss_fn(output, targets)
                if distill is not None and i == 0 and not last:
                    teacher = map_tensors(output, Tensor.detach)
                del output
                losses[w] = loss.detach()
                if scale != 1:
                    loss = loss * scale
                loss = loss if scaler is None else scaler.scale(loss)
                loss.backward()
            del loss  # with it the graph: nothing of this pass is alive when the next one begins
        flush(slots)
    return losses


def as_pair(subnet: Any) -> tuple:
    """The arguments of ``elastic.width`` for a width or a pair (width, depth)."""
    return subnet if isinstance(subnet, tuple) else (subnet,)


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    scaler: torch.amp.GradScaler | None = None,
    clip_grad: float | None = None,
) -> bool:
    """Unscales, clips and steps.

    Returns: False when the scaler skipped the step because a gradient was not finite.
    """
    if clip_grad is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    if scaler is None:
        optimizer.step()
        return True
    before = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale() >= before


class _Draws:
    """What a model's steps remember when the caller keeps no sampler: the generator and the number of steps."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.steps = 0


_draws: weakref.WeakKeyDictionary[nn.Module, _Draws] = weakref.WeakKeyDictionary()


def _sampler(
    model: nn.Module,
    widths: int | Sequence[float] | None,
    depths: Sequence[float] | None,
    rule: str | WidthSampler,
    generator: torch.Generator | None,
) -> WidthSampler:
    if isinstance(rule, WidthSampler):
        if widths is not None or depths is not None or generator is not None:
            raise ValueError("sandwich_step: expected no widths, depths or generator beside a WidthSampler, got one")
        return rule
    inner = unwrap(model)
    draws = _draws.setdefault(inner, _Draws())
    depths = elastic_depths(inner) if depths is None else depths
    generator = draws.generator if generator is None else generator
    sampler = make_sampler(inner, widths, rule, depths=depths, generator=generator)
    sampler.steps = draws.steps
    draws.steps += 1
    return sampler


def make_sampler(
    model: nn.Module,
    widths: int | Sequence[float] | None = None,
    rule: str = "sandwich",
    *,
    depths: Sequence[float] | None = None,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> WidthSampler:
    """The sampler for an elastic model: ``widths`` is how many to draw from its own, or a list of those to run."""
    if widths is None or isinstance(widths, int):
        return WidthSampler(elastic_widths(model), rule, widths, depths=depths, seed=seed, generator=generator)
    listed = check_widths("sandwich_step", list(widths))
    count = len(listed) if rule == "sandwich" else None
    return WidthSampler(listed, rule, count, depths=depths, seed=seed, generator=generator)


def elastic_depths(model: nn.Module) -> list[float] | None:
    """Every depth of an elastic model's longest stage, as ratios; None when its depth is not elastic."""
    from slimkernels import elastic

    stages = elastic.plan(unwrap(model)).stages
    most = max((len(stage.blocks) for stage in stages.values()), default=0)
    return [k / most for k in range(1, most + 1)] if stages else None


def elastic_widths(model: nn.Module) -> tuple[float, float] | list[float]:
    """The widths an elastic model was converted for, as ``WidthSampler`` takes them: a range or a list.

    Raises: ValueError when the model was not made by ``elastic.convert``.
    """
    from slimkernels import elastic

    plan = elastic.plan(unwrap(model))
    return list(plan.widths) if plan.listed else (plan.widths[0], plan.widths[-1])
