"""The graph of a plain network for ``deploy``, and which line of it stops the trace where one does."""

import inspect
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict

from slimkernels.nn.attention import AnySizeMultiheadAttention

_OWN = (str(Path(torch.__file__).parent), str(Path(__file__)))


@dataclass
class Traced:
    graph: fx.Graph | None  # None: the whole network runs as it is
    stopped: dict[str, str] = field(default_factory=dict)  # module that runs as it is -> line that stops the trace


class _Tracer(fx.Tracer):
    def __init__(self, opaque: set[str], method: str) -> None:
        super().__init__()
        self.traced_func_name = method
        self.opaque = opaque
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.opaque:
            return True
        return super().is_leaf_module(m, module_qualified_name) or is_torch_layer(m)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) not in (dict, OrderedDict, immutable_dict):
            raise TypeError(f"a {type(a).__name__} would become a dict in a graph")
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise


def is_torch_layer(module: nn.Module) -> bool:
    """A user's subclass of a layer of torch that computes as that layer does; an attention that takes its place."""
    if isinstance(module, AnySizeMultiheadAttention):
        return True
    cls = type(module)
    base: Any = next((b for b in cls.__mro__ if b.__module__.startswith("torch.nn.modules")), nn.Module)
    if base in (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict):
        return False
    return all(getattr(cls, m, None) is getattr(base, m, None) for m in ("forward", "_conv_forward", "__call__"))


def optional_arguments(net: nn.Module, method: str) -> dict[str, Any]:
    """Arguments of a method that may be left out, and what they are then."""
    parameters = inspect.signature(getattr(net, method)).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def trace(net: nn.Module, method: str, left_out: dict[str, Any]) -> Traced:
    """The operations of a method of a network as a graph whose modules are layers of torch, and those that cannot be traced.

    Arguments that are ``left_out`` are the values given here, and none of the graph's.
    """
    opaque: set[str] = set()
    stopped: dict[str, str] = {}
    while True:
        tracer = _Tracer(opaque, method)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # of values of left out arguments that cannot be asserted: they are gone
                graph = tracer.trace(net, left_out)
        # A network is any Python: what it raises on a stand-in for a tensor can be anything. It is put into the report.
        except Exception as error:
            name = tracer.failed or ""
            stopped[name] = _line(error)
            if not name or name in opaque:
                return Traced(None, stopped)
            opaque.add(name)
            continue
        _without(graph, inspect.signature(getattr(type(net), method)).parameters)
        return Traced(graph, stopped)


def _without(graph: fx.Graph, known: Collection[str]) -> None:
    """Take out the placeholders of left out arguments, which have names of their own, and the assertions about them."""
    for node in list(graph.nodes):
        if node.op != "placeholder" or str(node.target).lstrip("*") in known:
            continue
        for user in list(node.users):  # an assertion, or the comparison that one asserts
            for assertion in list(user.users):
                graph.erase_node(assertion)
            graph.erase_node(user)
        graph.erase_node(node)


def _line(error: Exception) -> str:
    """The innermost line of the network's own code, and what was raised there."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_OWN)]
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not own:
        return reason
    frame = own[-1]
    return f"{frame.filename}:{frame.lineno}: {(frame.line or '').strip()} ({reason})"
