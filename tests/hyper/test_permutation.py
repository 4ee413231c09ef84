"""Smooth orders of channels: the same function, less variation, the same order every time."""

import itertools

import pytest
import torch

from slimkernels import elastic, hyper
from slimkernels.hyper import permutation
from slimkernels.models import CifarResNet, DigitCNN
from tests.elastic import nets


def shuffled():
    """A digit network whose channels are smooth functions of their position, in a random order."""
    torch.manual_seed(0)
    net = DigitCNN((16, 16, 16), 16)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 4:
                at = torch.linspace(0, 3, p.shape[0])[:, None, None, None]
                p.copy_(torch.sin(at + torch.randn(1, *p.shape[1:])))
    x = torch.randn(2, 1, 28, 28)
    return elastic.convert(net, x, sort="random", divisor=1), x


@pytest.mark.parametrize("method", ["path", "importance"])
@pytest.mark.parametrize("name", ["resnet20", "densenet", "shufflenet_v2", "mobilenet_v2"])
def test_same_function(method, name):
    net, x = nets.build(name)
    model = elastic.convert(net, x, sort="random", divisor=1, norm="universal")
    with torch.no_grad():
        expected = model(x)
        done = hyper.smooth_permutation(model, method)
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert done.orders.keys() == elastic.plan(model).groups.keys()
    assert any(order != list(range(len(order))) for order in done.orders.values())


def test_path_makes_weights_smoother():
    model, _ = shuffled()
    dims = elastic.plan(model).dims
    before = permutation.total_variation(permutation.sliced_tensors(model, dims))
    done = hyper.smooth_permutation(model)
    after = permutation.total_variation(permutation.sliced_tensors(model, dims))
    assert (done.before, done.after) == (before, after)
    assert done.after < 0.8 * done.before


def test_path_is_deterministic_and_can_be_given():
    models = [shuffled()[0] for _ in range(3)]
    torch.manual_seed(123)
    first, second = (hyper.smooth_permutation(m) for m in models[:2])
    assert first == second
    assert hyper.smooth_permutation(models[2], orders=first.orders).orders == first.orders
    states = [m.state_dict() for m in models]
    assert all(torch.equal(states[0][key], s[key]) for s in states[1:] for key in s)


@pytest.mark.parametrize("seed", range(5))
def test_path_is_nearly_the_shortest(seed):
    features = torch.randn(7, 4, generator=torch.Generator().manual_seed(seed)).double()
    distance = torch.cdist(features, features, p=1)
    best = min(permutation._length(distance, list(p)) for p in itertools.permutations(range(7)))
    path = permutation._path(features)
    assert sorted(path) == list(range(7))
    assert permutation._length(distance, path) <= 1.08 * best


def test_permutation_is_kept_in_the_generators_checkpoint():
    model, x = shuffled()
    done = hyper.smooth_permutation(model)
    gen = hyper.WeightGenerator(model, hidden=8, layers=2).eval()
    fresh = hyper.WeightGenerator(shuffled()[0], hidden=8, layers=2).eval()
    fresh.load_state_dict(gen.state_dict())
    assert torch.equal(fresh.call(x, 0.5), gen.call(x, 0.5))
    assert fresh.get_extra_state()["permutation"]["orders"] == done.orders


def test_errors():
    model, _ = shuffled()
    with pytest.raises(ValueError, match="expected method to be one of path, importance, got 'tsp'"):
        hyper.smooth_permutation(model, "tsp")
    with pytest.raises(ValueError, match="expected orders of width dimensions, got 'x'"):
        hyper.smooth_permutation(model, orders={"x": [0]})
    with pytest.raises(ValueError, match="expected a permutation of 16 units"):
        hyper.smooth_permutation(model, orders={next(iter(elastic.plan(model).groups)): [0]})
    net = CifarResNet(20, (8, 8, 8)).eval()
    switchable = elastic.convert(net, torch.randn(1, 3, 8, 8), widths=[0.5, 1.0], norm="switchable")
    with pytest.raises(ValueError, match="expected batch norms without statistics per width, got 'bn1'"):
        hyper.smooth_permutation(switchable)
