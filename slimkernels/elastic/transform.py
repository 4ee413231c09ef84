"""Turns layers into slimmable ones by changing their class: the objects, parameters, hooks and attributes stay."""

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from torch import nn

from slimkernels.elastic.attention import ATTENTION, out_proj_of
from slimkernels.elastic.layers import RECURRENT, full_size, kind_of, reason_not_slimmable, slim_class
from slimkernels.elastic.parameters import NUMBER, slice_parameters
from slimkernels.elastic.plan import Dim
from slimkernels.elastic.slices import number_side, parameter_side
from slimkernels.nn.attention import AnySizeMultiheadAttention
from slimkernels.nn.batch_norm import SlimBatchNorm


def transform(model: nn.Module, dims: Mapping[tuple[str, str], Dim], ignored: Collection[str] = ()) -> None:
    """Make every layer with a sliced dimension slimmable, and every batch norm, whose statistics depend on the layers
    before it."""
    modules = dict(model.named_modules())
    sides: dict[str, dict[str, Dim]] = {}
    for (name, side), dim in dims.items():
        sides.setdefault(name, {})[side] = dim
    for name, module in modules.items():
        kind = kind_of(module)
        by_side = sides.get(name, {})
        plain = {found[1]: found[0] for side in by_side if (found := parameter_side(side)) is not None}
        plain |= {number: NUMBER for side in by_side if (number := number_side(side)) is not None}
        if plain:
            slice_parameters(module, plain)
        elif isinstance(module, ATTENTION) and kind is not None and out_proj_of(name) in sides:
            _become_slim(module, by_side)  # torch's own reads the weights of out_proj past it
        elif kind is None or (not by_side and not _is_batch_norm(module, name, ignored)):
            continue
        elif not kind.slim_name:
            slice_parameters(module, {"weight": 0})
        else:
            _become_slim(module, by_side)
    for name, module in modules.items():
        inside = f"{name}." if name else ""
        if type(module).__module__ == nn.Transformer.__module__ and any(key.startswith(inside) for key in sides):
            slice_parameters(module, {})  # a class of ours: torch.compile takes the widths inside of it for constants
        for attribute in (a for layer, a in _FAST_PATHS.items() if isinstance(module, layer)):
            if any(key.startswith(inside) for key in sides):
                module.__dict__["_fast_path"] = (attribute, getattr(module, attribute))
                setattr(module, attribute, False)


# torch's transformer layers have an inference path that reads their layers' weights past the layers; this turns it off.
_FAST_PATHS: dict[type, str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}


def fast_path_again(module: nn.Module) -> None:
    """Undo what ``transform`` did to a transformer layer of torch; its inference path stays off where that does not take
    the attention's sizes."""
    if "_fast_path" in module.__dict__:
        attribute, value = module.__dict__.pop("_fast_path")
        attentions: list[Any] = [m for m in module.modules() if isinstance(m, ATTENTION)]
        if all(m.num_heads % 2 == 0 and not isinstance(m, AnySizeMultiheadAttention) for m in attentions):
            setattr(module, attribute, value)


def _is_batch_norm(module: nn.Module, name: str, ignored: Collection[str]) -> bool:
    is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return is_norm and name not in ignored and reason_not_slimmable(module) is None


def _become_slim(module: Any, sides: Mapping[str, Dim]) -> None:
    kind = kind_of(module)
    assert kind is not None
    cls = slim_class(kind)
    assert cls is not None
    own = set(module.__dict__)
    given: Any = type(module)
    module.__class__ = cls if given is kind.torch_class else combined(cls, given)
    module._plain_attributes = own  # what is left when the layer becomes a plain one again
    if hasattr(module, "_init_slim"):
        module._init_slim()
    else:
        module.activation = "none"
        module._init_width(full_size(module, kind, kind.sides[-1]))
    if isinstance(module, RECURRENT) and "in" in sides:
        module.in_blocks = max(1, sides["in"].blocks)
    if isinstance(module, nn.Linear):
        module.__dict__.update(in_blocks=1, out_blocks=1)
        for side, dim in sides.items():
            if dim.blocks > 1:
                setattr(module, f"{side}_blocks", dim.blocks)


@cache
def combined(slim: Any, own: Any) -> type:
    """A user's subclass (with no forward of its own) that is also what takes the place of torch's layer."""
    # Of a module that torch.compile takes for torch's own it holds tensors, the width's too, to be of one shape.
    module = slim.__module__ if own.__module__.startswith("torch.") else own.__module__

    def reduced(self: Any, protocol: Any) -> Any:  # made at run time: not to be found by its name
        return _rebuild, (slim, own), self.__dict__

    body = {"__module__": module, "__qualname__": own.__qualname__, "__reduce_ex__": reduced}
    return type(own.__name__, (slim, own), body)


def _rebuild(slim: Any, own: Any) -> nn.Module:
    cls: Any = combined(slim, own)
    return cls.__new__(cls)


def set_norm_mode(
    model: nn.Module,
    dims: Mapping[tuple[str, str], Dim],
    mode: str,
    at: Mapping[float, Mapping[str, int]],
) -> None:
    """Put every slimmable batch norm into ``mode``; ``at`` has the active units at the listed widths."""
    for name, module in batch_norms(model).items():
        dim = dims.get((name, "ch"))
        widths = [(r, module.full_width if dim is None else dim.active(units)) for r, units in at.items()]
        module.set_mode(mode, widths)


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """The slimmable batch norms by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SlimBatchNorm)}
