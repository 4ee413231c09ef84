"""Plain parameters (layer scale, positional embeddings, PReLU slopes) that follow the width of the channels they belong
to, and whole numbers that a module keeps of its size.

The module that owns them becomes an instance of a subclass of its own class, in which the parameter's name is a
property that gives the active slice. The parameter, its state_dict key and ``isinstance`` stay as they were. A number is a
property likewise.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

NUMBER = -1  # in place of an axis


def _active_number(name: str) -> property:
    def get(self: Any) -> int:
        return self.__dict__[f"_width_of_{name}"].shape[0]

    def put(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return property(get, put)


def _active(name: str, axis: int) -> property:
    if axis == NUMBER:
        return _active_number(name)

    def get(self: Any) -> Tensor:
        parameter = self._parameters[name]
        state = self.__dict__
        index = state[f"_index_of_{name}"]
        if index is not None:
            return parameter.index_select(axis, index)
        n = state[f"_width_of_{name}"].shape[0]
        return parameter if n == parameter.shape[axis] else parameter.narrow(axis, 0, n)

    def put(self: Any, value: Any) -> None:
        nn.Module.__setattr__(self, name, value)

    return property(get, put)


class SlicedParameters:
    """Mixin of the generated subclasses."""

    _base_class: type[nn.Module]
    _sliced: tuple[tuple[str, int], ...]  # (parameter, axis) or (number, NUMBER)

    def __reduce_ex__(self, protocol):
        return _rebuild, (self._base_class, self._sliced), self.__dict__


@cache
def sliced_class(base: Any, sliced: tuple[tuple[str, int], ...]) -> type[nn.Module]:
    """The subclass of ``base`` whose parameters ``sliced`` are properties."""
    body: dict[str, Any] = {name: _active(name, axis) for name, axis in sliced}
    # torch.compile holds the tensors of torch's own modules, the width's too, to be of one shape.
    module = __name__ if base.__module__.startswith("torch.") else base.__module__
    body |= {"_base_class": base, "_sliced": sliced, "__module__": module, "__qualname__": base.__qualname__}
    return type(base.__name__, (SlicedParameters, base), body)


def _rebuild(base: Any, sliced: tuple[tuple[str, int], ...]) -> nn.Module:
    cls = sliced_class(base, sliced)
    return cls.__new__(cls)


def slice_parameters(module: Any, sliced: dict[str, int]) -> None:
    """Turn ``module`` into an instance of its sliced class, at full width; more can be sliced later."""
    again = isinstance(module, SlicedParameters)
    before = dict(module._sliced) if again else {}
    base: Any = module._base_class if again else type(module)
    module.__class__ = sliced_class(base, tuple(sorted((before | sliced).items())))
    for name, axis in sliced.items():
        full = module.__dict__[name] if axis == NUMBER else module._parameters[name].shape[axis]
        set_parameter_width(module, name, full, None)


def set_parameter_width(module: nn.Module, name: str, n: int, index: Tensor | None) -> None:
    # The shape of an empty tensor is a dynamic integer for torch.compile (see slimkernels.nn).
    module.__dict__[f"_width_of_{name}"] = torch.empty((n, 0))
    module.__dict__[f"_index_of_{name}"] = index


def unslice(module: Any, name: str) -> None:
    """Undo ``slice_parameters`` for one of several."""
    left = {other: axis for other, axis in module._sliced if other != name}
    plain_parameters_again(module)
    if left:
        slice_parameters(module, left)


def plain_parameters_again(module: Any) -> None:
    """Undo ``slice_parameters``."""
    for name, _ in module._sliced:
        del module.__dict__[f"_width_of_{name}"], module.__dict__[f"_index_of_{name}"]
    module.__class__ = module._base_class
