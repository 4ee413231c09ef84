"""``smooth_permutation``: an order of the channels in which weights change little from one channel to the next."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.elastic.importance import orders as importance_orders
from slimkernels.elastic.plan import Plan, plan, unwrap
from slimkernels.elastic.slices import Sliced, permute, sliced_tensors
from slimkernels.elastic.transform import batch_norms

METHODS = ("path", "importance")
_ALL_STARTS = 128  # up to so many units every one is tried as the start of the path
_PASSES = 50  # of 2-opt at most


@dataclass(frozen=True)
class Permutation:
    """What ``smooth_permutation`` did: new position -> old unit of every width dimension, and the total variation."""

    method: str
    orders: dict[str, list[int]]
    before: float  # sum over the sliced weights of |difference between neighbouring channels|
    after: float

    def state(self) -> dict[str, Any]:
        return {"method": self.method, "orders": self.orders, "before": self.before, "after": self.after}


def smooth_permutation(
    model: nn.Module, method: str = "path", *, orders: Mapping[str, Sequence[int]] | None = None
) -> Permutation:
    """Put the channels of an elastic model into a smooth order, the same for every width, in place.

    The network computes the same function at full width. The order is a function of the weights alone, and is kept
    with the model (and so in the checkpoint of a generator that has it as target).

    Args:
        method: "path": along a short Hamiltonian path through the channels, nearest neighbours improved by 2-opt,
            which begins at the end with the larger weights; "importance": largest weights first, as ``convert`` does.
        orders: an order that was found before, instead of looking for one.

    Raises: ValueError when the model is not elastic, has batch-norm statistics per width, or an argument does not fit.
    """
    known = plan(model)
    inner = unwrap(model)
    if method not in METHODS:
        raise ValueError(f"smooth_permutation: expected method to be one of {', '.join(METHODS)}, got {method!r}")
    for name, norm in batch_norms(inner).items():
        if any(ratio != 1.0 for ratio in norm.calibrated_ratios):
            raise ValueError(
                f"smooth_permutation: expected batch norms without statistics per width, got {name!r} with some; permute"
                " before calibrating, with norm='universal' or 'shared', or fold the batch norms"
            )
    tensors = sliced_tensors(inner, known.dims)
    before = total_variation(tensors)
    if orders is not None:
        found = _checked(orders, known)
    elif method == "importance":
        found = importance_orders(inner, known.dims, known.groups, "l1", None, None)[0]
    else:
        found = {name: _path(_features(tensors, known, name)) for name in known.groups}
    permute(inner, known.dims, found)
    result = Permutation(method, found, before, total_variation(tensors))
    inner.__dict__["_permutation"] = result.state()
    return result


def permutation_of(model: nn.Module) -> dict[str, Any] | None:
    """What the last ``smooth_permutation`` of an elastic model did, as plain data."""
    return model.__dict__.get("_permutation")


def _checked(orders: Mapping[str, Sequence[int]], known: Plan) -> dict[str, list[int]]:
    found = {}
    for name, order in orders.items():
        if name not in known.groups:
            raise ValueError(
                f"smooth_permutation: expected orders of width dimensions, got {name!r}; there are {', '.join(known.groups)}"
            )
        units = known.groups[name].units
        if sorted(order) != list(range(units)):
            raise ValueError(
                f"smooth_permutation: expected a permutation of {units} units for {name!r}, got another list"
            )
        found[name] = [int(i) for i in order]
    return found


@torch.no_grad()
def total_variation(tensors: Sequence[Sliced]) -> float:
    """Sum of |difference| between neighbours along every sliced axis of the weight matrices."""
    total = 0.0
    for sliced in tensors:
        if sliced.buffer or sliced.tensor.dim() < 2:
            continue
        for axis, dim in sliced.axes.items():
            start = 0
            for run in dim.runs:
                if run.group is not None:
                    part = sliced.tensor.narrow(axis, start, run.size).unflatten(axis, (-1, run.per_unit))
                    total += part.double().diff(dim=axis).abs().sum().item()
                start += run.size
    return total


@torch.no_grad()
def _features(tensors: Sequence[Sliced], known: Plan, group: str) -> Tensor:
    """All weights of each unit, a row a unit."""
    units = known.groups[group].units
    rows = []
    for sliced in tensors:
        if sliced.buffer or sliced.tensor.dim() < 2:
            continue
        for axis, dim in sliced.axes.items():
            start = 0
            for run in dim.runs:
                if run.group == group:
                    part = sliced.tensor.narrow(axis, start, run.size).movedim(axis, 0)
                    rows.append(part.reshape(units, -1).double().cpu())
                start += run.size
    return torch.cat(rows, 1) if rows else torch.zeros(units, 1, dtype=torch.float64)


def _path(features: Tensor) -> list[int]:
    """A short path through all rows, by L1 distance, from its end with the larger weights."""
    n = len(features)
    if n < 3:
        return list(range(n))
    distance = torch.cdist(features, features, p=1)
    size = features.abs().sum(1)
    starts = range(n) if n <= _ALL_STARTS else [int(size.argmax())]
    best = min((_nearest(distance, s) for s in starts), key=lambda path: _length(distance, path))
    best = _two_opt(distance, best)
    half = size[torch.tensor(best)]
    if half[: n // 2].sum() < half[n - n // 2 :].sum():
        best.reverse()
    return best


def _nearest(distance: Tensor, start: int) -> list[int]:
    left = distance.clone()
    path = [start]
    for _ in range(len(distance) - 1):
        left[:, path[-1]] = torch.inf
        path.append(int(left[path[-1]].argmin()))
    return path


def _length(distance: Tensor, path: list[int]) -> float:
    at = torch.tensor(path)
    return float(distance[at[:-1], at[1:]].sum())


def _two_opt(distance: Tensor, path: list[int]) -> list[int]:
    """Reverses the stretch that shortens the path most, until none does."""
    n = len(path)
    at = torch.tensor(path)
    for _ in range(_PASSES * n):
        d = distance[at][:, at]
        edge = torch.cat([d.diagonal(1), d.new_zeros(1)])  # after the last position there is no edge
        before = torch.cat([d.new_zeros(1), edge[:-1]])
        # gain[i, j]: of reversing positions i to j
        left = torch.cat([d.new_zeros(1, n), d[:-1]])  # (i, j) -> d(i - 1, j)
        right = torch.cat([d[:, 1:], d.new_zeros(n, 1)], 1)  # (i, j) -> d(i, j + 1)
        gain = torch.triu(before[:, None] + edge[None, :] - left - right, 1)
        where = int(gain.argmax())
        i, j = divmod(where, n)
        if gain[i, j] <= 1e-9 * (1 + d.max()):
            break
        at = torch.cat([at[:i], at[i : j + 1].flip(0), at[j + 1 :]])
    return at.tolist()
