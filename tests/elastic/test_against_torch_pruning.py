"""The coupled channels that convert finds are those that torch-pruning's DependencyGraph finds, where it knows the layers."""

import pytest
import torch
from torch import nn

from slimkernels import elastic
from tests.elastic.nets import build

NETS = ("resnet20", "resnet50", "mobilenet_v2", "vgg11", "vgg11_bn")

Members = frozenset[tuple[str, str]]  # (module, "in" or "out")


def theirs(net: nn.Module, x: torch.Tensor) -> set[Members]:
    torch_pruning = pytest.importorskip("torch_pruning")
    graph = torch_pruning.DependencyGraph().build_dependency(net, example_inputs=x, verbose=False)
    names = {module: name for name, module in net.named_modules()}
    found = set()
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        members = set()
        for dep, _ in group:
            module = dep.target.module
            if module in names and next(iter(module.parameters(recurse=False)), None) is not None:
                members.add((names[module], "out" if graph.is_out_channel_pruning_fn(dep.handler) else "in"))
        found.add(frozenset(members))
    return found


def ours(net: nn.Module, x: torch.Tensor) -> set[Members]:
    plan = elastic.plan(elastic.convert(net, x, sort=None))
    layers = dict(net.named_modules())
    found = set()
    for group in plan.groups.values():
        members = set()
        for name, side in group.members:
            depthwise = getattr(layers[name], "groups", 1) > 1
            if side != "in" or not depthwise:  # they name a depthwise convolution once
                members.add((name, "in" if side == "in" else "out"))
        found.add(frozenset(members))
    return found


@pytest.mark.parametrize("name", NETS)
def test_couples_the_channels_that_torch_pruning_couples(name):
    net, x = build(name)
    last = [n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-1]
    expected = {group for group in theirs(net, x) if (last, "out") not in group}  # outputs of the network stay full
    assert len(expected) > 1
    assert ours(net, x) == expected
