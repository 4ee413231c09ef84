"""The fused forward that a training step runs: convolution, batch norm, residual add and activation in one operation.

A network calls them one after another, and each reads and writes its whole input. The forward is traced once with
torch.fx; where a batch norm's output goes only into an activation, or only into a sum and that into an activation,
the traced code calls the norm with both, and with the convolution before it where the norm alone reads that. It reads
modules and parameters from the model when it runs, so only what a trace bakes in is compared before every pass: the
attributes of the modules that call others, and the class of every module. A forward that draws random numbers, makes
constants, changes attributes, or cannot be traced runs as it is; so does a model with hooks on a module that the
traced code would not call.
"""

import contextlib
import operator
import random
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from slimkernels.elastic.parameters import SlicedParameters
from slimkernels.elastic.transform import batch_norms
from slimkernels.nn._base import SlimModule
from slimkernels.ops.activation import activation as apply_activation
from slimkernels.train.conv_norm import conv_norm, is_plain

_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
}
_ADDS = (operator.add, operator.iadd, torch.add)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_KEPT = 64  # traces of a model: one for each combination of depths. One that keeps changing runs as it is


def run_norm(norm: Any, x: Tensor, residual: Any, activation: str) -> Tensor:
    """``activation(norm(x) + residual)``, in one operation unless the sum broadcasts or promotes."""
    if residual is None:
        return norm(x, activation=activation)
    if isinstance(residual, Tensor) and residual.shape == x.shape and residual.dtype == x.dtype:
        return norm(x, residual, activation=activation)
    y = norm(x) + residual
    return y if activation == "none" else apply_activation(y, activation)


def run_conv_norm(conv: Any, norm: Any, x: Tensor, residual: Any, activation: str) -> Tensor:
    """``activation(norm(conv(x)) + residual)``, as one node of autograd where ``conv_norm`` has one."""
    y = conv_norm(conv, norm, x, residual, activation)
    return run_norm(norm, conv(x), residual, activation) if y is None else y


class Untraceable(Exception):
    """The forward does something that a trace would not repeat."""


class _Proxy(fx.Proxy):
    """torch.fx records ``y += x`` as ``y + x``, which is something else where ``y`` has another name."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def _in_place(self, other: Any) -> fx.Proxy:
        raise Untraceable("its forward changes a tensor in place")

    __isub__ = __imul__ = __itruediv__ = __ifloordiv__ = __imod__ = __imatmul__ = __ipow__ = _in_place


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # else what a forward does to a buffer would be done once, by the trace

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, (SlimModule, SlicedParameters))
        return own or super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise Untraceable("its forward has a constant tensor")
        return super().create_arg(a)


class _Traced:
    """A model's traced forward (None when there is none) and what it was traced from."""

    def __init__(self, model: nn.Module) -> None:
        self.repeats = True  # False: running the forward changes what it depends on
        self.state = [(weakref.ref(m), *_state(m)) for m in model.modules() if m is model or not _is_leaf(m)]
        self.modules: list[nn.Module] = []  # that are part of a fused norm: hooks would see something else
        self.run: Callable | None = None

    def fits(self, model: nn.Module) -> bool:
        """Every module that calls others is what it was: from the root on, that is all of them."""
        if not self.repeats:
            return True
        for own, *before in self.state:
            module = own()
            if module is None or [*_state(module)] != before:
                return False
        return self.state[0][0]() is model

    def hooked(self, model: nn.Module) -> bool:
        """Whether a hook would not be called, or would see something else."""
        inlined = any(_hooked(m) for own, *_ in self.state if (m := own()) is not None and m is not model)
        return inlined or any(map(_hooked, self.modules))


_traced: weakref.WeakKeyDictionary[nn.Module, list[_Traced]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def fused_forward(model: nn.Module) -> Iterator[None]:
    """Inside it ``model`` runs its fused forward, if it has one."""
    run = _find(model)
    if run is None:
        yield
        return
    model.__dict__["forward"] = partial(run, model)
    try:
        yield
    finally:
        del model.__dict__["forward"]


def _find(model: nn.Module) -> Callable | None:
    if "forward" in model.__dict__ or model._compiled_call_impl is not None or nn.modules.module._has_any_global_hook():
        return None
    known = _traced.setdefault(model, [])
    found = next((traced for traced in known if traced.fits(model)), None)
    if found is None:
        if len(known) == _KEPT or _Traced(model).hooked(model):  # tracing runs hooks
            return None
        found = _trace(model)
        known.append(found)
    return None if found.run is None or found.hooked(model) else found.run


def _hooked(module: nn.Module) -> bool:
    own = module.__dict__
    return bool(own[_HOOKS[0]] or own[_HOOKS[1]] or own[_HOOKS[2]] or own[_HOOKS[3]])


_leaves: dict[type, bool] = {}
_TORCHS = frozenset(nn.Module().__dict__) - {"training"}


def _is_leaf(module: nn.Module) -> bool:
    kind = type(module)
    if kind not in _leaves:
        _leaves[kind] = _Tracer().is_leaf_module(module, "")
    return _leaves[kind]


def _state(module: nn.Module) -> tuple[type, tuple, dict[str, Any]]:
    """What a trace bakes in of a module that calls others: its class, which modules those are, and its attributes."""
    attributes = {name: _frozen(value) for name, value in module.__dict__.items() if name not in _TORCHS}
    return type(module), tuple((id(m), type(m)) for m in module._modules.values()), attributes


def _frozen(value: Any) -> Any:
    """A number or name as it is, a container by its members, any other object by its identity."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, (tuple, list, set)):
        return type(value).__name__, tuple(_frozen(item) for item in value)
    return id(value)


def _trace(model: nn.Module) -> _Traced:
    traced = _Traced(model)
    norms = batch_norms(model)
    if not norms:
        return traced
    graph = None
    states = torch.get_rng_state(), random.getstate()
    attributes = [(m, dict(m.__dict__)) for m in model.modules() if not _is_leaf(m)]
    with contextlib.suppress(  # the forward needs values: it runs as it is
        Untraceable, fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError
    ):
        graph = _Tracer().trace(model)
    drawn = not torch.equal(states[0], torch.get_rng_state()) or states[1] != random.getstate()
    traced.repeats = not drawn and traced.fits(model)
    if not traced.repeats:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        for module, before in attributes:
            module.__dict__.clear()
            module.__dict__.update(before)
        return traced
    fused = set() if graph is None else _fuse(graph, model, norms)
    if graph is None or not fused:
        return traced
    traced.modules = [model.get_submodule(name) for name in sorted(fused)]
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, f"<fused forward of {type(model).__name__}>", "exec"), scope)
    traced.run = scope["forward"]
    return traced


def _fuse(graph: fx.Graph, model: nn.Module, norms: dict[str, Any]) -> set[str]:
    """Rewrites the graph; returns the names of the modules that are now part of a norm, and of those norms."""
    fused: set[str] = set()
    for node in list(graph.nodes):
        norm = norms.get(node.target) if node.op == "call_module" else None
        if norm is None or norm.activation != "none" or len(node.args) != 1 or node.kwargs or not node.users:
            continue
        last, residual = node, None
        following = next(iter(node.users)) if len(node.users) == 1 else node
        if _is_add(following):
            last, residual = following, next(a for a in following.args if a is not node)
            following = next(iter(last.users)) if len(last.users) == 1 else last
        activation = _activation(following, model) if following is not last else "none"
        if activation != "none":
            last = following
            if last.op == "call_module":
                fused.add(str(last.target))
        conv = _conv_before(node, last, model)
        if last is node and conv is None:
            continue
        fused |= {str(n.target) for n in (conv, node) if n is not None}
        # The modules themselves: finding them by name in every pass costs more than calling them. A trace fits as long as
        # they are the model's.
        if conv is None:
            run, x = partial(run_norm, norm), node.args[0]
        else:
            run, x = partial(run_conv_norm, model.get_submodule(str(conv.target)), norm), conv.args[0]
        run.__name__ = "norm" if conv is None else "conv_norm"  # type: ignore[attr-defined]
        with graph.inserting_before(last):
            new = graph.call_function(run, (x, residual, activation))
        last.replace_all_uses_with(new)
        for old in _between(conv or node, last):
            graph.erase_node(old)
    return fused


def _conv_before(norm: fx.Node, last: fx.Node, model: nn.Module) -> fx.Node | None:
    """The convolution that only ``norm`` reads, if it may run where ``last`` does: nothing between the two changes a
    tensor in place."""
    conv = norm.args[0]
    if not isinstance(conv, fx.Node) or conv.op != "call_module" or len(conv.users) != 1:
        return None
    module = model.get_submodule(str(conv.target))
    if not is_plain(module, model.get_submodule(str(norm.target))) or len(conv.args) != 1 or conv.kwargs:
        return None
    chain, node = _between(conv, last), conv
    while node is not last:
        node = node.next
        if node not in chain and _changes_in_place(node, model):
            return None
    return conv


def _changes_in_place(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    in_place = name.endswith("_") or node.target is operator.iadd or "out" in node.kwargs
    return node.op in ("call_method", "call_function") and (in_place or bool(node.kwargs.get("inplace", False)))


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The chain of single users from ``last`` back to ``first``."""
    chain = [first]
    while chain[-1] is not last:
        chain.append(next(iter(chain[-1].users)))
    return chain[::-1]


def _is_add(node: fx.Node) -> bool:
    """The sum of two different values, neither changed in place where another operation sees it."""
    plain = node.op == "call_function" and node.target in _ADDS and not node.kwargs
    method = node.op == "call_method" and node.target in ("add", "add_") and not node.kwargs
    nodes = [a for a in node.args if isinstance(a, fx.Node)]
    if not (plain or method) or not len(node.args) == len(nodes) == 2 or nodes[0] is nodes[1]:
        return False
    return node.target not in (operator.iadd, "add_") or len(nodes[0].users) == 1


def _activation(node: fx.Node, model: nn.Module) -> str:
    """The activation that the node applies, "none" when it is another operation."""
    if node.op == "call_module":
        return _MODULES.get(type(model.get_submodule(str(node.target))), "none")
    if node.op != "call_function" or len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return "none"
    return _FUNCTIONS.get(node.target, "none")
