"""Inside a module that cannot be traced: it runs its own code, and the layers and modules that it calls are deployed each
by itself.

The modules stay where they are, with their type, attributes and hooks: only their ``forward`` is replaced.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from slimkernels.elastic.deploy_trace import is_torch_layer

WORK = (nn.Linear, nn.modules.conv._ConvNd)


def deploy_inside(module: nn.Module, prefix: str, make: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """Replace the ``forward`` of what ``module`` holds by ``make(submodule)``; returns what was made, by name."""
    found: dict[str, Any] = {}
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if "forward" in child.__dict__ or not any(isinstance(m, WORK) for m in child.modules()):
            continue  # a forward of the user's own, or nothing to gain
        parameters = inspect.signature(child.forward).parameters.values()
        if type(child) in (nn.ModuleList, nn.ModuleDict) or any(p.kind is p.VAR_POSITIONAL for p in parameters):
            found |= deploy_inside(child, path, make)
        elif not is_torch_layer(child) or isinstance(child, WORK):
            found[path] = child.__dict__["forward"] = make(child)
    return found


def restore(module: nn.Module, kind: type, but: nn.Module) -> None:
    """Give all in ``module`` its own ``forward`` back where an object of ``kind`` took its place, ``but`` excepted."""
    for each in module.modules():
        if each is not but and isinstance(each.__dict__.get("forward"), kind):
            del each.__dict__["forward"]
