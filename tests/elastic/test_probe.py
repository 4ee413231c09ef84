"""The trial of width dimensions, and operations in forms that the trace does not know."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from slimkernels import elastic
from slimkernels.elastic.flow import Follower
from slimkernels.elastic.probe import Prober
from tests.elastic.test_flow import Net, mlp
from tests.helpers import error


def grouped_queries(net, x):
    q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (net.q, net.k, net.v))
    mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    x = x + net.o(mixed.transpose(1, 2).flatten(2))
    rows = x.to(torch.float32)  # an operation of its own in float64 only, where a first trial in float32 was not exact
    return net.m((rows * (rows.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype))


def grouped_query_net():
    return Net(
        grouped_queries, q=nn.Linear(16, 16), k=nn.Linear(16, 8), v=nn.Linear(16, 8), o=nn.Linear(16, 16), m=mlp(16, 24)
    )


@pytest.mark.parametrize("broken", [False, True])
@torch.no_grad()
def test_attention_with_fewer_heads_of_keys(broken, monkeypatch):
    """Also where a rule fails on a form of an operation that it does not know: what reaches it stays, the rest slims."""
    if broken:
        monkeypatch.setattr(Follower, "_attention", lambda self, made, q, k, v: self._known(v))  # of another shape
    net, x = grouped_query_net().eval(), torch.randn(2, 5, 16)
    model = elastic.convert(net, x, divisor=4)
    assert "m.0" in elastic.plan(model).groups
    assert error(model(x), net(x)) < 1e-5
    with elastic.width(model, 0.25):
        assert error(model(x), elastic.extract(model, 0.25)(x)) < 5e-6
    if broken:
        assert "is not followed" in elastic.report(model).left_alone["v"]


def in_order(net, x):
    for i in range(6):
        x = getattr(net, f"b{i}")(getattr(net, f"a{i}")(x).cumsum(-1))
    return net.m(x)


@torch.no_grad()
def test_what_fails_in_many_equal_blocks_is_not_tried_in_each(monkeypatch):
    tried = []
    wrong = Prober._wrong
    monkeypatch.setattr(
        Prober, "_wrong", lambda self, names, fractions: tried.append(names) or wrong(self, names, fractions)
    )
    layers = {f"a{i}": nn.Linear(8, 16) for i in range(6)} | {f"b{i}": nn.Linear(16, 8) for i in range(6)}
    net, x = Net(in_order, m=mlp(8, 24), **layers).eval(), torch.randn(5, 8)
    model = elastic.convert(net, x, divisor=4)
    assert set(elastic.plan(model).groups) == {"m.0", *(f"b{i}" for i in range(6))}
    assert "seen in a0, a3, a5" in elastic.report(model).left_alone["a1"]
    assert not any(names in (["a1"], ["a2"], ["a4"]) for names in tried)
    with elastic.width(model, 0.25):
        assert error(model(x), elastic.extract(model, 0.25)(x)) < 5e-6
