"""The tensors that a set of sliced dimensions cuts, and what is done to them as a whole: permuting, masking, taking the
slice."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkernels.elastic.attention import average_over, inference_path_off
from slimkernels.elastic.layers import TAKES_IN, kind_of, tensor_axes
from slimkernels.elastic.plan import Dim

Dims = Mapping[tuple[str, str], Dim]


@dataclass(frozen=True)
class Sliced:
    """One parameter or buffer and the sliced dimension that each of its axes has."""

    owner: str
    name: str
    tensor: Tensor
    axes: dict[int, Dim]
    buffer: bool

    @property
    def qualified(self) -> str:
        return f"{self.owner}.{self.name}" if self.owner else self.name


def parameter_side(side: str) -> tuple[int, str] | None:
    """(axis, name) of the side of a plain parameter, None for a layer's side."""
    if not side.startswith("param:"):
        return None
    _, axis, name = side.split(":", 2)
    return int(axis), name


def number_side(side: str) -> str | None:
    """Name of a whole number that a module keeps of its size, None for any other side."""
    return side.removeprefix("number:") if side.startswith("number:") else None


def sliced_tensors(model: nn.Module, dims: Dims) -> list[Sliced]:
    """Every tensor that the dimensions cut, once for each layer that has it (tied tensors come more than once)."""
    modules = dict(model.named_modules())
    found = []
    for owner in dict.fromkeys(name for name, _ in dims):
        module = modules[owner]
        kind = kind_of(module)
        axes: dict[str, dict[int, str]] = dict(tensor_axes(module, kind)) if kind else {}
        for name, side in dims:
            plain = parameter_side(side) if name == owner else None
            if plain is not None:
                axes[plain[1]] = {plain[0]: side}
        for name, by_axis in axes.items():
            cut = {axis: dims[owner, side] for axis, side in by_axis.items() if (owner, side) in dims}
            buffer = name in module._buffers
            tensor = module._buffers.get(name) if buffer else module._parameters.get(name)
            if tensor is not None and cut:
                found.append(Sliced(owner, name, tensor, cut, buffer))
    return found


def once(tensors: list[Sliced]) -> Iterator[Sliced]:
    """The first occurrence of every tensor."""
    seen: set[int] = set()
    for sliced in tensors:
        if id(sliced.tensor) not in seen:
            seen.add(id(sliced.tensor))
            yield sliced


def order_of(dim: Dim, orders: Mapping[str, list[int]]) -> list[int]:
    """Old position of every new position of a dimension, for the new order of each group's units."""
    found: list[int] = []
    start = 0
    for run in dim.runs:
        k = run.per_unit
        units = None if run.group is None else orders.get(run.group)
        if units is None:
            found.extend(range(start, start + run.size))
        else:
            found.extend(start + u * k + i for u in units for i in range(k))
        start += run.size
    return found


@torch.no_grad()
def permute(model: nn.Module, dims: Dims, orders: Mapping[str, list[int]]) -> None:
    """Put the units of every group into a new order, in all tensors that have them. The function stays the same."""
    for sliced in once(sliced_tensors(model, dims)):
        new = sliced.tensor
        for axis, dim in sliced.axes.items():
            if dim.groups & orders.keys():
                new = new.index_select(axis, torch.tensor(order_of(dim, orders), device=new.device))
        if new is not sliced.tensor:
            sliced.tensor.copy_(new)


def inverse(order: list[int]) -> list[int]:
    found = [0] * len(order)
    for new, old in enumerate(order):
        found[old] = new
    return found


@contextmanager
def masked(model: nn.Module, dims: Dims, units: Mapping[str, int]) -> Iterator[None]:
    """A plain model that computes at full width what its slices compute: whatever takes channels in gets zeros for
    inactive ones.

    A layer norm or a group norm of one group, which mix channels, are made to see the active ones only; the attention
    weights that an attention layer gives are those of the active heads.
    """
    saved: list[tuple[Tensor, Tensor]] = []
    replaced: list[nn.Module] = []
    modules = dict(model.named_modules())
    try:
        with torch.no_grad():
            for sliced in sliced_tensors(model, dims):
                for axis, dim in sliced.axes.items():
                    if dim.side in TAKES_IN or dim.side.startswith("param:"):
                        saved.append((sliced.tensor, sliced.tensor.clone()))
                        keep = torch.zeros(dim.size, dtype=torch.bool)
                        keep[dim.positions(units)] = True
                        shape = [1] * sliced.tensor.dim()
                        shape[axis] = dim.size
                        sliced.tensor.mul_(keep.view(shape).to(sliced.tensor))
        for (name, side), dim in dims.items():
            if side == "ch" and _mixes_channels(modules[name]):
                replaced.append(modules[name])
                modules[name].forward = _masked_norm(modules[name], dim.positions(units))
            elif side == "heads":
                replaced.append(modules[name])
                modules[name].forward = average_over(modules[name], dim.active(units))
        with inference_path_off():
            yield
    finally:
        for module in replaced:
            del module.forward
        with torch.no_grad():
            for tensor, old in reversed(saved):
                tensor.copy_(old)


def _mixes_channels(norm: Any) -> bool:
    return isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) or (isinstance(norm, nn.GroupNorm) and norm.num_groups == 1)


def _masked_norm(module: Any, positions: list[int]):
    index = torch.tensor(positions)

    def forward(x: Tensor) -> Tensor:
        at = index.to(x.device)
        axis = 1 if isinstance(module, nn.GroupNorm) else -1
        part = x.index_select(axis, at)
        weight = None if module.weight is None else module.weight[at]
        if isinstance(module, nn.RMSNorm):
            return torch.zeros_like(x).index_copy(axis, at, F.rms_norm(part, (len(positions),), weight, module.eps))
        bias = None if module.bias is None else module.bias[at]
        if isinstance(module, nn.GroupNorm):
            y = F.group_norm(part, 1, weight, bias, module.eps)
        else:
            y = F.layer_norm(part, (len(positions),), weight, bias, module.eps)
        return torch.zeros_like(x).index_copy(axis, at, y)

    return forward


def take(sliced: Sliced, units: Mapping[str, int], tensor: Tensor | None = None) -> Tensor:
    """The active slice of a tensor, as a copy."""
    found = sliced.tensor if tensor is None else tensor
    for axis, dim in sliced.axes.items():
        active = dim.active(units)
        if active == dim.size:
            continue
        if dim.blocks == 1:
            found = found.narrow(axis, 0, active)
        else:
            found = found.index_select(axis, torch.tensor(dim.positions(units), device=found.device))
    return found.detach().clone(memory_format=torch.contiguous_format)
