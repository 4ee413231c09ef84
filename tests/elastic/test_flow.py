"""Channels followed through whatever a network does between its layers: what is slimmed, what is left alone, and that nothing
goes wrong silently."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slimkernels import elastic
from slimkernels.elastic.slices import masked
from tests.elastic.nets import perturbed
from tests.helpers import error

STEPS, IMAGE, ROWS = (3, 6, 5), (2, 3, 8, 8), (4, 6)
TABLE = torch.linspace(-1, 1, 16)


class Net(nn.Module):
    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.register_buffer(name, module) if isinstance(module, torch.Tensor) else setattr(self, name, module)
        self.function = forward

    def forward(self, x):
        return self.function(self, x)


def cells(steps, join=lambda found: torch.stack(found, 1)):
    """A loop over the steps of features, written by hand."""

    def forward(net, x):
        x, h, state, found = torch.relu(net.enter(x)), None, None, []
        for step in steps(x):
            h = net.first(step, h)
            state = net.second(h, state)
            found.append(state[0])
        return net.out(join(found))

    enter, out = nn.Linear(5, 16), nn.Linear(12, 3)
    return Net(forward, enter=enter, first=nn.GRUCell(16, 20), second=nn.LSTMCell(20, 12), out=out)


def gates_by_hand(net, x):
    h, found = None, []
    for step in x.unbind(1):
        r, z, n = net.enter(step).chunk(3, 1)
        if h is None:
            h = (1 - z.sigmoid()) * n.tanh()
        else:
            hr, hz, hn = net.state(h).chunk(3, 1)
            z = (z + hz).sigmoid()
            h = (1 - z) * torch.tanh(n + (r + hr).sigmoid() * hn) + z * h
        found.append(h)
    return net.out(torch.stack(found, 1))


def written_into_slices(net, x):
    x = net.enter(x)
    h = net.cell(x[:, 0])
    found = h.new_zeros(x.shape[0], x.shape[1], h.shape[1])
    found[:, 0] = h
    for i in range(1, x.shape[1]):
        h = net.cell(x[:, i], h)
        found[:, i] = h
    return net.out(found)


def chunks_and_across(net, x):  # as a dual-path network
    x = net.enter(x)
    b, t, c = x.shape
    y = x.view(b, 2, t // 2, c)
    y = y + net.back(net.within(y.reshape(-1, t // 2, c))[0]).view(y.shape)
    z = y.transpose(1, 2).reshape(-1, 2, c)
    y = y + net.back(net.across(z)[0]).view(b, t // 2, 2, c).transpose(1, 2)
    return net.out(y.reshape(b, t, c))


def convolutions(forward, last=16, **modules):
    return Net(forward, a=nn.Conv2d(3, 16, 3, padding=1), out=nn.Conv2d(last, 2, 1), **modules)


def wavenet(net, x):
    x, skips = net.a(x), 0
    for i, layer in enumerate(net.gates):
        f, g = layer(F.pad(x, (2**i, 0))).chunk(2, 1)
        y = f.tanh() * g.sigmoid()
        skips, x = skips + net.skips[i](y), x + net.back[i](y)
    return net.out(F.relu(skips))


def mixer(net, x):  # a linear layer over positions, then one over channels
    x = net.a(x).flatten(2).transpose(1, 2)
    x = x + net.tokens(x.transpose(1, 2)).transpose(1, 2)
    return net.last(x + net.channels(x))


def blend(net, x):  # experts
    x = net.a(x)
    share = net.share(x).softmax(-1)
    return net.out(x + (share[..., None] * torch.stack([expert(x) for expert in net.experts], 1)).sum(1))


def mlp(n, inner):
    return nn.Sequential(nn.Linear(n, inner), nn.ReLU(), nn.Linear(inner, n))


@torch.no_grad()
def without_gradient(net, x):
    return net.c(net.b(net.a(x)))


class PerceivedWeight(nn.Module):
    """A linear layer written with a parameter and a function."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 16)), nn.Parameter(torch.randn(12))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


LOOP = {"enter", "first", "second"}
# name -> (network, input shape, width dimensions)
NETS = {
    "unbind": (lambda: cells(lambda x: x.unbind(1)), STEPS, LOOP),
    "iterate": (lambda: cells(lambda x: x.transpose(0, 1)), STEPS, LOOP),
    "index": (lambda: cells(lambda x: [x[:, i] for i in range(x.shape[1])]), STEPS, LOOP),
    "chunk": (lambda: cells(lambda x: [c.squeeze(1) for c in x.chunk(x.shape[1], 1)]), STEPS, LOOP),
    "split": (lambda: cells(lambda x: [c[:, 0] for c in x.split(1, 1)]), STEPS, LOOP),
    "halves": (lambda: cells(lambda x: [t for c in x.chunk(2, 1) for t in c.unbind(1)]), STEPS, LOOP),
    "narrow": (lambda: cells(lambda x: [x.narrow(1, i, 1).flatten(1) for i in range(x.shape[1])]), STEPS, LOOP),
    "backwards": (lambda: cells(lambda x: x.flip(1).unbind(1)), STEPS, LOOP),
    "cat": (
        lambda: cells(lambda x: x.unbind(1), lambda found: torch.cat([f.unsqueeze(1) for f in found], 1)),
        STEPS,
        LOOP,
    ),
    "last": (lambda: cells(lambda x: x.unbind(1), lambda found: found[-1]), STEPS, LOOP),
    "gates-by-hand": (
        lambda: Net(gates_by_hand, enter=nn.Linear(5, 48), state=nn.Linear(16, 48), out=nn.Linear(16, 3)),
        STEPS,
        {"enter"},
    ),
    "written-into-slices": (
        lambda: Net(written_into_slices, enter=nn.Linear(5, 16), cell=nn.GRUCell(16, 12), out=nn.Linear(12, 3)),
        STEPS,
        {"enter", "cell"},
    ),
    "dual-path": (
        lambda: Net(
            chunks_and_across,
            enter=nn.Linear(5, 16),
            within=nn.GRU(16, 12, batch_first=True),
            across=nn.GRU(16, 12, batch_first=True),
            back=nn.Linear(12, 16),
            out=nn.Linear(16, 3),
        ),
        STEPS,
        {"enter", "within"},
    ),
    "gated-convolution": (
        lambda: convolutions(lambda net, x: net.out(F.glu(net.up(net.a(x)), 1)), up=nn.Conv2d(16, 32, 3)),
        IMAGE,
        {"a", "up"},
    ),
    "gated-transposed": (
        lambda: convolutions(
            lambda net, x: net.out(F.glu(net.up(net.a(x)), 1)), up=nn.ConvTranspose2d(16, 32, 2, stride=2)
        ),
        IMAGE,
        {"a", "up"},
    ),
    "wavenet": (
        lambda: Net(
            wavenet,
            a=nn.Conv1d(3, 16, 1),
            gates=nn.ModuleList(nn.Conv1d(16, 24, 2, dilation=2**i) for i in range(3)),
            skips=nn.ModuleList(nn.Conv1d(12, 20, 1) for _ in range(3)),
            back=nn.ModuleList(nn.Conv1d(12, 16, 1) for _ in range(3)),
            out=nn.Conv1d(20, 4, 1),
        ),
        (2, 3, 20),
        {"a", "gates.0", "gates.1", "gates.2", "skips.0"},
    ),
    "unequal-parts": (
        lambda: Net(
            lambda net, x: net.out(
                sum(layer(part) for layer, part in zip(net.parts, net.a(x).split([16, 8], 1), strict=True))
            ),
            a=nn.Linear(6, 24),
            parts=nn.ModuleList([nn.Linear(16, 12), nn.Linear(8, 12)]),
            out=nn.Linear(12, 3),
        ),
        ROWS,
        {"parts.0"},
    ),
    "instance-norm": (
        lambda: convolutions(
            lambda net, x: net.out(net.norm2(net.b(F.relu(net.norm1(net.a(x)))))),
            last=12,
            b=nn.Conv2d(16, 12, 3),
            norm1=nn.InstanceNorm2d(16),
            norm2=nn.InstanceNorm2d(12, affine=True),
        ),
        IMAGE,
        {"a", "b"},
    ),
    "mixer": (
        lambda: Net(mixer, a=nn.Conv2d(3, 16, 4, 4), tokens=mlp(4, 8), channels=mlp(16, 24), last=nn.Linear(16, 3)),
        IMAGE,
        {"a", "channels.0"},
    ),
    "experts": (
        lambda: Net(
            blend,
            a=nn.Linear(6, 16),
            share=nn.Linear(16, 3),
            experts=nn.ModuleList(mlp(16, 24) for _ in range(3)),
            out=nn.Linear(16, 2),
        ),
        ROWS,
        {"a", "experts.0.0", "experts.1.0", "experts.2.0"},
    ),
    "own-linear": (
        lambda: nn.Sequential(
            nn.Linear(6, 16), nn.ReLU(), PerceivedWeight(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
        ),
        ROWS,
        {"0", "3"},
    ),
    "no-grad": (
        lambda: Net(without_gradient, a=nn.Linear(6, 16), b=nn.Linear(16, 8), c=nn.Linear(8, 3)),
        ROWS,
        {"a", "b"},
    ),
    "transformer": (
        lambda: nn.Sequential(
            nn.Linear(5, 16),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2),
            nn.Linear(16, 3),
        ),
        STEPS,
        {"0", *(f"1.layers.{i}.{layer}" for i in range(2) for layer in ("self_attn", "linear1"))},
    ),
    "input-beside": (
        lambda: Net(
            lambda net, x: net.c(torch.cat([x, torch.relu(net.b(torch.cat([torch.relu(net.a(x)), x], -1)))], -1)),
            a=nn.Linear(6, 16),
            b=nn.Linear(22, 12),
            c=nn.Linear(18, 3),
        ),
        ROWS,
        {"a", "b"},
    ),
}


def build(name):
    make, shape, groups = NETS[name]
    return *perturbed(make, shape), groups


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_every_width_is_a_part_of_the_network(name):
    net, x, groups = build(name)
    model = elastic.convert(net, x, divisor=4)
    known = elastic.plan(model)
    assert set(known.groups) == groups
    assert error(model(x), net(x)) < 1e-5
    in_order = elastic.convert(net, x, divisor=4, sort=None)
    for width in (0.25, 0.5, 0.8, {next(iter(groups)): 0.5}):
        plain = elastic.extract(model, width)
        with elastic.width(model, width):
            assert error(model(x), plain(x)) < 5e-6
        assert elastic.cost(model, width).params == sum(p.numel() for p in plain.parameters())
        with masked(net, known.dims, known.units("", width)), elastic.width(in_order, width):
            assert error(in_order(x), net(x)) < 1e-5


@pytest.mark.parametrize("name", ["unbind", "wavenet", "gated-transposed", "experts", "own-linear"])
def test_gradients_of_a_width_reach_its_slice_only(name):
    net, x, _ = build(name)
    model = elastic.convert(net, x, divisor=4)
    with elastic.width(model, 0.5):
        model(x).square().sum().backward()
    plain = elastic.extract(model, 0.5)
    plain(x).square().sum().backward()
    ours = dict(model.named_parameters())
    for key, p in plain.named_parameters():
        if p.grad is None:  # what the last layer gives back
            continue
        assert abs(ours[key].grad.norm() - p.grad.norm()) < 1e-4 * (1 + p.grad.norm()), key


def test_gated_convolutions_are_reported():
    net, x, _ = build("wavenet")
    model = elastic.convert(net, x, divisor=4)
    assert elastic.report(model).gathers == ["gates.0", "gates.1", "gates.2"]
    assert not elastic.report(model).left_alone


@torch.no_grad()
def test_transformer_layers_have_their_fast_path_again_when_extracted():
    net, x, _ = build("transformer")
    model = elastic.convert(net, x, divisor=4)
    plain = elastic.extract(model, 0.5)
    assert model[1].layers[0].activation_relu_or_gelu is False
    assert plain[1].layers[0].activation_relu_or_gelu == 1
    assert plain[1].use_nested_tensor is True
    # Torch's layer cannot have other heads than features.
    plain = elastic.extract(model, {"0": 0.5})
    assert plain[1].layers[0].activation_relu_or_gelu is False
    assert plain[1].use_nested_tensor is False


LEFT = {
    "weights used by others": (
        lambda: Net(lambda net, x: F.linear(net.m(net.e(x)), net.e.weight.t()), e=nn.Linear(6, 16), m=mlp(16, 24)),
        ROWS,
        "e",
        "its weights are used outside of it",
    ),
    "a buffer beside": (
        lambda: Net(lambda net, x: net.m(net.e(x) + net.table), e=nn.Linear(6, 16), m=mlp(16, 24), table=TABLE),
        ROWS,
        "e",
        "its channels meet a tensor of a given size",
    ),
    "products of two": (
        lambda: Net(
            lambda net, x: net.m(torch.bmm(net.e(x)[:, :, None], net.f(x)[:, None]).flatten(1)),
            e=nn.Linear(6, 4),
            f=nn.Linear(6, 4),
            m=mlp(16, 24),
        ),
        ROWS,
        "e",
        "multiplied with others of another dimension",
    ),
    "an unknown operation": (
        lambda: Net(
            lambda net, x: net.m(torch.linalg.svdvals(net.e(x).view(4, 4, 4))), e=nn.Linear(6, 16), m=mlp(4, 24)
        ),
        ROWS,
        "e",
        "which is not followed",
    ),
    "a size written into the code": (
        lambda: Net(lambda net, x: net.m(net.c(x) + torch.zeros(4, 16)), c=nn.GRUCell(6, 16), m=mlp(16, 24)),
        ROWS,
        "c",
        "does not run when it is narrower (RuntimeError: The size of tensor a (8) must match",
    ),
}


@pytest.mark.parametrize("name", LEFT)
@torch.no_grad()
def test_what_cannot_be_narrower_stays_and_says_why(name):
    make, shape, layer, reason = LEFT[name]
    net, x = make().eval(), torch.randn(shape)
    model = elastic.convert(net, x, divisor=4)
    assert set(elastic.plan(model).groups) == {"m.0"}
    assert reason in elastic.report(model).left_alone[layer]
    assert error(model(x), net(x)) < 1e-5
    with elastic.width(model, 0.25):
        assert error(model(x), elastic.extract(model, 0.25)(x)) < 5e-6
