"""Runs a model on its example inputs and finds which channels are coupled: the only user of torch_pruning."""

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from slimkernels.elastic.layers import RECURRENT, full_size, kind_of
from slimkernels.elastic.recurrent import same_units, stand_ins

IS_OUTPUT = "its channels are an output of the network"


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
    """16-bit floating-point inputs as float32: the analysis runs in float32."""

    def to_float(t: Any) -> Any:
        return t.detach().float() if isinstance(t, Tensor) and t.dtype in (torch.float16, torch.bfloat16) else t

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
    copied = copy.deepcopy(model).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*copied.named_parameters(), *copied.named_buffers()]:
            if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                added = noise * torch.randn(tensor.shape, generator=generator).to(tensor.device)
                tensor.add_(added.abs() if name.endswith("running_var") else added)
    return copied


class Coupling:
    """Union-find over the positions of every sliced dimension."""

    def __init__(self) -> None:
        self.offsets: dict[tuple[str, str], tuple[int, int]] = {}  # (module, side) -> (first node, size)
        self.parent: list[int] = []
        self.poison: list[tuple[int, str]] = []  # (node, reason)
        self.known: set[tuple[str, str]] = set()  # dimensions that the trace reached

    def add(self, module: str, side: str, size: int) -> None:
        self.offsets[module, side] = (len(self.parent), size)
        self.parent.extend(range(len(self.parent), len(self.parent) + size))

    def find(self, node: int) -> int:
        root = node
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[node] != root:
            self.parent[node], node = root, self.parent[node]
        return root

    def union(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self.parent[max(a, b)] = min(a, b)

    def node(self, key: tuple[str, str], position: int) -> int:
        return self.offsets[key][0] + position

    def labels(self, key: tuple[str, str]) -> list[int]:
        start, size = self.offsets[key]
        return [self.find(i) for i in range(start, start + size)]

    def poison_all(self, key: tuple[str, str], reason: str) -> None:
        start, size = self.offsets[key]
        self.poison.extend((i, reason) for i in range(start, start + size))


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


def trace(model: nn.Module, example_inputs: Any, unsliced: Callable[[str, nn.Module], str | None]) -> Coupling:
    """Coupled channels of an analysis copy. ``unsliced`` gives the reason why a module's channels have to stay, or
    None.

    Raises: ValueError when the model does not run on the example, or its operations cannot be traced.
    """
    names = {id(module): name for name, module in model.named_modules()}
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

    with stand_ins(model, names) as known:
        graph, output_ids = _dependency_graph(model, example_inputs, plain)
        _follow(graph, model, known, plain, output_ids, coupling)
    for name, module in model.named_modules():
        _couple_within(coupling, name, module)
        reason = unsliced(name, module)
        if reason is not None:
            for dimension in [key for key in coupling.offsets if key[0] == name]:
                coupling.poison_all(dimension, f"coupled to {name}: {reason}" if name else reason)
    _couple_tied(coupling, model)
    return coupling


def _dependency_graph(model: nn.Module, example_inputs: Any, plain: dict) -> tuple[Any, set[int]]:
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    failure: list[Exception] = []
    kept: list[Tensor] = []  # keeps the outputs' grad_fn objects alive, so that their ids stay theirs

    def forward(model: nn.Module, example_inputs: Any) -> list[Tensor]:
        try:
            kept.extend(o for o in run(model, example_inputs) if o.grad_fn is not None)
        except Exception as error:
            failure.append(error)
            raise
        return kept

    parameters = list(plain.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = _graph_class()()
            with torch.enable_grad():
                graph.build_dependency(
                    model, example_inputs, forward_fn=forward, unwrapped_parameters=parameters, verbose=False
                )
        except Exception as error:
            if failure:
                raise ValueError(
                    f"convert: the model does not run on example_inputs ({one_line(failure[0])})"
                ) from error
            name = type(model).__name__
            raise ValueError(f"convert: the operations of {name} cannot be traced ({one_line(error)})") from error
    if not kept:
        raise ValueError(
            "convert: the model's output does not depend on its parameters by operations that autograd records"
        )
    ends = {id(o.grad_fn) for o in kept}
    return graph, {id(node) for node in graph.module2node.values() if id(node.grad_fn) in ends}


@cache
def _graph_class() -> type:
    import torch_pruning
    from torch_pruning import ops
    from torch_pruning.dependency import shape_infer

    class Graph(torch_pruning.DependencyGraph):
        """The dependency graph, with reshapes other than flattening and its reverse, and cuts of a matrix's rows, left as
        they are.

        The base class takes every reshape for one of the two by the channels it infers around it, and divides by them: for the
        reshapes of a channel shuffle or of attention heads that is a wrong mapping or a division by zero.
        """

        def _build_dependency(self, module2node):
            super()._build_dependency(module2node)
            shape_infer.init_shape_information(self)
            for node in module2node.values():
                if (node.type == ops.OPTYPE.RESHAPE and not self._flattens(node)) or self._slices_rows(node):
                    node.type = ops.OPTYPE.ELEMENTWISE

        def _slices_rows(self, node) -> bool:
            """Part of the rows of a matrix (packed sequences are cut so): the channels stay whole."""
            size = getattr(node.grad_fn, "_saved_self_sym_sizes", ())
            return node.type == ops.OPTYPE.SLICE and len(size) == 2 and node.grad_fn._saved_dim == 0

        def _flattens(self, node) -> bool:
            size = tuple(getattr(node.grad_fn, "_saved_self_sym_sizes", ()))
            n_out = self._first_channels(shape_infer.infer_in_channels_recursively, node.outputs)
            n_in = self._first_channels(shape_infer.infer_out_channels_recursively, node.inputs)
            if not n_out or not n_in or len(size) < 2:
                return False
            flatten = len(size) > 2 and math.prod(size[1:]) == n_out and n_out % n_in == 0
            return flatten or (len(size) == 2 and size[1] == n_in and n_in % n_out == 0)

        def _first_channels(self, infer, nodes) -> int | None:
            found = (infer(self, node, [0]) for node in nodes)
            return next((channels for channels in found if channels is not None), None)

    return Graph


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _follow(
    graph: Any, model: nn.Module, names: dict[int, str], plain: dict, ends: set[int], coupling: Coupling
) -> None:
    """Union of every producer's channels with the positions they reach."""
    parameter_names = {id(p): (name, axis) for name, (p, axis) in plain.items()}
    done: set[int] = set()  # nodes already reached from another producer
    for module in model.modules():
        kind = kind_of(module)
        if kind is None or "out" not in kind.sides or module not in graph.module2node:
            continue
        key = (names[id(module)], "out")
        start, size = coupling.offsets[key]
        coupling.known.add(key)
        if id(graph.module2node[module]) in ends:
            coupling.poison_all(key, IS_OUTPUT)
        if all(i in done for i in range(start, start + size)):
            continue
        pruner = graph.get_pruner_of_module(module)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                group = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(size)))
        except (ArithmeticError, LookupError, TypeError, AttributeError):
            # A mapping that the graph's author did not foresee, such as a split with a part that is used twice.
            coupling.poison_all(key, "its channels cannot be followed through the operations after it")
            continue
        for item in group.items:
            _couple_item(graph, item, names, parameter_names, ends, coupling, key, done)


def _couple_item(
    graph: Any,
    item: Any,
    names: dict,
    parameter_names: dict,
    ends: set[int],
    coupling: Coupling,
    root: tuple,
    done: set,
) -> None:
    target = item.dep.target
    start, size = coupling.offsets[root]
    roots = [r for r in (item.root_idxs or []) if r is not None and 0 <= r < size]
    pairs = list(zip(item.idxs, roots, strict=True)) if len(roots) == len(item.idxs) else None
    if isinstance(target.module, nn.Parameter):
        name, axis = parameter_names.get(id(target.module), ("", 0))
        owner, _, attribute = name.rpartition(".")
        key: tuple[str, str] | None = (owner, f"param:{axis}:{attribute}")
    elif id(target.module) in names:
        name = names[id(target.module)]
        kind = kind_of(target.module)
        if kind is None:
            reason = f"coupled to {name}: {type(target.module).__name__} layers are not sliced"
            coupling.poison.extend((start + r, reason) for r in roots or range(size))
            return
        is_out = graph.is_out_channel_pruning_fn(item.dep.handler)
        key = (name, "ch" if "ch" in kind.sides else "out" if is_out else "in")
    else:
        key = None  # an operation: its channels are those of the layers around it
    if id(target) in ends and (key is None or key[1] != "in"):
        coupling.poison.extend((start + r, IS_OUTPUT) for r in roots)
    if key is None:
        return
    if key not in coupling.offsets:
        return
    target_start, target_size = coupling.offsets[key]
    coupling.known.add(key)
    if pairs is None or any(not 0 <= p < target_size for p, _ in pairs):
        coupling.poison.extend((start + r, f"its channels cannot be followed to {key[0]}") for r in range(size))
        return
    for position, r in pairs:
        coupling.union(target_start + position, start + r)
        if key[1] == "out":
            done.add(target_start + position)


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
