"""``convert``: from a trained network to an elastic one with the same class, forward and weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from slimkernels._copy import deep_copy
from slimkernels.elastic.attention import ATTENTION, out_proj_of, out_projections
from slimkernels.elastic.cost import layer_costs, parameter_costs
from slimkernels.elastic.coupling import IS_OUTPUT, SINGLE
from slimkernels.elastic.depth import make_skippable
from slimkernels.elastic.graph import Analysis, width_groups
from slimkernels.elastic.heads import best, tie_features
from slimkernels.elastic.importance import check_sort, orders
from slimkernels.elastic.layers import CONVS, RECURRENT, kind_of, reason_not_slimmable
from slimkernels.elastic.plan import Plan, Stage, matches
from slimkernels.elastic.probe import Prober
from slimkernels.elastic.recurrent import HIDDEN
from slimkernels.elastic.slices import number_side, permute
from slimkernels.elastic.stages import find_stages, usable_stages
from slimkernels.elastic.trace import analysis_copy, check_example, float_inputs, run, trace
from slimkernels.elastic.transform import set_norm_mode, transform
from slimkernels.elastic.width import set_width

NORMS = ("auto", "switchable", "universal", "shared")


def convert(
    model: nn.Module,
    example_inputs: Any,
    *,
    widths: tuple[float, float] | Sequence[float] = (0.25, 1.0),
    depth: bool = False,
    divisor: int = 8,
    sort: str | Mapping[str, Any] | None = "l1",
    norm: str = "auto",
    ignore: Sequence[str] = (),
    inplace: bool = False,
    batches: Iterable | None = None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
) -> nn.Module:
    """Make a network run at any width, with the weights that it has.

    Coupled channels (residual adds, depthwise chains, concats, a flatten before a Linear) become one width dimension
    each; the network's inputs and outputs stay full. Whole heads of attention are a dimension of their own. A whole number
    that a module keeps of its size (``self.hidden_dim``) follows the width where the forward needs it to. At full width the
    result computes what ``model`` computes. Every dimension is tried out on the example; what cannot be sliced is left as
    it is, and ``report`` says why.

    Args:
        model: any nn.Module. It stays as it is unless ``inplace``.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments; also what ``cost``
            counts MACs for.
        widths: a tuple (low, high): every width between the two; or a list of widths. Full width is always possible.
        depth: also make every stage's depth a dimension. A stage is a run of residual blocks of one class in a Sequential
            or ModuleList, each fed by the one before, with equal input and output shapes; the block before them, which may
            change the shape, belongs to it. The first block always runs; which later ones do is set by ``set_width``.
        divisor: channels are rounded to multiples of it: never under one, never more than 10 % below what was asked
            for.
        sort: what puts the most important channels first: "l1", "l2" (weights), "bn" (scales of the batch norms),
            "taylor" (needs ``batches`` of (inputs, targets) and ``loss_fn(output, targets)``), "random", None (as they
            are), or scores by dimension.
        norm: batch norm "switchable" (statistics and affine parameters per listed width), "universal" (statistics per
            calibrated width), "shared"; "auto" is switchable for a list and universal for a range.
        ignore: names or globs of modules to leave alone.
        inplace: convert ``model`` itself; its layers stay the same objects, with the class changed.

    Raises: ValueError when an argument does not fit, the model does not run on the example or cannot be traced, or
        nothing in it can be slimmed; TypeError when ``model`` is no module or the example has no tensor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: expected model to be an nn.Module, got {type(model).__name__}")
    if "_elastic" in model.__dict__:
        raise ValueError("convert: expected a plain model, got one that is elastic already")
    widths = _check_widths(widths)
    if isinstance(divisor, bool) or not isinstance(divisor, int) or divisor < 1:
        raise ValueError(f"convert: expected divisor to be a positive integer, got {divisor!r}")
    if norm not in NORMS:
        raise ValueError(f"convert: expected norm to be one of {', '.join(NORMS)}, got {norm!r}")
    if norm == "auto":
        norm = "switchable" if isinstance(widths, list) else "universal"
    if norm == "switchable" and not isinstance(widths, list):
        raise ValueError(f"convert: expected a list of widths with norm='switchable', got the range {widths}")
    check_sort(sort, batches, loss_fn)
    check_example(model, example_inputs)
    ignored = _ignored(model, ignore)

    probe_model, example = _finite_copy(model, float_inputs(example_inputs))
    layers = layer_costs(probe_model, example)
    analysis = _analyse(probe_model, example, ignored, permutes=sort is not None)
    if not analysis.groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(analysis.rejected.items())[:3])
        raise ValueError(
            f"convert: expected a model with channels to slim, got {type(model).__name__} with none"
            f" ({reasons or 'no such layers'})"
        )
    stages: list[Stage] = []
    depth_notes: list[str] = []
    if depth:
        found = find_stages(probe_model, example, ignored)
        stages, depth_notes = usable_stages(probe_model, example, analysis, found)
        if not stages:
            raise ValueError(
                f"convert: expected a model with stages of residual blocks for depth=True, got {type(model).__name__}"
                f" with none ({'; '.join(depth_notes) or 'no such blocks'})"
            )
    del probe_model

    model = model if inplace else deep_copy(model)
    left_alone = _left_alone(model, analysis, ignored)
    order, notes = orders(model, analysis.dims, analysis.groups, sort, batches, loss_fn)
    permute(model, analysis.dims, order)
    masked = [name for name in analysis.states if isinstance(model.get_submodule(name), ATTENTION)]
    states = [name for name in analysis.states if name not in masked]
    if states:
        notes.append(f"initial states written at the full size are cut to their first units: {', '.join(states)}")
    numbers = [f"{key[0]}.{number}".strip(".") for key in analysis.dims if (number := number_side(key[1])) is not None]
    if numbers:
        notes.append(f"numbers that the network keeps of its sizes follow the width: {', '.join(numbers)}")
    if masked:
        notes.append(f"masks written for all heads are cut to those of the first heads: {', '.join(masked)}")
    plan = Plan(
        widths=widths,
        divisor=divisor,
        norm=norm,
        sort=sort if isinstance(sort, str) else "none" if sort is None else "scores",
        groups=analysis.groups,
        dims=analysis.dims,
        left_alone=left_alone,
        gathers=list(dict.fromkeys(key[0] for key, dim in analysis.dims.items() if _gathered(model, key, dim))),
        ignored=sorted(ignored),
        layers=layers,
        parameters=parameter_costs(model, analysis.dims),
        notes=[*notes, *depth_notes],
        stages={stage.name: stage for stage in stages},
        states=analysis.states,
        projections={
            name: module.proj_size
            for name, module in model.named_modules()
            if isinstance(module, nn.LSTM) and (name, "cell") in analysis.dims
        },
    )
    attach(model, plan)
    return model


def attach(model: nn.Module, plan: Plan) -> None:
    """Make a model with plain layers elastic by a plan that fits it."""
    transform(model, plan.dims, plan.ignored)
    ratios = sorted({*plan.widths, 1.0}) if plan.listed else []
    if plan.norm != "shared":
        at = {ratio: plan.units_at(dict.fromkeys(plan.groups, ratio)) for ratio in ratios}
        set_norm_mode(model, plan.dims, plan.norm, at)
    make_skippable(model, plan.stages.values())
    model.__dict__["_elastic"] = plan
    set_width(model, 1.0)


def _check_widths(widths: Any) -> tuple[float, float] | list[float]:
    is_range = isinstance(widths, tuple)
    if not isinstance(widths, (tuple, list)) or not widths or (is_range and len(widths) != 2):
        raise ValueError(f"convert: expected widths to be a tuple (low, high) or a list of widths, got {widths!r}")
    for w in widths:
        if isinstance(w, bool) or not isinstance(w, (int, float)) or not 0 < w <= 1:
            raise ValueError(f"convert: expected widths in (0, 1], got {w!r}")
    if is_range:
        low, high = float(widths[0]), float(widths[1])
        if low > high:
            raise ValueError(f"convert: expected a range (low, high) with low <= high, got {widths}")
        return low, high
    return sorted({float(w) for w in widths})


def _ignored(model: nn.Module, ignore: Sequence[str]) -> set[str]:
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    names = [name for name, _ in model.named_modules()]
    found: set[str] = set()
    for pattern in patterns:
        fitting = {name for name in names if matches(name, pattern)}
        if not fitting:
            raise ValueError(
                f"convert: expected ignore to hold names or globs of modules, got {pattern!r}, which fits none"
            )
        found |= fitting
    return found


def _finite_copy(model: nn.Module, example: Any) -> tuple[nn.Module, Any]:
    """The copy to analyse; without noise on its constants where the noise breaks it."""
    copied = analysis_copy(model)
    try:
        with torch.no_grad():
            outputs = run(copied, example)
    except Exception:
        return copied, example  # the trace reports it
    if all(bool(o.isfinite().all()) for o in outputs):
        return copied, example
    copied = analysis_copy(model, noise=0.0)
    with torch.no_grad():
        if not all(bool(o.isfinite().all()) for o in run(copied, example)):
            raise ValueError("convert: expected the model's output on example_inputs to be finite, got infinity or NaN")
    return copied, example


def _analyse(model: nn.Module, example: Any, ignored: set[str], permutes: bool) -> Analysis:
    ends = out_projections(model)

    def unsliced(name: str, module: nn.Module) -> str | None:
        if name in ignored:
            return "ignored, as asked"
        if name in ends:
            return unsliced(ends[name], model.get_submodule(ends[name]))
        if out_proj_of(name) in ends and out_proj_of(name) in ignored:
            return "its out_proj is ignored, as asked"
        return reason_not_slimmable(module) if kind_of(module) else None

    def attempt(way: str) -> tuple[bool, float, Analysis]:
        coupling, spots = trace(model, example, unsliced, "whole" if way == "whole" else "all")
        if way == "tied":
            tie_features(coupling, model)
        analysis = width_groups(coupling, model)
        analysis.spots = spots
        analysis.reached = {name for name, _ in coupling.known}
        if analysis.groups:
            prober = Prober(model, example, analysis, permutes)
            prober.find_numbers()
            prober.reject_wrong()
            analysis.states = prober.states_of_full_size()
        return coupling.heads, _smallest(model, analysis), analysis

    return best(attempt)


def _smallest(model: nn.Module, analysis: Analysis) -> float:
    """Parameters at half of every width."""
    units = {name: -(-group.units // 2) for name, group in analysis.groups.items()}
    total = 0.0
    for parameter in parameter_costs(model, analysis.dims):
        share = 1.0
        for key in parameter.dims:
            share *= analysis.dims[key].active(units) / analysis.dims[key].size
        total += parameter.numel * share
    return total


def _left_alone(model: nn.Module, analysis: Analysis, ignored: set[str]) -> dict[str, str]:
    """Every layer with parameters of its own that no width changes, and those whose outputs could not be slimmed; and why."""
    live = {name for name, side in analysis.dims if number_side(side) is None}
    found = {}
    for name, module in model.named_modules():
        if name in live or not any(p is not None for p in module._parameters.values()):
            continue
        if name in ignored:
            reason: str | None = "ignored, as asked"
        else:
            reason = reason_not_slimmable(module) or analysis.reasons.get(name)
        if reason is None:
            reached = name in analysis.reached
            reason = (
                "no channels of its own between the network's input and output"
                if reached
                else "the trace does not reach it"
            )
        found[name] = reason
    for name, reason in analysis.rejected.items():
        layer = name.removesuffix(HIDDEN)
        if layer in live and layer != name:
            found[name] = f"its hidden units stay full: {reason}"
        elif name in live and reason not in (IS_OUTPUT, SINGLE):
            part = "heads" if isinstance(model.get_submodule(name), ATTENTION) else "outputs"
            found[name] = f"its {part} stay full: {reason}"
    return found


def _gathered(model: nn.Module, key: tuple[str, str], dim: Any) -> bool:
    module: Any = model.get_submodule(key[0])
    if key[1] not in ("in", "ch", "out") or (key[1] == "out" and isinstance(module, CONVS) and module.groups > 1):
        return False
    return dim.blocks == 0 or (dim.blocks > 1 and not isinstance(module, (nn.Linear, *RECURRENT)))
