"""Setting the width of an elastic model: ``set_width``, ``width``, ``view``."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels._copy import deep_copy
from slimkernels.elastic.attention import ATTENTION
from slimkernels.elastic.depth import skip
from slimkernels.elastic.layers import CONVS, RECURRENT
from slimkernels.elastic.parameters import set_parameter_width
from slimkernels.elastic.plan import Depth, Dim, Plan, Width, plan, unwrap
from slimkernels.elastic.recurrent import projection
from slimkernels.elastic.slices import number_side, parameter_side
from slimkernels.nn._base import SlimModule

_CACHED_WIDTHS = 256  # widths of which the assignments are kept; a sampler draws new ones for ever


def set_width(model: nn.Module, width: Width, depth: Depth = None) -> None:
    """Run ``model`` at ``width`` and ``depth`` from now on.

    Args:
        model: an elastic model, also compiled by ``slimkernels.compile``.
        width: a ratio of the full width; or a dict of ratios by name: a width dimension (see ``report``), a module,
            which stands for the dimensions that its layers produce, or a glob over module names. Dimensions that a dict
            does not name are full.
        depth: a float in (0, 1], the ratio of every stage's blocks that run (rounded to the nearest number, at least
            the first one); or a dict by stage (see ``report``; globs allowed) of numbers of blocks (int) or ratios
            (float), in which stages that it does not name are full; None: all blocks. A plain int is refused, as 1
            could mean one block or all of them.

    Raises: ValueError when the width or depth is not a legal one or a name fits nothing; both then stay as they were.
    """
    known = plan(model)
    ratios = known.ratios("set_width", width)
    skipped = known.skipped("set_width", depth)
    inner = unwrap(model)
    uniform = None if isinstance(width, Mapping) else next(iter(ratios.values()))
    key = (uniform, tuple(ratios.values()), next((p.device for p in inner.parameters()), None))
    entries = known.cache.get(key)
    if entries is None:
        entries = assignments(inner, known.dims, known.units_at(ratios), uniform)
        if len(known.cache) >= _CACHED_WIDTHS:
            known.cache.clear()
        known.cache[key] = entries
    apply(entries)
    if known.stages:
        skip(inner, known.stages.values(), skipped)
    known.current = dict(width) if isinstance(width, Mapping) else uniform
    known.current_depth = dict(depth) if isinstance(depth, Mapping) else depth


@contextmanager
def width(model: nn.Module, width: Width, depth: Depth = None) -> Iterator[nn.Module]:
    """``set_width`` for a block; the width and depth from before come back when it is left, also by an exception. Nests.

    The width belongs to the model, not to the thread: for several threads at once, use one ``view`` each.
    """
    known = plan(model)
    before = known.current, known.current_depth
    set_width(model, width, depth)
    try:
        yield model
    finally:
        set_width(model, *before)


def view(model: nn.Module, width: Width, depth: Depth = None) -> nn.Module:
    """A module tree at ``width`` and ``depth`` that shares every parameter and buffer with ``model``, and nothing else.

    Its width is its own: several threads run different widths by using a view each. Training steps and loaded weights
    show in it at once, as the tensors are the same; ``calibrate`` on the model afterwards needs a new view.

    Raises: ValueError when the width or depth is not a legal one.
    """
    inner = unwrap(model)
    plan(inner).ratios("view", width)
    plan(inner).depths("view", depth)
    shared = [*inner.parameters(), *inner.buffers()]
    memo = {id(tensor): tensor for tensor in shared}
    made = deep_copy(inner, memo)
    set_width(made, width, depth)
    return made


class Assignment:
    """What one module gets at one width."""

    __slots__ = ("index", "module", "n", "name", "out_index", "projected", "ratio")

    def __init__(
        self,
        module: Any,
        n: int,
        index: Tensor | None,
        name: str,
        ratio: float | None,
        out_index: Tensor | None = None,
        projected: int | None = None,
    ) -> None:
        self.module, self.n, self.index, self.name, self.ratio = module, n, index, name, ratio
        self.out_index, self.projected = out_index, projected


def assignments(
    model: nn.Module, dims: Mapping[tuple[str, str], Dim], units: Mapping[str, int], ratio: float | None
) -> list[Assignment]:
    """Width and gather of every module at the given active units. Batch norms get the ratio too."""
    modules = dict(model.named_modules())
    by_module: dict[str, dict[str, Dim]] = {}
    for (name, side), dim in dims.items():
        by_module.setdefault(name, {})[side] = dim
    found = []
    module: Any
    for name, sides in by_module.items():
        module = modules[name]
        has_projection = isinstance(module, RECURRENT) and projection(module) > 0
        made = ("cell",) if has_projection else ("state",) if isinstance(module, RECURRENT) else ("out", "ch")
        made = ("heads",) if isinstance(module, ATTENTION) else made
        layer = [dim for side, dim in sides.items() if side in made]
        if isinstance(module, SlimModule):
            n = layer[0].active(units) if layer else module.full_width
            taken = sides.get("in") or sides.get("ch")
            out = _gather_outputs(module, sides.get("out"), units)
            projected = None
            if has_projection:
                projected = sides["state"].active(units) if "state" in sides else projection(module)
            found.append(Assignment(module, n, _gather(module, taken, units), "", None, out, projected))
        for side, dim in sides.items():
            plain, number = parameter_side(side), number_side(side)
            if number is not None:
                found.append(Assignment(module, dim.active(units), None, number, None))
            if plain is None and side == "ch" and not isinstance(module, SlimModule):
                plain = (0, "weight")
            if plain is not None:
                leading = dim.blocks == 1 or dim.active(units) == dim.size
                index = None if leading else _index(module, dim, units)
                found.append(Assignment(module, dim.active(units), index, plain[1], None))
    for module in modules.values():
        if hasattr(module, "set_mode") and isinstance(module, SlimModule):
            entry = next((e for e in found if e.module is module), None)
            if entry is None:
                entry = Assignment(module, module.full_width, None, "", None)
                found.append(entry)
            entry.ratio = _nearest_listed(module, entry.n) if ratio is None else ratio
    return found


def _nearest_listed(norm: Any, n: int) -> float | None:
    """Ratio of a switchable batch norm whose width is set apart from the others'; None lets the norm find out."""
    if norm.mode != "switchable" or n == norm.full_width or any(channels == n for _, channels in norm.widths):
        return None
    return min((abs(channels - n), ratio) for ratio, channels in norm.widths)[1]


def _gather(module: Any, dim: Dim | None, units: Mapping[str, int]) -> Tensor | None:
    """Positions of the active inputs, where they are no slice that the module can take."""
    if dim is None or dim.blocks == 1 or dim.active(units) == dim.size:
        return None
    if dim.blocks and isinstance(module, (nn.Linear, *RECURRENT)):
        return None
    return _index(module, dim, units)


def _gather_outputs(module: Any, dim: Dim | None, units: Mapping[str, int]) -> Tensor | None:
    """Likewise of the active outputs; those of a grouped convolution follow its inputs."""
    if dim is None or dim.blocks == 1 or dim.active(units) == dim.size or not _lists_outputs(module, dim):
        return None
    return _index(module, dim, units)


def _lists_outputs(module: Any, dim: Dim) -> bool:
    return (isinstance(module, CONVS) and module.groups == 1) or (isinstance(module, nn.Linear) and not dim.blocks)


def _index(module: nn.Module, dim: Dim, units: Mapping[str, int]) -> Tensor:
    device = next((t.device for t in [*module.parameters(), *module.buffers()]), None)
    return torch.tensor(dim.positions(units), dtype=torch.int64, device=device)


def apply(entries: list[Assignment]) -> None:
    for entry in entries:
        module = entry.module
        if entry.name:
            set_parameter_width(module, entry.name, entry.n, entry.index)
            continue
        if module.in_index is not entry.index:
            module.in_index = entry.index
        if module.out_index is not entry.out_index:
            module.out_index = entry.out_index
        if entry.projected is not None:
            module.set_proj_width(entry.projected)
        if entry.ratio is None:
            module.set_width(entry.n)
        else:
            module.set_width(entry.n, entry.ratio)


__all__ = ["Plan", "set_width", "view", "width"]
