"""Elastic depth: the switch that skips a block, and its removal.

A block that is skipped returns its input: it runs nothing and costs nothing. Its class becomes a subclass of its own
that holds the switch, so parameters, state_dict keys and ``isinstance`` stay as they were.
"""

from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

from torch import Tensor, nn

from slimkernels.elastic.parameters import SlicedParameters, sliced_class
from slimkernels.elastic.plan import Stage


class SkippableBlock:
    """Mixin of the generated subclasses."""

    _block_class: type[nn.Module]
    _skipped: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._skipped:
            return x
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        base: Any = self._block_class
        if issubclass(base, SlicedParameters):  # made at run time too: not to be found by its name
            return _rebuild, (base._base_class, base._sliced), self.__dict__
        return _rebuild, (base, None), self.__dict__


@cache
def _skippable_class(base: Any) -> type[nn.Module]:
    body = {"_block_class": base, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (SkippableBlock, base), body)


def _rebuild(base: Any, sliced: tuple[tuple[str, int], ...] | None) -> nn.Module:
    made: Any = base if sliced is None else sliced_class(base, sliced)
    cls = _skippable_class(made)
    return cls.__new__(cls)


def make_skippable(model: nn.Module, stages: Iterable[Stage]) -> None:
    """Give every block but the first of each stage its switch."""
    for stage in stages:
        for name in stage.blocks[1:]:
            module: Any = model.get_submodule(name)
            given: Any = type(module)
            module.__class__ = _skippable_class(given)
            module._skipped = False


def skip(model: nn.Module, stages: Iterable[Stage], skipped: Collection[str]) -> None:
    """Skip the blocks of these names and run all others."""
    for stage in stages:
        for name in stage.blocks[1:]:
            module: Any = model.get_submodule(name)
            if module._skipped != (name in skipped):
                module._skipped = name in skipped


def always_run(module: Any) -> None:
    """Undo ``make_skippable`` for one block."""
    del module.__dict__["_skipped"]
    module.__class__ = module._block_class


def remove(model: nn.Module, stages: Iterable[Stage], skipped: Collection[str]) -> None:
    """Take skipped blocks out of a model, names of the others unchanged; where the forward needs their place, an
    ``nn.Identity`` fills it."""
    for stage in stages:
        for name in stage.blocks[1:]:
            if name in skipped:
                container, _, key = name.rpartition(".")
                modules = model.get_submodule(container)._modules
                if stage.removable:
                    del modules[key]
                else:
                    modules[key] = nn.Identity()


def renumber(model: nn.Module, stages: Iterable[Stage]) -> None:
    """Number the modules of containers from 0 without gaps, as in a network that is built without the removed ones."""
    for container in dict.fromkeys(stage.blocks[0].rpartition(".")[0] for stage in stages):
        modules = model.get_submodule(container)._modules
        if all(key.isdecimal() for key in modules):
            left = list(modules.values())
            modules.clear()
            modules.update({str(i): module for i, module in enumerate(left)})
