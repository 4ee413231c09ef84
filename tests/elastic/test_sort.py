"""Sorting permutes, and puts the important channels first."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimkernels import elastic
from slimkernels.elastic.plan import Dim, Run
from slimkernels.elastic.slices import inverse, order_of
from tests.elastic.nets import NETS, build
from tests.helpers import error


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_random_order_computes_the_same_function(name):
    net, x = build(name)
    model = elastic.convert(net, x, divisor=4, sort="random")
    assert error(model(x), net(x)) < 2e-5
    changed = [key for key, p in net.named_parameters() if not torch.equal(p, model.get_parameter(key))]
    assert changed


@pytest.mark.parametrize("sort", ["l1", "l2", "bn", "taylor", "random"])
@torch.no_grad()
def test_criteria_keep_the_function(sort):
    net, x = build("resnet20")
    batches = [(torch.randn_like(x), torch.tensor([1, 2])) for _ in range(2)]
    model = elastic.convert(net, x, divisor=4, sort=sort, batches=iter(batches), loss_fn=F.cross_entropy)
    assert error(model(x), net(x)) < 2e-5
    assert all(p.grad is None for p in model.parameters())


def two_layers() -> nn.Sequential:
    """Hidden units of which a few matter: 3, 9 and 12 of 16."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        for layer in (net[0].weight, net[1].weight, net[3].weight.T):
            keep = torch.full((16,), 0.1)
            keep[[3, 9, 12]] = torch.tensor([3.0, 2.0, 1.0])
            layer.mul_(keep.view(-1, *[1] * (layer.dim() - 1)))
    return net


@pytest.mark.parametrize("sort", ["l1", "l2", "bn", "taylor"])
def test_criteria_find_what_matters(sort):
    net, x = two_layers(), torch.randn(64, 6)
    batches = [(x, torch.randint(4, (64,)))]
    model = elastic.convert(net, x, divisor=1, widths=(0.1, 1.0), sort=sort, batches=batches, loss_fn=F.cross_entropy)
    kept = {tuple(row.tolist()) for row in model[0].weight[:3]}
    assert kept == {tuple(net[0].weight[i].tolist()) for i in (3, 9, 12)}


def test_own_scores_and_none():
    net, x = two_layers(), torch.randn(8, 6)
    model = elastic.convert(net, x, divisor=1, sort={"0": torch.arange(16)})
    assert torch.equal(model[0].weight, net[0].weight.flip(0))
    assert torch.equal(model[1].running_mean, net[1].running_mean.flip(0))
    assert torch.equal(model[3].weight, net[3].weight.flip(1))
    model = elastic.convert(net, x, divisor=1, sort=None)
    assert torch.equal(model[0].weight, net[0].weight)


def test_groups_without_batch_norm_are_noted():
    net = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 3))
    model = elastic.convert(net, torch.randn(2, 6), sort="bn")
    assert elastic.report(model).notes == ["sorted by l1, as they have no batch norm: 0"]


def test_taylor_without_batches_raises():
    net, x = two_layers(), torch.randn(8, 6)
    with pytest.raises(ValueError, match="expected at least one batch"):
        elastic.convert(net, x, sort="taylor", batches=[], loss_fn=F.cross_entropy)


def test_order_of_positions():
    dim = Dim("m", "in", (Run("a", 4, 2), Run(None, 1), Run("b", 3, 1)))
    order = order_of(dim, {"a": [1, 0], "b": [2, 0, 1]})
    assert order == [2, 3, 0, 1, 4, 7, 5, 6]
    assert inverse(inverse(order)) == order
    assert dim.positions({"a": 1, "b": 2}) == [0, 1, 4, 5, 6]
