"""Which tensors of an elastic network can be generated, and what their coordinates are at a width."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels import elastic
from slimkernels._copy import deep_copy
from slimkernels.elastic.layers import CONVS, TRANSPOSED, kind_of, tensor_axes
from slimkernels.elastic.plan import Dim, Plan, unwrap
from slimkernels.ops import InrTensor

Tile = tuple[int, int]


@dataclass(frozen=True)
class Target:
    """One parameter of the target network.

    A coordinate is a pair of an output and an input channel, and emits the whole kernel there. The columns of a Linear
    after a flatten are such kernels too: ``per_unit`` positions of one channel.
    """

    name: str
    shape: tuple[int, ...]  # of the full parameter
    dims: tuple[Dim | None, Dim | None]  # the width dimensions of its first two axes
    layout: str  # "oihw" | "iohw" | "bias"
    per_unit: int = 1
    tile: Tile = (1, 1)
    placed: bool = False  # its elastic layer reads the full parameter: through an index, by groups, or beside another

    @property
    def kernel(self) -> tuple[int, ...]:
        if self.layout == "bias":
            return ()
        return (self.per_unit,) if self.per_unit > 1 else self.shape[2:]

    @property
    def outputs(self) -> int:
        """Numbers that one coordinate emits."""
        return math.prod(self.kernel) * self.tile[0] * self.tile[1]

    def inr(self, layer: int, layers: int, mlp: int, absolute: bool) -> InrTensor:
        return InrTensor(layer, layers, self.kernel, mlp, self.layout, self.tile, self.whole() if absolute else None)

    def sizes(self, units: Mapping[str, int]) -> tuple[int, ...]:
        """Active sizes of the first two axes (one, of a bias)."""
        count = min(2, len(self.shape))
        pairs = zip(self.shape[:count], self.dims[:count], strict=True)
        return tuple(full if dim is None else dim.active(units) for full, dim in pairs)

    def shape_at(self, units: Mapping[str, int]) -> tuple[int, ...]:
        return self.sizes(units) + self.shape[2:]

    def active(self, units: Mapping[str, int]) -> tuple[int, int]:
        """Active (output, input) channels."""
        sizes = self.sizes(units)
        if self.layout == "bias":
            return sizes[0], 1
        if self.layout == "iohw":
            return sizes[1], sizes[0]
        return sizes[0], sizes[1] // self.per_unit

    def leading(self, units: Mapping[str, int]) -> bool:
        """Whether the active channels are the first ones."""
        return all(dim is None or len(dim.runs) == 1 or dim.active(units) == dim.size for dim in self.dims)

    def whole(self) -> tuple[int, int]:
        """Output and input channels at full width."""
        if self.layout == "bias":
            return self.shape[0], 1
        outputs, inputs = self.shape[:2] if self.layout == "oihw" else self.shape[1::-1]
        return outputs, inputs // self.per_unit

    def positions(self) -> tuple[int, int]:
        """Output and input positions of its coordinates at full width."""
        outputs, inputs = self.whole()
        return -(-outputs // self.tile[0]), -(-inputs // self.tile[1])

    def taken(self, full: Tensor, units: Mapping[str, int]) -> Tensor:
        """The active slice of a full tensor; a copy only where the active channels are not the first ones."""
        for axis, dim in enumerate(self.dims):
            if dim is None or dim.active(units) == dim.size:
                continue
            if len(dim.runs) == 1:
                full = full.narrow(axis, 0, dim.active(units))
            else:
                full = full.index_select(axis, _index(dim, units, full))
        return full

    def base(self, full: Tensor, units: Mapping[str, int] | None) -> Tensor:
        """The slice, or all of it (None), as the op adds it."""
        found = full if units is None else self.taken(full, units)
        return found.unflatten(1, (-1, self.per_unit)) if self.per_unit > 1 else found

    def put(self, w: Tensor, units: Mapping[str, int]) -> Tensor:
        """``w`` at its positions in a tensor of the full size, with zeros elsewhere."""
        for axis, dim in enumerate(self.dims):
            if dim is None or dim.active(units) == dim.size:
                continue
            shape = list(w.shape)
            shape[axis] = dim.size
            w = w.new_zeros(shape).index_copy(axis, _index(dim, units, w), w)
        return w


def _index(dim: Dim, units: Mapping[str, int], like: Tensor) -> Tensor:
    return torch.tensor(dim.positions(units), dtype=torch.int64, device=like.device)


def find(
    model: nn.Module,
    plan: Plan,
    tensors: str | Sequence[str],
    tile: Tile | Mapping[str, Tile] | None,
    patterns_for: str = "WeightGenerator",
) -> list[Target]:
    """The tensors that fit a name or glob, in the network's order.

    Raises: ValueError when a name fits nothing, or only tensors that cannot be generated.
    """
    known = {target.name: target for target in _all(model, plan, tile)}
    names = [name for name, _ in model.named_parameters()]
    trained = {name for name, p in model.named_parameters() if p.requires_grad} or set(names)
    chosen: set[str] = set()
    for pattern in [tensors] if isinstance(tensors, str) else list(tensors):
        fitting = {n for n in known if n == pattern or (n in trained and _fits(n, pattern))}
        if not fitting:
            others = [n for n in names if _fits(n, pattern)]
            if others:
                raise ValueError(
                    f"{patterns_for}: expected tensors of Linear and convolution layers, got {pattern!r}, which fits"
                    f" {', '.join(others[:3])}; batch norms can be folded first (hyper.fold_batch_norm)"
                )
            raise ValueError(
                f"{patterns_for}: expected names or globs of the target's tensors, got {pattern!r}, which fits none of"
                f" {', '.join(list(known)[:6])}{', ...' if len(known) > 6 else ''}"
            )
        chosen |= fitting
    if not chosen:
        raise ValueError(f"{patterns_for}: expected at least one tensor to generate, got {tensors!r}")
    return [_beside(target, known, chosen) for name, target in known.items() if name in chosen]


def _beside(target: Target, known: Mapping[str, Target], chosen: set[str]) -> Target:
    """A layer whose weight or bias alone is generated reads it at full size, as it reads the other."""
    owner = target.name.rpartition(".")[0]
    others = {name for name in known if name.rpartition(".")[0] == owner}
    return target if others <= chosen else replace(target, placed=True)


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)


def check_blocks(blocks: Sequence[str] | None, targets: list[Target]) -> list[str]:
    if blocks is None:
        return []
    owners: dict[str, str] = {}
    for block in blocks:
        members = [t.name for t in targets if _fits(t.name, block)]
        if not members:
            raise ValueError(
                f"WeightGenerator: expected blocks that hold generated tensors, got {block!r}, which has none"
            )
        for name in members:
            if name in owners:
                raise ValueError(
                    f"WeightGenerator: expected blocks apart, got {name!r} in {owners[name]!r} and {block!r}"
                )
            owners[name] = block
    missing = [t.name for t in targets if t.name not in owners]
    if missing:
        raise ValueError(f"WeightGenerator: expected every generated tensor in a block, got {missing[0]!r} in none")
    return list(blocks)


def _all(model: nn.Module, plan: Plan, tile: Tile | Mapping[str, Tile] | None) -> list[Target]:
    found = []
    seen: set[int] = set()
    for owner, module in model.named_modules():
        kind = kind_of(module)
        if kind is None or not kind.mixes:
            continue
        transposed, groups = isinstance(module, TRANSPOSED), getattr(module, "groups", 1)
        for name, axes in tensor_axes(module, kind).items():
            parameter = module._parameters.get(name)
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            dims = tuple(plan.dims.get((owner, axes[axis])) if axis in axes else None for axis in (0, 1))
            qualified = f"{owner}.{name}" if owner else name
            bias = parameter.dim() == 1
            per_unit = 1 if bias or transposed or groups > 1 else _per_unit(module, dims[1])
            target = Target(
                qualified,
                tuple(parameter.shape),
                (dims[0], dims[1]),
                "bias" if bias else "iohw" if transposed else "oihw",
                per_unit,
                placed=groups > 1 or qualified.removesuffix(f".{name}") in plan.gathers,
            )
            found.append(_tiled(target, tile))
    return found


def _per_unit(module: nn.Module, dim: Dim | None) -> int:
    """Columns of a Linear that belong to one channel, flattened."""
    if isinstance(module, CONVS) or dim is None or len(dim.runs) != 1 or dim.runs[0].group is None:
        return 1
    return dim.runs[0].per_unit


def _tiled(target: Target, tile: Tile | Mapping[str, Tile] | None) -> Target:
    if tile is None or target.layout == "bias":
        return target
    if isinstance(tile, Mapping):
        given = [pair for pattern, pair in tile.items() if _fits(target.name, pattern)]
        chosen = given[-1] if given else (1, 1)
    else:
        chosen = tile if math.prod(target.kernel) == 1 else (1, 1)
    if len(chosen) != 2 or not all(isinstance(n, int) and n >= 1 for n in chosen):
        raise ValueError(f"WeightGenerator: expected a tile to be a pair of positive integers, got {chosen!r}")
    return Target(**{**target.__dict__, "tile": (chosen[0], chosen[1])})


def elastic_copy(target: nn.Module, example_inputs: Any, options: Mapping[str, Any] | None) -> nn.Module:
    """An elastic copy of the target.

    Raises: TypeError or ValueError when it is no module, or the other arguments do not fit it.
    """
    if not isinstance(target, nn.Module):
        raise TypeError(f"WeightGenerator: expected target to be an nn.Module, got {type(target).__name__}")
    inner = unwrap(target)
    if "_elastic" in inner.__dict__:
        if example_inputs is not None or options is not None:
            raise ValueError(
                "WeightGenerator: expected no example_inputs and no convert with an elastic target, got one"
            )
        return deep_copy(inner)
    if example_inputs is None:
        raise ValueError(
            "WeightGenerator: expected an elastic target (elastic.convert), or example_inputs to convert a plain"
            f" {type(target).__name__} with, got neither"
        )
    return elastic.convert(target, example_inputs, **(options or {}))
