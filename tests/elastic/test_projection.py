"""LSTMs with a projection: two width dimensions each, of the projection and of the hidden units."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from slimkernels import elastic
from slimkernels.elastic.slices import masked
from slimkernels.nn import SlimLinear, SlimLSTM
from slimkernels.train import sandwich_step
from tests.elastic.nets import perturbed
from tests.elastic.test_recurrent import STEPS, _counted
from tests.helpers import error

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Residual(nn.Module):
    """The features go around an LSTM; the linear layer after it takes a block a direction."""

    def __init__(self, layers, bidirectional, bias=True):
        super().__init__()
        self.enter = nn.Linear(6, 17)
        self.rnn = nn.LSTM(17, 23, layers, bias=bias, bidirectional=bidirectional, proj_size=9)
        self.back = nn.Linear(18 if bidirectional else 9, 17)
        self.out = nn.Linear(17, 3)

    def forward(self, x):
        x = self.enter(x)
        return self.out(x + self.back(self.rnn(x)[0]))


class BiToBi(nn.Module):
    """A projected layer after another, of another size, and one without projection last."""

    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(6, 15, bidirectional=True, proj_size=5)
        self.second = nn.LSTM(10, 13, bidirectional=True, proj_size=7)
        self.third = nn.LSTM(14, 9, bidirectional=True)
        self.out = nn.Linear(18, 5)

    def forward(self, x):
        return self.out(self.third(self.second(self.first(x)[0])[0])[0])


class Seq2Seq(nn.Module):
    """Both states of the encoder start the decoder; the cell states are used by a linear layer too."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(6, 17, proj_size=11)
        self.decoder = nn.LSTM(6, 17, proj_size=11)
        self.out, self.of_cells = nn.Linear(11, 5), nn.Linear(17, 5)

    def forward(self, x):
        states = self.encoder(x)[1]
        y, (_, c) = self.decoder(x, states)
        return self.out(y) + self.of_cells(c)


class Chain(nn.Module):
    """The hidden units of the second layer are the projection of the first: its states start the cells."""

    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(6, 17, proj_size=11)
        self.second = nn.LSTM(11, 11, proj_size=3)
        self.out = nn.Linear(3, 5)

    def forward(self, x):
        y, (h, _) = self.first(x)
        return self.out(self.second(y, (y.new_zeros(1, y.shape[1], self.second.weight_hh_l0.shape[1]), h))[0])


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 16, bidirectional=True, proj_size=5)
        self.out = nn.Linear(10, 5)

    def forward(self, x):
        packed = pack_padded_sequence(x, torch.tensor([2, 5, 4]), enforce_sorted=False)
        return self.out(pad_packed_sequence(self.rnn(packed)[0])[0])


NETS = {
    "residual": (lambda: Residual(1, False), {"enter", "rnn", "rnn:hidden"}),
    "bilstm-residual": (lambda: Residual(1, True), {"enter", "rnn", "rnn:hidden"}),
    "stacked-bilstm-residual": (lambda: Residual(3, True, bias=False), {"enter", "rnn", "rnn:hidden"}),
    "bilstm-bilstm": (BiToBi, {"first", "first:hidden", "second", "second:hidden", "third"}),
    "seq2seq": (Seq2Seq, {"encoder", "encoder:hidden"}),
    "packed": (Packed, {"rnn", "rnn:hidden"}),
}
WIDTHS = (1.0, 0.8, 0.55, 0.34, 0.2, 0.01)


def build(name):
    make, groups = NETS[name]
    return *perturbed(make, STEPS), groups


def convert(net, x, **kwargs):
    return elastic.convert(net, x, **({"divisor": 1, "widths": (0.01, 1.0)} | kwargs))


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_every_width_is_a_part_of_the_network_and_the_extracted_one(name):
    net, x, groups = build(name)
    net, x = net.double(), x.double()
    model = convert(net, x)
    known = elastic.plan(model)
    assert set(known.groups) == groups
    assert not elastic.report(model).left_alone
    in_order = convert(net, x, sort=None)
    for width in (*WIDTHS, *({key: 0.3} for key in groups)):
        plain = elastic.extract(model, width)
        assert {type(m) for m in plain.modules()} == {type(m) for m in net.modules()}
        with elastic.width(model, width):
            assert error(model(x), plain(x)) < 1e-14
            assert error(elastic.view(model, width)(x), plain(x)) < 1e-14
        cost = elastic.cost(model, width)
        assert cost.params == sum(p.numel() for p in plain.parameters())
        assert cost.macs == _counted(plain, x)
        with masked(net, known.dims, known.units("", width)), elastic.width(in_order, width):
            assert error(in_order(x), net(x)) < 1e-14


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("width", [0.55, 0.2])
def test_gradients_are_those_of_the_extracted_network_and_stay_in_the_slice(name, width):
    net, x, _ = build(name)
    model = convert(net.double(), x)
    x = x.double()
    plain = elastic.extract(model, width)
    gradients = []
    for m in (plain, model):
        inputs = x.clone().requires_grad_()
        with elastic.width(model, width):
            m(inputs).square().sum().backward()
        gradients.append(inputs.grad)
    assert error(*gradients[::-1]) < 1e-13
    ours = dict(model.named_parameters())
    for key, p in plain.named_parameters():
        got = ours[key].grad
        assert got.count_nonzero() == p.grad.count_nonzero(), key
        # The slice in its own order: all that is not zero is the smaller gradient.
        assert error(got[got != 0], p.grad[p.grad != 0]) < 1e-13, key


@torch.no_grad()
def test_extracted_is_a_layer_built_at_that_size():
    net, x, _ = build("bilstm-residual")
    model = convert(net, x)
    width = {"rnn": 0.34, "rnn:hidden": 0.55}
    plain = elastic.extract(model, width)
    built = nn.LSTM(17, 13, bidirectional=True, proj_size=3)
    built.load_state_dict(plain.rnn.state_dict())
    assert (plain.rnn.hidden_size, plain.rnn.proj_size, plain.back.in_features) == (13, 3, 6)
    for given, found in zip(built(net.enter(x))[1], plain.rnn(net.enter(x))[1], strict=True):
        assert torch.equal(given, found)
    with elastic.width(model, width):
        assert (model.rnn.width, model.rnn.proj_width) == (13, 3)
        assert isinstance(model.back, SlimLinear)
        assert model.back.in_blocks == 2
    assert (model.rnn.width, model.rnn.proj_width) == (23, 9)


def test_hidden_units_stay_more_than_the_projection():
    net, x, _ = build("bilstm-residual")
    model = convert(net, x)
    at = {}
    for width in (1.0, 0.01, {"rnn:hidden": 0.1}, {"rnn*": 0.34}):
        units = elastic.plan(model).units("", width)
        at[str(width)] = (units["rnn:hidden"], units["rnn"])
        assert elastic.extract(model, width).rnn.proj_size == units["rnn"]
    assert list(at.values()) == [(23, 9), (2, 1), (10, 9), (8, 3)]
    coarse = convert(net, x, divisor=8, widths=[0.3, 1.0])
    assert elastic.plan(coarse).units("", 0.3) == {"enter": 8, "rnn": 8, "rnn:hidden": 16}
    assert elastic.report(coarse).smallest == {"enter": 8, "rnn": 8, "rnn:hidden": 16}


@torch.no_grad()
def test_states_of_the_layer_may_be_the_hidden_units_of_the_next():
    net, x = perturbed(Chain, STEPS)
    model = convert(net, x)
    assert set(elastic.plan(model).groups) == {"first", "first:hidden", "second"}
    for width in (0.5, 0.01):
        units = elastic.plan(model).units("", width)
        assert units["first:hidden"] > units["first"] > units["second"]
        with elastic.width(model, width):
            assert error(model(x), elastic.extract(model, width)(x)) < 5e-6


def test_what_stays_full_says_why():
    class Leaves(nn.Module):
        def __init__(self, which):
            super().__init__()
            self.enter, self.rnn, self.out, self.which = (
                nn.Linear(6, 16),
                nn.LSTM(16, 8, proj_size=4),
                nn.Linear(4, 3),
                which,
            )

        def forward(self, x):
            y, states = self.rnn(self.enter(x))
            return self.out(y), states[self.which]

    x = torch.randn(STEPS)
    model = elastic.convert(Leaves(1), x, divisor=2)
    assert set(elastic.plan(model).groups) == {"enter", "rnn"}
    assert elastic.report(model).left_alone["rnn:hidden"] == (
        "its hidden units stay full: its channels are an output of the network"
    )
    with elastic.width(model, 0.5):
        assert [tuple(t.shape) for t in model(x)] == [(5, 3, 3), (1, 3, 8)]
        assert elastic.extract(model, 0.5).rnn.proj_size == 2
    model = elastic.convert(Leaves(0), x, divisor=2)  # the projection stays: never more than 8 - 4 hidden units less
    assert set(elastic.plan(model).groups) == {"enter", "rnn:hidden"}
    assert elastic.plan(model).units("", 0.25)["rnn:hidden"] == 6
    assert elastic.extract(model, 0.25).rnn.proj_size == 4


@torch.no_grad()
def test_pickle_save_load_and_deploy(tmp_path):
    net, x, _ = build("bilstm-bilstm")
    model = convert(net, x)
    elastic.save(model, tmp_path / "net.safetensors")
    loaded = elastic.load(tmp_path / "net.safetensors", BiToBi().eval())
    deployed = elastic.deploy(model)
    for other in (loaded, pickle.loads(pickle.dumps(model)), deployed):
        for width in (1.0, 0.55, 0.01):
            with elastic.width(model, width):
                other.set_width(width) if other is deployed else elastic.set_width(other, width)
                assert error(other(x), elastic.extract(model, width)(x)) < 1e-6
    assert isinstance(loaded.second, SlimLSTM)
    assert elastic.cost(loaded, 0.01) == elastic.cost(model, 0.01)


def test_search_finds_a_width_for_each_group():
    net, x, _ = build("bilstm-residual")
    model = convert(net, x, divisor=4, widths=(0.25, 1.0))
    full = elastic.cost(model, 1.0).params
    found = elastic.search(model, lambda m: float(m(x).norm()), max_params=full // 2, method="greedy", per_group=True)
    sub = elastic.extract(model, found.best.width)
    assert sum(p.numel() for p in sub.parameters()) == found.best.params <= full // 2


def test_a_sandwich_step_adds_up_the_gradients_of_its_widths():
    net, x, _ = build("bilstm-residual")
    model = convert(net, x, divisor=4, widths=(0.25, 1.0))
    target = torch.zeros_like(model(x))
    for width in (1.0, 0.25, 0.6):
        with elastic.width(model, width):
            F.mse_loss(model(x), target).backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    losses = sandwich_step(model, (x, target), F.mse_loss, None, widths=[1.0, 0.25, 0.6], distill=None)
    assert set(losses) == {1.0, 0.25, 0.6}
    for key, p in model.named_parameters():
        assert error(p.grad, expected[key]) < 1e-5, key
