"""What a network computes when some of its channels are not there, on the full network.

Weights that take channels in get zeros for the inactive ones (``slices.masked``). Operations that the network itself writes
over its channels, a mean, a norm, a softmax, a product of activations, have to leave them out too: the trace notes where they
are, and the same run is done again without them.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from slimkernels.elastic.coupling import Coupling
from slimkernels.elastic.slices import Dims, masked


@dataclass(frozen=True)
class Spot:
    """An operation over channels: ``zero`` makes those of an argument zero (``attention`` too, where the scale follows their
    number), ``select`` leaves them out of a dimension of the first argument, ``norm`` out of a norm over the last one."""

    kind: str
    argument: int
    dim: int
    labels: Tensor


# The innermost module that runs, the operation, how many of it ran there: a cast that another dtype needs moves nothing.
Place = tuple[str, str, int]


class Places:
    """Says where in a model an operation is; the same when other modules are skipped."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(module): name for name, module in model.named_modules()}
        self.stack, self.counts = [""], Counter[tuple[str, str]]()

    def next(self, func: Any) -> Place:
        name, op = self.stack[-1], str(func)
        self.counts[name, op] += 1
        return name, op, self.counts[name, op]

    @contextmanager
    def followed(self) -> Iterator[None]:
        def enter(module: nn.Module, args: Any) -> None:
            self.stack.append(self.names.get(id(module), self.stack[-1]))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()

        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass
class Spots:
    """Those of a run."""

    coupling: Coupling
    layers: list[str] = field(
        default_factory=list
    )  # modules that are taken as a whole: their operations are not counted
    of: dict[Place, list[Spot]] = field(default_factory=dict)

    def add(self, place: Place, spot: Spot) -> None:
        self.of.setdefault(place, []).append(spot)

    @contextmanager
    def numbers(self, model: nn.Module) -> Iterator[dict[Place, list[Any]]]:
        """The numbers that operations by element have in a run: some are made of sizes."""
        places = Places(model)
        found: dict[Place, list[Any]] = {}
        with _apart(model, self.layers), places.followed(), _Numbers(found, places):
            yield found

    @contextmanager
    def without(
        self, model: nn.Module, dims: Dims, units: Mapping[str, int], numbers: Mapping[Place, list[Any]] | None = None
    ) -> Iterator[None]:
        """``masked``, in all operations of a run; with the numbers of another one."""
        with masked(model, dims, units):
            if not self.of:
                yield
                return
            places = Places(model)
            mode = _Without(self.of, self._active(dims, units), places, numbers or {})
            with _apart(model, self.layers), places.followed(), mode:
                yield

    def _active(self, dims: Dims, units: Mapping[str, int]) -> Callable[[Tensor], Tensor]:
        parent = self.coupling.parent
        inactive = set()
        for key, dim in dims.items():
            if key not in self.coupling.offsets:  # a number
                continue
            start, size = self.coupling.offsets[key]
            inactive |= {self.coupling.find(start + i) for i in set(range(size)) - set(dim.positions(units))}
        kept = torch.tensor([True, *(self.coupling.find(node) not in inactive for node in range(len(parent)))])
        return lambda labels: kept[labels.clamp(min=0).long()]


@contextmanager
def _apart(model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """Layers run without the mode that is on."""

    def around(forward: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return forward(*args, **kwargs)

        return call

    own: dict[str, Any] = {}
    modules = {name: model.get_submodule(name) for name in layers}
    try:
        for name, module in modules.items():
            own[name] = module.__dict__.get("forward")
            module.__dict__["forward"] = around(module.forward)
        yield
    finally:
        for name, module in modules.items():
            del module.__dict__["forward"]
            if own[name] is not None:
                module.__dict__["forward"] = own[name]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Numbers(TorchDispatchMode):
    def __init__(self, found: dict[Place, list[Any]], places: Places) -> None:
        super().__init__()
        self.found, self.places = found, places

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence = (), kwargs: Any = None) -> Any:
        place = self.places.next(func)
        if torch.Tag.pointwise in func.tags:
            self.found[place] = [a for a in args if _is_number(a)]
        return func(*args, **(kwargs or {}))


class _Without(TorchDispatchMode):
    def __init__(
        self,
        spots: Mapping[Place, list[Spot]],
        active: Callable[[Tensor], Tensor],
        places: Places,
        numbers: Mapping[Place, list[Any]],
    ) -> None:
        super().__init__()
        self.spots, self.active, self.places, self.numbers = spots, active, places, numbers

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = self.places.next(func)
        if torch.Tag.pointwise in func.tags and place in self.numbers:
            numbers = iter(self.numbers[place])
            args = tuple(next(numbers, a) if _is_number(a) else a for a in args)
        for spot in self.spots.get(place, ()):
            x = args[spot.argument]
            kept = self.active(spot.labels)
            if spot.kind in ("zero", "attention"):
                given = list(args)
                given[spot.argument] = x * kept.to(x)
                if spot.kind == "attention" and kwargs.get("scale") is None:
                    given[spot.argument] *= (x.shape[-1] / int(kept.expand(x.shape).sum(-1).max())) ** 0.5
                args = tuple(given)
                continue
            index = kept.flatten().nonzero()[:, 0].to(x.device)
            if kept.numel() == kept.sum():
                continue
            if spot.kind == "select":
                y = func(x.index_select(spot.dim, index), *args[1:], **kwargs)
                same = isinstance(y, Tensor) and y.dim() == x.dim() and y.shape[spot.dim] == len(index) != 1
                return torch.zeros_like(x).index_copy(spot.dim, index, y) if same else y
            weights = [w.index_select(0, index) if isinstance(w, Tensor) else w for w in args[2:]]
            found = func(x.index_select(-1, index), [len(index)], *weights, **kwargs)
            y, *rest = found if isinstance(found, tuple) else (found,)
            y = torch.zeros_like(x).index_copy(-1, index, y)
            return (y, *rest) if isinstance(found, tuple) else y
        return func(*args, **kwargs)
