"""Which channels of a model are coupled: what is held together by the layers themselves, and by what the model computes."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from slimkernels._copy import deep_copy
from slimkernels.elastic.absent import Spots
from slimkernels.elastic.attention import ATTENTION
from slimkernels.elastic.attention import same_units as same_heads
from slimkernels.elastic.coupling import Coupling
from slimkernels.elastic.layer_flow import FollowError, NoOutput, follow
from slimkernels.elastic.layers import RECURRENT, full_size, kind_of
from slimkernels.elastic.recurrent import same_units


def as_call(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments: a tensor is one argument, a tuple or list several, a dict keywords."""
    if isinstance(example_inputs, dict):
        return (), example_inputs
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def check_example(model: nn.Module, example_inputs: Any) -> None:
    """Raises: ValueError when an input is on another device than the model, TypeError when there is no tensor in it."""
    tensors = [t for t in tree_leaves(example_inputs) if isinstance(t, Tensor)]
    if not tensors:
        raise TypeError(
            "convert: expected example_inputs to be a tensor, or a tuple or dict with one,"
            f" got {type(example_inputs).__name__}"
        )
    parameter = next(model.parameters(), None)
    for t in tensors:
        if parameter is not None and t.device != parameter.device:
            raise ValueError(
                f"convert: expected example_inputs on device {parameter.device} like the model, got {t.device}"
            )


def float_inputs(example_inputs: Any) -> Any:
    """Floating-point inputs as float32: the analysis runs in float32."""

    def to_float(t: Any) -> Any:
        return t.detach().float() if isinstance(t, Tensor) and t.is_floating_point() else t

    return tree_map(to_float, example_inputs)


def output_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output of any structure, dataclasses included."""
    if isinstance(output, dict):
        output = list(output.values())
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found += [leaf] if leaf.is_floating_point() else []
        elif hasattr(leaf, "__dataclass_fields__"):
            found += output_tensors([getattr(leaf, name) for name in leaf.__dataclass_fields__])
    return found


def run(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The model's floating-point outputs on the example."""
    args, kwargs = as_call(example_inputs)
    return output_tensors(model(*args, **kwargs))


def analysis_copy(model: nn.Module, noise: float = 0.1) -> nn.Module:
    """A float32 copy to trace, slice and permute, in eval mode, in which no constant parameter can hide an error.

    A branch that ends in a zero-initialised layer would look right however it is sliced: parameters and statistics that
    are the same number everywhere get some noise.
    """
    copied = deep_copy(model).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*copied.named_parameters(), *copied.named_buffers()]:
            if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                added = noise * torch.randn(tensor.shape, generator=generator).to(tensor.device)
                tensor.add_(added.abs() if name.endswith("running_var") else added)
    return copied


def plain_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, int]]:
    """Parameters that belong to no layer of a known kind, with the axis that holds channels if any does: the last
    longer than 1, or the one after the batch's of four."""
    found = {}
    for name, module in model.named_modules():
        if kind_of(module) is not None:
            continue
        for key, p in module._parameters.items():
            axes = [] if p is None else [i for i, size in enumerate(p.shape) if size > 1]
            if p is not None and axes and p.is_floating_point():
                axis = 1 if p.dim() == 4 and 1 in axes else axes[-1]
                found[f"{name}.{key}" if name else key] = (p, axis)
    return found


def trace(
    model: nn.Module, example_inputs: Any, unsliced: Callable[[str, nn.Module], str | None], heads: str = "whole"
) -> tuple[Coupling, Spots]:
    """Coupled channels of an analysis copy, and its operations over channels. ``unsliced`` gives the reason why a module's
    channels have to stay, or None; ``heads``: see ``Products``.

    Raises: ValueError when the model does not run on the example, or gives no tensor of floating-point numbers.
    """
    coupling = Coupling()
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None:
            for side in kind.sides:
                coupling.add(name, side, full_size(module, kind, side))
    plain = plain_parameters(model)
    for name, (p, axis) in plain.items():
        owner, _, key = name.rpartition(".")
        coupling.add(owner, f"param:{axis}:{key}", p.shape[axis])
    reasons = {name: unsliced(name, module) for name, module in model.named_modules()}
    given = [t for t in tree_leaves(example_inputs) if isinstance(t, Tensor)]
    try:
        spots = follow(model, lambda: run(model, example_inputs), given, coupling, reasons, plain, heads)
    except NoOutput as error:
        raise ValueError(
            f"convert: expected the model to return a tensor of floating-point numbers, alone or in a tuple, list, dict or"
            f" dataclass, got {error}"
        ) from None
    except FollowError as error:
        raise ValueError(
            f"convert: the model does not run on example_inputs ({one_line(error.error)})"
        ) from error.error
    for name, module in model.named_modules():
        reason = reasons[name]
        if isinstance(module, ATTENTION) and reason is None:
            for (a, i), (b, j) in same_heads(module, name):
                coupling.union(coupling.node(a, i), coupling.node(b, j))
        _couple_within(coupling, name, module)
        if reason is not None:
            for dimension in [key for key in coupling.offsets if key[0] == name]:
                coupling.poison_all(dimension, f"coupled to {name}: {reason}" if name else reason)
    _couple_tied(coupling, model)
    return coupling, spots


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _couple_within(coupling: Coupling, name: str, module: nn.Module) -> None:
    """Channels that a grouped convolution, a group norm or a recurrent layer holds together."""

    def union_all(nodes: Iterable[int]) -> None:
        first, *rest = nodes
        for other in rest:
            coupling.union(first, other)

    if isinstance(module, RECURRENT) and kind_of(module) is not None:
        for (side, position), (other, same) in same_units(module):
            coupling.union(coupling.node((name, side), position), coupling.node((name, other), same))
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        start_in, size_in = coupling.offsets[name, "in"]
        start_out, size_out = coupling.offsets[name, "out"]
        n_in, n_out = size_in // module.groups, size_out // module.groups
        for g in range(module.groups):
            inputs = range(start_in + g * n_in, start_in + (g + 1) * n_in)
            outputs = range(start_out + g * n_out, start_out + (g + 1) * n_out)
            union_all([*inputs, *outputs])
    if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
        start, size = coupling.offsets[name, "ch"]
        n = size // module.num_groups
        for g in range(module.num_groups):
            union_all(range(start + g * n, start + (g + 1) * n))


def _couple_tied(coupling: Coupling, model: nn.Module) -> None:
    """Layers that share a parameter have its channels in common."""
    from slimkernels.elastic.layers import tensor_axes

    seen: dict[tuple[int, int], tuple[str, str]] = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is None:
            continue
        for tensor_name, axes in tensor_axes(module, kind).items():
            p = module._parameters.get(tensor_name)
            for axis, side in axes.items() if p is not None else ():
                first = seen.setdefault((id(p), axis), (name, side))
                if first != (name, side):
                    start, size = coupling.offsets[first]
                    other = coupling.offsets[name, side][0]
                    for i in range(size):
                        coupling.union(start + i, other + i)
