"""Order of the channels of every width dimension, the most important first."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels._copy import deep_copy
from slimkernels.elastic.layers import TAKES_IN
from slimkernels.elastic.plan import Dim, WidthGroup
from slimkernels.elastic.slices import Sliced, sliced_tensors
from slimkernels.elastic.trace import as_call

CRITERIA = ("l1", "l2", "bn", "taylor", "random")

Dims = Mapping[tuple[str, str], Dim]
Groups = Mapping[str, WidthGroup]


def check_sort(sort: Any, batches: Any, loss_fn: Any) -> None:
    """Raises: ValueError for an unknown criterion, or for taylor without data."""
    if sort is None or isinstance(sort, Mapping):
        return
    if sort not in CRITERIA:
        names = ", ".join(CRITERIA)
        raise ValueError(
            f"convert: expected sort to be one of {names}, None or a dict of scores by width dimension, got {sort!r}"
        )
    if sort == "taylor" and (batches is None or loss_fn is None):
        raise ValueError(
            "convert: expected batches= and loss_fn= with sort='taylor', which needs gradients on data, got none"
        )


def orders(
    model: nn.Module, dims: Dims, groups: Groups, sort: Any, batches: Iterable | None, loss_fn: Callable | None
) -> tuple[dict[str, list[int]], list[str]]:
    """New order of the units of every group, and notes for the report."""
    notes: list[str] = []
    if sort is None:
        return {}, notes
    if isinstance(sort, Mapping):
        scores = _own_scores(sort, groups)
    elif sort == "random":
        generator = torch.Generator().manual_seed(0)
        scores = {name: torch.rand(group.units, generator=generator) for name, group in groups.items()}
    elif sort == "taylor":
        assert batches is not None
        assert loss_fn is not None
        scores = _taylor(model, dims, groups, batches, loss_fn)
    else:
        scores = _magnitude(sliced_tensors(model, dims), groups, sort)
        if sort == "bn":
            gamma = _gamma(model, dims, groups)
            without = [name for name in groups if name not in gamma]
            if without:
                notes.append(f"sorted by l1, as they have no batch norm: {', '.join(without)}")
            scores |= gamma
    return {name: score.argsort(descending=True, stable=True).tolist() for name, score in scores.items()}, notes


def _own_scores(sort: Mapping[str, Any], groups: Groups) -> dict[str, Tensor]:
    scores = {}
    for name, values in sort.items():
        if name not in groups:
            raise ValueError(
                f"convert: expected scores for width dimensions, got {name!r}; there are {', '.join(groups)}"
            )
        group, score = groups[name], torch.as_tensor(values, dtype=torch.float64).detach().cpu().flatten()
        if score.numel() == group.size:
            score = score.view(group.units, group.unit).sum(1)
        if score.numel() != group.units:
            raise ValueError(f"convert: expected {group.size} scores for {name!r}, got {score.numel()}")
        scores[name] = score
    return scores


def _per_unit(values: Tensor, axis: int, dim: Dim, groups: Groups) -> dict[str, Tensor]:
    """Sum of the non-negative ``values`` over all that belongs to each unit, per group in the dimension."""
    by_position = values.movedim(axis, 0).reshape(dim.size, -1).sum(1).double().cpu()
    found: dict[str, Tensor] = {}
    start = 0
    for run in dim.runs:
        if run.group is not None:
            part = by_position[start : start + run.size].view(groups[run.group].units, run.per_unit).sum(1)
            found[run.group] = found.get(run.group, 0) + part
        start += run.size
    return found


@torch.no_grad()
def _magnitude(tensors: Sequence[Sliced], groups: Groups, sort: str) -> dict[str, Tensor]:
    """Norm of the weights that make a channel and of those that use it; every layer counts the same, whatever its
    scale."""
    squares = sort == "l2"
    scores = {name: torch.zeros(group.units, dtype=torch.float64) for name, group in groups.items()}
    for sliced in tensors:
        for axis, dim in sliced.axes.items():
            if "weight" not in sliced.name or dim.side not in ("out", "gates", "heads", "rows", *TAKES_IN):
                continue
            values = sliced.tensor.double().square() if squares else sliced.tensor.double().abs()
            for name, score in _per_unit(values, axis, dim, groups).items():
                score = score.sqrt() if squares else score
                mean = score.mean()
                scores[name] += score / mean if mean > 0 else 0
    return scores


@torch.no_grad()
def _gamma(model: nn.Module, dims: Dims, groups: Groups) -> dict[str, Tensor]:
    """Scale of the batch norms, of the groups that have any with one."""
    modules = dict(model.named_modules())
    scores: dict[str, Tensor] = {}
    for sliced in sliced_tensors(model, dims):
        if sliced.name == "weight" and isinstance(modules[sliced.owner], nn.modules.batchnorm._BatchNorm):
            for name, score in _per_unit(sliced.tensor.double().abs(), 0, sliced.axes[0], groups).items():
                scores[name] = scores.get(name, 0) + score
    return scores


def _taylor(
    model: nn.Module, dims: Dims, groups: Groups, batches: Iterable, loss_fn: Callable[[Any, Any], Tensor]
) -> dict[str, Tensor]:
    """First-order estimate of what the loss changes when a channel's weights become zero: |weight x gradient|,
    summed."""
    model = deep_copy(model).eval()
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
        p.grad = None
    count = 0
    with torch.enable_grad():
        for inputs, targets in batches:
            args, kwargs = as_call(inputs)
            loss_fn(model(*args, **kwargs), targets).backward()
            count += 1
    if count == 0:
        raise ValueError("convert: expected at least one batch (inputs, targets) with sort='taylor', got none")
    scores = {name: torch.zeros(group.units, dtype=torch.float64) for name, group in groups.items()}
    for sliced in sliced_tensors(model, dims):
        if sliced.buffer or sliced.tensor.grad is None:
            continue
        with torch.no_grad():
            product = sliced.tensor.double() * sliced.tensor.grad.double()
            for axis, dim in sliced.axes.items():
                per_position = product.movedim(axis, 0).reshape(dim.size, -1).sum(1).abs()
                for name, score in _per_unit(per_position, 0, dim, groups).items():
                    scores[name] += score
    return scores
