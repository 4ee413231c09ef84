"""Whole numbers that a network keeps of its sizes and writes into its forward."""

import pickle

import pytest
import torch
from torch import nn

from slimkernels import elastic
from slimkernels.elastic import probe
from tests.elastic.handwritten_forwards import Net
from tests.elastic.nets import perturbed
from tests.helpers import error


def one(net, x):
    return net.out(net.m(net.a(x).view(-1, net.size)))


class Fold(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.unused = size, size

    def forward(self, x):
        return x.reshape(-1, self.size)


def two(net, x):
    return net.out(net.m(net.fold(net.a(x)).view(-1, net.size)))


def written(net, x):
    return net.out(net.m(net.a(x).view(-1, 16)))


def mlp():
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))


def build(forward, rows=6, **members):
    return perturbed(lambda: Net(forward, a=nn.Linear(6, 16), m=mlp(), out=nn.Linear(8, 3), **members), (rows, 6))


NETS = {
    "one": (one, {"size": 16, "classes": 16, "flag": True}, {"size"}),
    "two": (two, {"size": 16, "fold": Fold(16)}, {"size", "fold.size", "fold.unused"}),
}


@pytest.mark.parametrize("rows", [5, 6])
@pytest.mark.parametrize("name", NETS)
def test_they_follow_the_width(name, rows, tmp_path):
    forward, members, follow = NETS[name]
    net, x = build(forward, rows, **members)
    model = elastic.convert(net, x, divisor=4, sort=None)
    assert set(elastic.plan(model).groups) == {"a", "m.0", "m.2"}
    (note,) = elastic.report(model).notes
    assert note.startswith("numbers that the network keeps of its sizes follow the width: ")
    assert set(note.partition(": ")[2].split(", ")) == follow
    assert not elastic.report(model).left_alone
    assert error(model(x), net(x)) < 1e-6
    elastic.save(model, tmp_path / "net.safetensors")
    others = [pickle.loads(pickle.dumps(model)), elastic.view(model, 1.0)]
    others.append(elastic.load(tmp_path / "net.safetensors", build(forward, **members)[0]))
    deployed = elastic.deploy(model)
    for width in (1.0, 0.5, 0.25, {"a": 0.5}):
        plain = elastic.extract(model, width)
        assert plain.size == plain.a.out_features
        assert type(plain) is Net
        deployed.set_width(width)
        with torch.no_grad():
            assert error(deployed(x), plain(x)) < 2e-6
        for other in (model, *others):
            with elastic.width(other, width):
                assert other.size == plain.size
                assert error(other(x), plain(x)) < 1e-6
    assert model.size == net.size == 16
    if name == "one":
        assert plain.classes == 16
    model.size = 12  # as an attribute of any module
    assert elastic.extract(model, 1.0).size == 16
    with pytest.raises(ValueError, match="is of another model: expected '' with 16"):
        elastic.load(tmp_path / "net.safetensors", build(forward, **members | {"size": 15})[0])


@pytest.mark.parametrize(("rows", "reason"), [(5, "does not run when it is narrower"), (6, "output of shape (3, 3)")])
@torch.no_grad()
def test_what_does_not_run_with_them_stays(rows, reason):
    net, x = build(written, rows, size=16)
    model = elastic.convert(net, x, divisor=4)
    assert set(elastic.plan(model).groups) == {"m.0", "m.2"}
    assert reason in elastic.report(model).left_alone["a"]
    assert not elastic.report(model).notes
    assert type(model) is Net
    with elastic.width(model, 0.5):
        assert error(model(x), elastic.extract(model, 0.5)(x)) < 1e-6
    assert elastic.extract(model, 0.5).size == 16


@torch.no_grad()
def test_each_trial_in_float64_has_the_numbers_of_that_trial(monkeypatch):
    monkeypatch.setattr(probe, "_TOLERANCE", 0.0)  # nothing is exact enough in float32
    net, x = build(two, size=16, fold=Fold(16))
    assert set(elastic.plan(elastic.convert(net, x, divisor=4)).groups) == {"a", "m.0", "m.2"}
