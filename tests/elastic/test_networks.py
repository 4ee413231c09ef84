"""Every network at full, half and mixed width, against the plain network it was made of."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slimkernels import elastic
from slimkernels.elastic.slices import masked
from tests.elastic.nets import NETS, build
from tests.helpers import error

WHOLE = set(NETS) - {"shufflenet_v2"}  # networks of which nothing is left alone


def converted(name: str, **kwargs):
    net, x = build(name)
    return net, elastic.convert(net, x, **({"divisor": 4} | kwargs)), x


@pytest.mark.parametrize("name", NETS)
def test_full_width_computes_the_same_function_and_gradients(name):
    net, x = build(name)
    for sort in (None, "l1"):
        model = elastic.convert(net, x, divisor=4, sort=sort)
        assert type(model) is type(net) or isinstance(model, type(net))
        assert list(net.state_dict()) == [k for k in model.state_dict() if ".calibrated." not in k]
        for m in (net, model):
            m.zero_grad()
            m(x).square().sum().backward()
        assert error(model(x), net(x)) < (1e-6 if sort is None else 2e-5)
        if sort is None:
            for (key, p), q in zip(net.named_parameters(), model.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), key
                if p.grad is not None:
                    assert error(q.grad, p.grad) < 1e-4, key


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_narrow_is_the_full_network_without_the_inactive_channels(name):
    net, model, x = converted(name, sort=None)
    known = elastic.plan(model)
    for width in (0.5, 0.7, {next(iter(known.groups)): 0.25}):
        with masked(net, known.dims, known.units("", width)):
            expected = net(x)
        with elastic.width(model, width):
            assert error(model(x), expected) < 2e-5
    assert torch.equal(model(x), elastic.convert(net, x, sort=None, divisor=4)(x))


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_whole_network_is_slimmed(name):
    _, model, _ = converted(name)
    alone = elastic.report(model).left_alone
    if name in WHOLE:
        assert not alone
    full, half = elastic.cost(model, 1.0), elastic.cost(model, 0.5)
    assert half.macs < full.macs
    assert half.params < full.params


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_extract_and_cost(name):
    _, model, x = converted(name)
    groups = list(elastic.plan(model).groups)
    for width in (1.0, 0.5, 0.3, {groups[0]: 0.5, groups[-1]: 0.25}):
        plain = elastic.extract(model, width)
        for module in plain.modules():
            assert not type(module).__module__.startswith(("slimkernels.nn", "slimkernels.elastic"))
            assert not {"_width", "in_index", "_elastic", "_plain_attributes"} & module.__dict__.keys()
        with elastic.width(model, width):
            assert error(model(x), plain(x)) < 5e-6
        with FlopCounterMode(display=False) as counter:
            plain(x)
        counted = sum(
            flops
            for op, flops in counter.get_flop_counts()["Global"].items()
            if "attention" not in str(op) and "bmm" not in str(op)
        )
        cost = elastic.cost(model, width)
        assert cost.params == sum(p.numel() for p in plain.parameters())
        assert cost.macs == counted // 2


@torch.no_grad()
def test_extracted_state_loads_into_a_network_built_at_that_width():
    from slimkernels import models

    net = models.CifarResNet(20, (16, 32, 64), option="B").eval()
    x = torch.randn(2, 3, 16, 16)
    model = elastic.convert(net, x)
    narrow = models.CifarResNet(20, (8, 16, 32), option="B").eval()
    plain = elastic.extract(model, 0.5)
    narrow.load_state_dict(plain.state_dict())
    assert torch.equal(narrow(x), plain(x))


def test_the_original_stays_as_it_was():
    net, x = build("resnet20")
    before = copy.deepcopy(net.state_dict())
    elastic.convert(net, x)
    assert not any("Slim" in type(m).__name__ for m in net.modules())
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[key])
