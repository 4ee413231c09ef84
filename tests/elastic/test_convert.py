"""What convert takes, what it leaves alone and says about it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimkernels import elastic
from slimkernels.nn import SlimConv2d, SlimLinear
from tests.elastic.nets import build
from tests.helpers import error


def conv_net(*middle: nn.Module, channels: int = 16) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), *middle, nn.Conv2d(channels, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5)
    ).eval()


IMAGE = (2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def check(net: nn.Module, x: torch.Tensor, **kwargs) -> nn.Module:
    """Converts; full width as before, half width as extracted."""
    net.eval()
    model = elastic.convert(net, x, **({"divisor": 2} | kwargs))
    with torch.no_grad():
        assert error(model(x), net(x)) < 1e-5
        with elastic.width(model, 0.5):
            assert error(model(x), elastic.extract(model, 0.5)(x)) < 1e-5
    return model


def test_classes_change_and_objects_attributes_hooks_and_flags_stay():
    net = conv_net(nn.ReLU())
    net[0].note = "mine"
    net[0].weight.requires_grad_(False)
    net[0].train()
    calls = []
    handle = net[0].register_forward_hook(lambda *_: calls.append(1))
    before = {name: id(p) for name, p in net.named_parameters()}
    conv, x = net[0], torch.randn(IMAGE)
    model = elastic.convert(net, x, inplace=True, sort=None)
    assert model is net
    assert net[0] is conv
    assert type(conv) is SlimConv2d
    assert conv.note == "mine"
    assert conv.training
    assert not conv.weight.requires_grad
    assert before == {name: id(p) for name, p in net.named_parameters()}
    calls.clear()
    model(x)
    assert calls == [1]
    handle.remove()
    model(x)
    assert calls == [1]


def test_deepcopy_and_pickle_of_an_elastic_model():
    net, x = build("convnext")
    model = elastic.convert(net, x, divisor=4)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        elastic.set_width(copied, 0.5)
        assert elastic.plan(model).current == 1.0
        with elastic.width(model, 0.5), torch.no_grad():
            assert torch.equal(copied(x), model(x))


def test_plain_parameters_follow_the_width():
    net, x = build("convnext")
    model = elastic.convert(net, x, divisor=4)
    block = model.features[1][0]
    assert isinstance(block, type(net.features[1][0]))
    assert isinstance(block._parameters["layer_scale"], nn.Parameter)
    with elastic.width(model, 0.5):
        assert block.layer_scale.shape == (8, 1, 1)
        model(x).sum().backward()
    grad = block._parameters["layer_scale"].grad
    assert grad[:8].abs().min() > 0
    assert not grad[8:].any()


def test_prelu_and_group_norm():
    check(conv_net(nn.BatchNorm2d(16), nn.PReLU(16)), torch.randn(IMAGE))
    model = check(conv_net(nn.GroupNorm(4, 16)), torch.randn(IMAGE), divisor=1)
    group = elastic.plan(model).groups["0"]
    assert (group.units, group.unit) == (4, 4)
    model = check(conv_net(nn.GroupNorm(1, 16)), torch.randn(IMAGE))
    assert elastic.plan(model).groups["0"].unit == 1
    assert elastic.extract(model, 0.5)[1].num_groups == 1


def test_grouped_convolutions_keep_whole_groups():
    net = conv_net(nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(32, 16, 1))
    model = check(net, torch.randn(IMAGE), divisor=1)
    group = elastic.plan(model).groups["0"]
    assert (group.units, group.unit) == (4, 4)
    assert elastic.extract(model, 0.5)[2].groups == 2


def test_gated_halves_are_blocks_and_gathers_are_reported():
    def forward(net, x):
        a, b = net.up(x).chunk(2, 1)
        return net.down(a * torch.sigmoid(b))

    net = Net(forward, up=nn.Linear(6, 32), down=nn.Linear(16, 3))
    model = check(net, torch.randn(5, 6))
    assert isinstance(model.up, SlimLinear)
    assert model.up.out_blocks == 2

    def joined(net, x):
        return net.head(torch.cat([net.a(x), net.b(x)], 1))

    net = Net(joined, a=nn.Linear(6, 16), b=nn.Linear(6, 8), head=nn.Linear(24, 3))
    model = check(net, torch.randn(5, 6))
    assert elastic.report(model).gathers == ["head"]


def test_tied_shared_and_frozen_layers():
    def twice(net, x):
        return net.head(net.mid(torch.relu(net.mid(torch.relu(net.stem(x))))))

    net = Net(twice, stem=nn.Linear(6, 16), mid=nn.Linear(16, 16), head=nn.Linear(16, 3))
    net.mid.requires_grad_(False)
    model = check(net, torch.randn(5, 6))
    assert list(elastic.plan(model).groups) == ["stem"]
    assert not any(p.requires_grad for p in model.mid.parameters())

    def encode(net, x):
        return F.linear(torch.relu(net.b(torch.relu(net.a(x)))), net.head.weight)

    net = Net(encode, a=nn.Linear(6, 16), b=nn.Linear(16, 12), head=nn.Linear(12, 3))
    net.a2 = nn.Linear(6, 16)
    net.a2.weight = net.a.weight
    model = elastic.convert(net, torch.randn(5, 6), divisor=2)
    assert model.a.weight is model.a2.weight


def test_shapes_written_into_the_forward_are_left_alone():
    def forward(net, x):
        y = torch.relu(net.a(x)).reshape(-1, 4, 4).sum(1)
        return net.c(torch.relu(net.b(y)))

    net = Net(forward, a=nn.Linear(6, 16), b=nn.Linear(4, 8), c=nn.Linear(8, 3))
    model = check(net, torch.randn(5, 6))
    assert list(elastic.plan(model).groups) == ["b"]
    assert "a" in elastic.report(model).left_alone


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (lambda y: y.cumsum(1), "the order of its channels matters"),
        (lambda y: y * torch.arange(16.0), "does not run when it is narrower"),
    ],
)
def test_operations_across_channels_are_left_alone(mix, reason):
    net = Net(
        lambda net, x: net.c(net.b(mix(net.a(x))).relu()), a=nn.Linear(6, 16), b=nn.Linear(16, 8), c=nn.Linear(8, 3)
    )
    model = check(net, torch.randn(5, 6))
    assert list(elastic.plan(model).groups) == ["b"]
    assert reason in elastic.report(model).left_alone["a"]
    assert reason in str(elastic.report(model)).replace("\n", " ")


def test_zero_initialised_branches_hide_no_error():
    net = Net(
        lambda net, x: net.c(net.b(net.a(x).cumsum(1).flip(1)) + x),
        a=nn.Linear(6, 16),
        b=nn.Linear(16, 6),
        c=nn.Linear(6, 3),
    )
    nn.init.zeros_(net.b.weight)
    nn.init.zeros_(net.b.bias)
    with pytest.raises(ValueError, match="expected a model with channels to slim"):
        elastic.convert(net, torch.randn(5, 6), divisor=2)


def test_layers_that_cannot_be_slimmed_have_a_reason():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Renamed(nn.Linear):
        pass

    net = nn.Sequential(Own(6, 16), nn.ReLU(), Renamed(16, 16), nn.ReLU(), nn.Linear(16, 3))
    model = check(net, torch.randn(5, 6))
    assert "has a forward of its own" in elastic.report(model).left_alone["0"]
    assert isinstance(model[2], Renamed)
    assert isinstance(model[2], SlimLinear)
    assert type(elastic.extract(model, 0.5)[2]) is Renamed
    net = nn.Sequential(nn.Linear(6, 16), nn.RNN(16, 16), Net(lambda _, x: x[0]), nn.Linear(16, 16), nn.Linear(16, 3))
    model = check(net, torch.randn(5, 4, 6))
    assert "RNN layers are not sliced" in elastic.report(model).left_alone["1"]
    assert list(elastic.plan(model).groups) == ["3"]


def test_ignore():
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    model = check(net, torch.randn(5, 6), ignore=["0"])
    assert list(elastic.plan(model).groups) == ["2"]
    assert elastic.report(model).left_alone["0"] == "ignored, as asked"
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="got 'nowhere', which fits none"):
        elastic.convert(net, torch.randn(5, 6), ignore=["nowhere"])


class Remembers(nn.Module):
    """Keeps a result of its last forward, as LeViT does with its attention biases."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.cache = nn.Linear(6, 16), nn.Linear(16, 3), {}

    def forward(self, x):
        self.cache["h"] = self.a(x)
        return self.b(self.cache["h"].relu())


def test_models_that_keep_tensors_with_a_history_can_be_copied():
    x = torch.randn(5, 6)
    net = Remembers()
    net(x)
    model = check(net, x)  # converts, extracts
    model(x).sum().backward()
    with elastic.width(model, 0.5):
        y = model(x)
        half = elastic.extract(model, 0.5)
    assert error(half(x), y) < 1e-6
    assert error(elastic.view(model, 0.5)(x), y) < 1e-6
    deployed = elastic.deploy(model.eval(), widths=[0.5])
    deployed.set_width(0.5)
    assert error(deployed(x), y) < 1e-6


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_weights_that_are_computed_stay_full(norm):
    x = torch.randn(5, 6)
    net = nn.Sequential(norm(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    net(x).sum().backward()
    model = check(net, x)
    assert list(elastic.plan(model).groups) == ["2"]
    assert "remove_weight_norm" in elastic.report(model).left_alone["0"]


def test_batch_norms_after_fixed_channels_have_statistics_per_width():
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3), nn.BatchNorm1d(3))
    model = elastic.convert(net.eval(), torch.randn(5, 6), widths=[0.5, 1.0], divisor=2)
    elastic.calibrate(model, [torch.randn(50, 6)], [0.5])
    assert not torch.equal(elastic.extract(model, 0.5)[3].running_mean, net[3].running_mean)
    assert torch.equal(elastic.extract(model, 1.0)[3].running_mean, net[3].running_mean)


def test_inputs_of_several_kinds():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x, y):
            return {"out": self.c(torch.relu(self.a(x) + self.b(y)))}

    x, y = torch.randn(3, 4), torch.randn(3, 4)
    for example in ((x, y), {"x": x, "y": y}):
        model = elastic.convert(Two(), example, divisor=2)
        assert list(elastic.plan(model).groups) == ["a"]
    half = elastic.convert(Two().bfloat16(), (x.bfloat16(), y.bfloat16()), divisor=2)
    with elastic.width(half, 0.5):
        assert half(x.bfloat16(), y.bfloat16())["out"].dtype == torch.bfloat16


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.a(x)) + torch.randn(2)


class Named(Noisy):
    def forward(self, x):
        return [str(self.b(self.a(x)).argmax())]


PLAIN = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
X = torch.randn(3, 4)


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "text"),
    [
        ((3, X), {}, TypeError, "expected model to be an nn.Module, got int"),
        ((PLAIN, "x"), {}, TypeError, "expected example_inputs to be a tensor, or a tuple or dict with one, got str"),
        ((PLAIN, X.to("meta")), {}, ValueError, "expected example_inputs on device cpu like the model, got meta"),
        ((PLAIN, torch.randn(3, 5)), {}, ValueError, "the model does not run on example_inputs"),
        ((Named(), X), {}, ValueError, "expected the model to return a tensor of floating-point numbers"),
        ((Noisy(), X), {}, ValueError, "expected a model in eval mode to give the same output twice"),
        (
            (nn.Sequential(nn.Linear(4, 2)), X),
            {},
            ValueError,
            "expected a model with channels to slim, got Sequential with none",
        ),
        ((PLAIN, X * float("nan")), {}, ValueError, "output on example_inputs to be finite"),
        ((PLAIN, X), {"widths": ()}, ValueError, "expected widths to be a tuple .low, high. or a list"),
        ((PLAIN, X), {"widths": (0.9, 0.3)}, ValueError, "expected a range .low, high. with low <= high"),
        ((PLAIN, X), {"widths": [0.5, 1.5]}, ValueError, r"expected widths in \(0, 1\], got 1.5"),
        ((PLAIN, X), {"divisor": 0}, ValueError, "expected divisor to be a positive integer, got 0"),
        (
            (PLAIN, X),
            {"norm": "odd"},
            ValueError,
            "expected norm to be one of auto, switchable, universal, shared, got 'odd'",
        ),
        ((PLAIN, X), {"norm": "switchable"}, ValueError, "expected a list of widths with norm='switchable'"),
        (
            (PLAIN, X),
            {"sort": "odd"},
            ValueError,
            "expected sort to be one of l1, l2, bn, taylor, random, None or a dict",
        ),
        ((PLAIN, X), {"sort": "taylor"}, ValueError, "expected batches= and loss_fn= with sort='taylor'"),
        ((PLAIN, X), {"sort": {"x": [1]}}, ValueError, "expected scores for width dimensions, got 'x'; there are 0"),
        ((PLAIN, X), {"sort": {"0": [1]}}, ValueError, "expected 8 scores for '0', got 1"),
    ],
)
def test_errors(args, kwargs, kind, text):
    with pytest.raises(kind, match=text):
        elastic.convert(*args, **kwargs)
    assert type(PLAIN[0]) is nn.Linear


def test_convert_twice_is_an_error():
    model = elastic.convert(PLAIN, X)
    with pytest.raises(ValueError, match="got one that is elastic already"):
        elastic.convert(model, X)
