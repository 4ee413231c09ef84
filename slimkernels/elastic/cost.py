"""``cost``: parameters and multiply-accumulates at a width, in closed form."""

from typing import Any, NamedTuple

import torch
from torch import nn

from slimkernels.elastic.attention import ATTENTION, called_with, inference_path_off
from slimkernels.elastic.attention import macs_of as attention_macs
from slimkernels.elastic.layers import CONVS, RECURRENT, TRANSPOSED, full_size, kind_of
from slimkernels.elastic.plan import Depth, LayerCost, ParameterCost, Width, is_inside, plan
from slimkernels.elastic.recurrent import CELLS, LAYERS, macs_of, steps_of
from slimkernels.elastic.slices import Dims, sliced_tensors
from slimkernels.elastic.trace import run


class Cost(NamedTuple):
    """What a sub-network costs."""

    params: int  # elements of the parameters of the extracted network
    # Multiply-accumulates of its Linear, convolution, recurrent and MultiheadAttention layers, for the example inputs of
    # ``convert``.
    macs: int


def cost(model: nn.Module, width: Width, depth: Depth = None) -> Cost:
    """Parameters and MACs of ``model`` at a width and depth, from the plan alone: nothing is run or extracted.

    Raises: ValueError when the width or depth is not a legal one.
    """
    known = plan(model)
    units = known.units("cost", width)
    skipped = known.skipped("cost", depth)
    params = 0
    for parameter in known.parameters:
        if skipped and parameter.owners and all(is_inside(owner, skipped) for owner in parameter.owners):
            continue
        numel = parameter.numel
        for key in parameter.dims:
            numel = numel // known.dims[key].size * known.dims[key].active(units)
        params += numel
    macs = 0
    for layer in known.layers:
        if is_inside(layer.module, skipped):
            continue
        taken, made = (known.dims.get((layer.module, side)) for side in layer.sides)
        size_in = layer.size_in if taken is None else taken.active(units)
        size_out = layer.size_out if made is None else made.active(units)
        macs += size_out * (1 if layer.grouped else size_in) * layer.factor
    return Cost(params, macs)


def parameter_costs(model: nn.Module, dims: Dims) -> list[ParameterCost]:
    """Every parameter of a plain model, once."""
    axes: dict[int, tuple[tuple[str, str], ...]] = {}
    for sliced in sliced_tensors(model, dims):
        keys = tuple((dim.module, dim.side) for dim in sliced.axes.values())
        axes.setdefault(id(sliced.tensor), keys)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for own in module._parameters.values():
            if own is not None:
                owners.setdefault(id(own), []).append(name)
    return [ParameterCost(p.numel(), axes.get(id(p), ()), tuple(owners[id(p)])) for p in model.parameters()]


def layer_costs(model: nn.Module, example_inputs: Any) -> list[LayerCost]:
    """Runs a plain model once and counts, per layer that multiplies, over all its calls."""
    names = {id(module): name for name, module in model.named_modules()}
    factors: dict[str, int] = {}
    products: dict[tuple[str, tuple[str, str]], int] = {}  # of attention layers

    def record_attention(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        for name, sides, times in attention_macs(module, names[id(module)], called_with(args, kwargs)):
            products[name, sides] = products.get((name, sides), 0) + times

    def record(module: Any, inputs: tuple, output: Any) -> None:
        if isinstance(module, RECURRENT):
            name = names[id(module)]
            factors[name] = factors.get(name, 0) + steps_of(module, output)
            return
        if not isinstance(output, torch.Tensor) or not inputs or not isinstance(inputs[0], torch.Tensor):
            return
        kind = kind_of(module)
        assert kind is not None
        size_out = full_size(module, kind, "out")
        if isinstance(module, nn.Linear):
            factor = output.numel() // size_out
        else:
            spatial = (
                inputs[0].numel() // module.in_channels
                if isinstance(module, TRANSPOSED)
                else output.numel() // size_out
            )
            factor = spatial * int(torch.Size(module.kernel_size).numel())
            if module.groups > 1:
                factor *= module.in_channels // module.groups
        name = names[id(module)]
        factors[name] = factors.get(name, 0) + factor

    counted = (nn.Linear, *CONVS, *LAYERS, *CELLS)
    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, counted)]
    hooks += [
        m.register_forward_hook(record_attention, with_kwargs=True)
        for m in model.modules()
        if isinstance(m, ATTENTION) and type(m).forward is nn.MultiheadAttention.forward
    ]
    try:
        with torch.no_grad(), inference_path_off():
            run(model, example_inputs)
    except Exception:
        return []  # the trace reports why the model does not run
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for name, factor in factors.items():
        module = model.get_submodule(name)
        kind = kind_of(module)
        assert kind is not None
        if isinstance(module, RECURRENT):
            for sides, times in macs_of(module):
                size_in, size_out = (full_size(module, kind, side) for side in sides)
                found.append(LayerCost(name, size_in, size_out, False, factor * times, sides))
            continue
        size_in, size_out = (full_size(module, kind, side) for side in ("in", "out"))
        found.append(LayerCost(name, size_in, size_out, getattr(module, "groups", 1) > 1, factor))
    for (name, sides), factor in products.items():
        module = model.get_submodule(name)
        kind = kind_of(module)
        assert kind is not None
        size_in, size_out = (full_size(module, kind, side) if side else 1 for side in sides)
        found.append(LayerCost(name, size_in, size_out, False, factor, sides))
    return found
