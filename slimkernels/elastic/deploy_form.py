"""A graph rewritten for inference: fused operations in segments, the rest as it was. Made once, for all widths."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from slimkernels.elastic.deploy_ops import IMAGE, LINE, ROWS, Op, as_op, is_skipped

WITH_WEIGHTS = ("conv", "linear", "affine")
_LASTING = ("conv", "linear", "affine", "max_pool", "avg_pool", "global_pool")  # worth a segment of their own


@dataclass(frozen=True)
class Step:
    """An operation on numbered values; what ``Segment`` runs."""

    kind: str
    inputs: tuple[int, ...]
    output: int
    residual: int
    activation: str
    numbers: tuple[int, ...]
    rank: int  # of the inputs: 4 or 3 for images, 0 for rows
    module: str
    norm: str
    node: str  # name in the graph

    @property
    def fused(self) -> str:
        """What runs as one, in words."""
        parts = [self.kind, "batch norm" if self.norm else "", "add" if self.residual >= 0 else ""]
        parts.append(self.activation if self.activation != "none" and self.kind != "activation" else "")
        if self.kind == "activation":
            parts[0] = self.activation
        return " + ".join(part for part in parts if part)


@dataclass(frozen=True)
class SegmentForm:
    steps: tuple[Step, ...]
    ranks: tuple[int, ...]  # of the inputs: 4 or 3 for images, 0 for rows
    outputs: tuple[int, ...]


@dataclass
class Form:
    """The rewritten network: ``run(root, *inputs)``, where ``root`` has the modules of one width and its segments."""

    run: Callable[..., Any]
    segments: list[SegmentForm]
    modules: list[str]  # that PyTorch runs as they are
    attributes: list[str]  # parameters and buffers that are read outside of a layer
    others: list[str]  # operations that PyTorch runs, for the report


def make_form(graph: fx.Graph, root: nn.Module, apart: set[str]) -> Form:
    """Fuse and cut a traced graph. ``apart`` are nodes that PyTorch has to run (see ``DeployMisfit``)."""
    copied = fx.Graph()
    result = copied.graph_copy(graph, {}, return_output_node=True)
    assert isinstance(result, tuple)
    copied.output(result[0])
    _functional(copied, root)
    _drop_idle(copied, root)
    apart = set(apart)
    while True:
        fused = _fuse(copied, root, apart)
        levels = _levels(copied, fused)
        alone = _without_work(fused.ops, levels)
        if not alone:
            return _assemble(copied, root, fused, levels)
        apart |= alone


def _functional(graph: fx.Graph, root: nn.Module) -> None:
    """Whoever reads a value after it was changed in place reads the changed one."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not node.args or not isinstance(node.args[0], fx.Node):
            continue
        name = str(node.target)
        in_place = node.kwargs.get("inplace") is True or node.target in (operator.iadd, operator.isub, operator.imul)
        if node.op == "call_module":
            in_place = getattr(root.get_submodule(name), "inplace", False) is True
        if node.op == "call_method":
            in_place = name.endswith("_") and not name.endswith("__")
        if in_place:
            later = [user for user in node.args[0].users if order[user] > order[node]]
            for user in later:
                user.replace_input_with(node.args[0], node)


def _drop_idle(graph: fx.Graph, root: nn.Module) -> None:
    """Take out layers that give back their input, and what nobody reads."""
    for node in list(graph.nodes):
        if node.op == "call_module" and node.args and is_skipped(root.get_submodule(str(node.target))):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


@dataclass
class _Fused:
    """Operations of ours by the node whose value they compute, in the order of the graph."""

    ops: dict[fx.Node, Op]
    into: dict[fx.Node, fx.Node]  # fused nodes, whose value nobody computes, to the node they were fused into

    def reader(self, user: fx.Node) -> fx.Node:
        while user in self.into:
            user = self.into[user]
        return user


def _fuse(graph: fx.Graph, root: nn.Module, apart: set[str]) -> _Fused:
    made: dict[fx.Node, Op] = {}
    into: dict[fx.Node, fx.Node] = {}
    ranks: dict[fx.Node, int] = {}
    for node in graph.nodes:
        op = None if node.name in apart else as_op(node, root)
        if op is None or not _rank(op, ranks):
            continue
        assert op.rank is not None
        taken = _fused_into(op, made)
        if taken is not None:
            del made[taken.node]
            into[taken.node] = node
            taken.node, op = node, taken
        assert op.rank is not None
        ranks[node] = op.rank
        made[node] = op  # last: where its value is computed now
    return _Fused(made, into)


def _rank(op: Op, ranks: dict[fx.Node, int]) -> bool:
    """Find out what the output is; False when that cannot be known, or is nothing that we run."""
    known = [ranks[x] for x in op.reads if x in ranks]
    if any(r != (op.input_rank if op.input_rank is not None else known[0]) for r in known):
        return False
    rank = op.input_rank if op.input_rank is not None else known[0] if known else None
    if rank is None:
        return False
    op.input_rank = rank
    if op.kind == "flatten" and rank == ROWS:
        return False
    if op.kind == "cat":
        dim, dimensions = op.numbers[0], rank
        if rank == ROWS or (dim if dim >= 0 else dim + dimensions) not in (1, dimensions - 1):
            return False
        op.numbers = [0 if dim % dimensions == 1 else 1]
    if op.rank is None:
        op.rank = rank
    return True


def _fused_into(op: Op, made: dict[fx.Node, Op]) -> Op | None:
    """The operation that takes this one in, changed so that it does."""

    def open_for(x: fx.Node) -> Op | None:
        found = made.get(x)
        ends_here = len(x.users) == 1 and found is not None and found.activation == "none"
        return found if ends_here and found is not None and found.kind in WITH_WEIGHTS else None

    x = op.inputs[0]
    found = open_for(x)
    foldable = found is not None and found.kind != "affine" and found.residual is None and not found.norm
    if op.kind == "affine" and found is not None and foldable:
        found.norm = op.module
        return found
    if op.kind == "activation":
        adds = made.get(x)
        if (
            found is None
            and adds is not None
            and adds.kind == "add"
            and adds.activation == "none"
            and len(x.users) == 1
        ):
            found = adds
        if found is not None:
            found.activation = op.activation
            return found
    if op.kind == "add" and op.inputs[0] is not op.inputs[1]:
        order = list(made)
        ready = [(order.index(a), a, b) for a, b in (op.inputs, op.inputs[::-1]) if open_for(a) is not None]
        for _, a, b in sorted(ready, key=lambda item: -item[0]):
            taken = open_for(a)
            if taken is not None and taken.residual is None:
                taken.residual = b
                return taken
    return None


def _levels(graph: fx.Graph, fused: _Fused) -> dict[fx.Node, int]:
    """Number of the segment that a node is in or, for others, comes after: as few segments as can be."""
    ops = fused.ops
    levels: dict[fx.Node, int] = {}
    in_order = any(_writes(node) for node in graph.nodes if node not in ops and node not in fused.into)
    running, ours = (
        0,
        False,
    )  # where nodes keep their order: that of the last one, and whether it was an operation of ours
    for node in graph.nodes:
        if node in fused.into:
            continue
        op = ops.get(node)
        if op is not None:
            found = max(levels[x] + (x not in ops) for x in op.reads)
        else:
            found = max((levels[x] for x in node.all_input_nodes), default=0)
        if in_order and node.op not in ("placeholder", "get_attr"):
            found = running = max(found, running + (op is not None and not ours))
            ours = op is not None
        levels[node] = found
    return levels


def _writes(node: fx.Node) -> bool:
    """Whether a node that PyTorch runs may change a value in place."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    return node.target in (operator.iadd, operator.isub, operator.imul, operator.setitem)


def _without_work(ops: dict[fx.Node, Op], levels: dict[fx.Node, int]) -> set[str]:
    """Nodes of segments that would only copy and add."""
    lasting = {levels[node] for node, op in ops.items() if op.kind in _LASTING}
    return {node.name for node in ops if levels[node] not in lasting}


def _assemble(graph: fx.Graph, root: nn.Module, fused: _Fused, levels: dict[fx.Node, int]) -> Form:
    ops = fused.ops
    made, values = fx.Graph(), dict[fx.Node, fx.Node]()
    segments: list[SegmentForm] = []
    others: list[str] = []
    output = next(node for node in graph.nodes if node.op == "output")
    for level in range(max(levels.values(), default=0) + 1):
        own = {node: op for node, op in ops.items() if levels[node] == level}
        if own:
            _add_segment(made, values, segments, own, fused)
        for node in graph.nodes:
            if node in fused.into or node in ops or levels[node] != level or node is output:
                continue
            values[node] = made.node_copy(node, lambda x: values[x])
            if node.op in ("call_module", "call_function", "call_method") and not _is_index(node):
                others.append(str(getattr(node.target, "__name__", node.target)))
            if node.op == "call_method" and node.target == "view":
                values[node].target = "reshape"  # our images have their channels side by side
    made.output(fx.map_arg(output.args[0], lambda x: values[x]))
    made.lint()
    holder = fx.GraphModule(_Holder(root, made), made)
    modules = [str(n.target) for n in made.nodes if n.op == "call_module" and not str(n.target).startswith("_segment")]
    attributes = [str(n.target) for n in made.nodes if n.op == "get_attr"]
    return Form(type(holder).forward, segments, modules, attributes, others)


def _is_index(node: fx.Node) -> bool:
    return node.target is operator.getitem or node.target is getattr


class _Holder(dict):
    """What a GraphModule looks up while its code is made: any name there is, but for the modules themselves."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        for node in graph.nodes:
            if node.op == "call_module":
                self[str(node.target)] = nn.Identity()
            elif node.op == "get_attr":
                at: Any = root
                for part in str(node.target).split("."):
                    at = getattr(at, part)
                self[str(node.target)] = at


def _add_segment(
    made: fx.Graph,
    values: dict[fx.Node, fx.Node],
    segments: list[SegmentForm],
    own: dict[fx.Node, Op],
    fused: _Fused,
) -> None:
    inputs: list[tuple[fx.Node, int]] = []
    for op in own.values():
        for x in op.reads:
            assert op.input_rank is not None
            rank = op.input_rank if x is not op.residual else op.rank
            assert rank in (IMAGE, LINE, ROWS)
            if x not in own and (x, rank) not in inputs:
                inputs.append((x, rank))
    numbers: dict[Any, int] = {key: i for i, key in enumerate(inputs)}
    steps: list[Step] = []
    for node, op in own.items():

        def number(x: fx.Node, rank: int | None) -> int:
            return numbers[x] if x in own else numbers[x, rank]

        read = tuple(number(x, op.input_rank) for x in op.inputs)
        residual = -1 if op.residual is None else number(op.residual, op.rank)
        numbers[node] = len(inputs) + len(steps)
        assert op.input_rank is not None
        steps.append(
            Step(
                kind=op.kind,
                inputs=read,
                output=numbers[node],
                residual=residual,
                activation=op.activation,
                numbers=tuple(op.numbers),
                rank=op.input_rank,
                module=op.module,
                norm=op.norm,
                node=node.name,
            )
        )
    leaving = [node for node in own if any(fused.reader(user) not in own for user in node.users)]
    form = SegmentForm(tuple(steps), tuple(rank for _, rank in inputs), tuple(numbers[n] for n in leaving))
    called = made.call_module(f"_segment{len(segments)}", tuple(values[x] for x, _ in inputs))
    segments.append(form)
    for i, node in enumerate(leaving):
        values[node] = made.call_function(operator.getitem, (called, i))


def only_used(root: nn.Module, form: Form) -> nn.Module:
    """A tree with the modules and tensors that PyTorch still runs, under their names."""
    held = nn.Module()
    for name in [*form.modules, *form.attributes]:
        *path, last = name.split(".")
        source, target = root, held
        for part in path:
            source = source.get_submodule(part)
            if part not in target._modules:
                target.add_module(part, nn.Module())
            target = target.get_submodule(part)
        if last in source._modules:
            target._modules[last] = source._modules[last]
        elif last in source._parameters:
            target._parameters[last] = source._parameters[last]
        elif last in source._buffers:
            target._buffers[last] = source._buffers[last]
        else:
            setattr(target, last, getattr(source, last))
    return held
