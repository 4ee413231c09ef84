"""LSTM and GRU as width dimensions: full, narrow and extracted networks, sorting, costs, states."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

from slimkernels import elastic
from slimkernels.elastic.slices import masked
from slimkernels.models.bsrnn import BSRNN
from slimkernels.models.nsnet2 import NSNet2
from slimkernels.nn import SlimGRU, SlimLSTM
from tests.elastic.nets import perturbed
from tests.helpers import error


class GruGruLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.GRU(6, 16, batch_first=True)
        self.second = nn.GRU(16, 24, num_layers=2, bias=False, batch_first=True)
        self.out = nn.Linear(24, 5)

    def forward(self, x):
        return self.out(self.second(self.first(x)[0])[0])


class Residual(nn.Module):
    """Like a layer of BSRNN: the features go around a BiLSTM."""

    def __init__(self, layers=1):
        super().__init__()
        self.enter = nn.Linear(6, 16)
        self.rnn = nn.LSTM(16, 12, num_layers=layers, bidirectional=True)
        self.back = nn.Linear(24, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        x = self.enter(x)
        return self.out(x + self.back(self.rnn(x)[0]))


class CnnLstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(6, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU())
        self.rnn = nn.LSTM(16, 8, bidirectional=True, batch_first=True)
        self.out = nn.Linear(16, 5)

    def forward(self, x):
        return self.out(self.rnn(self.conv(x).transpose(1, 2))[0])


class BiToBi(nn.Module):
    """The second layer takes the two halves of the first in."""

    def __init__(self):
        super().__init__()
        self.first = nn.GRU(6, 8, bidirectional=True)
        self.second = nn.LSTM(16, 12, bidirectional=True)
        self.out = nn.Linear(24, 5)

    def forward(self, x):
        return self.out(self.second(self.first(x)[0])[0])


class Seq2Seq(nn.Module):
    """The last state of the encoder starts the decoder: one width for both."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(6, 16)
        self.decoder = nn.LSTM(6, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, x):
        return self.out(self.decoder(x, self.encoder(x)[1])[0])


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(6, 16, bidirectional=True)
        self.out = nn.Linear(32, 5)

    def forward(self, x):
        packed = pack_padded_sequence(x, torch.tensor([2, 5, 4]), enforce_sorted=False)
        return self.out(pad_packed_sequence(self.rnn(packed)[0])[0])


class Cells(nn.Module):
    """A loop over the steps, with states that the cells hand from one to the next."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(6, 16)
        self.first = nn.LSTMCell(16, 12)
        self.second = nn.GRUCell(12, 20, bias=False)
        self.out = nn.Linear(20, 3)

    def forward(self, x):
        state, h, steps = None, None, []
        for step in x:
            state = self.first(self.enter(step), state)
            h = self.second(state[0], h)
            steps.append(self.out(h))
        return torch.stack(steps)


STEPS = (5, 3, 6)
NETS = {
    "gru-gru-linear": (GruGruLinear, STEPS, {"first", "second"}),
    "bilstm-residual": (Residual, STEPS, {"enter", "rnn"}),
    "stacked-bilstm-residual": (lambda: Residual(2), STEPS, {"enter", "rnn"}),
    "cnn-bilstm": (CnnLstm, (3, 6, 7), {"conv.0", "rnn"}),
    "bigru-bilstm": (BiToBi, STEPS, {"first", "second"}),
    "seq2seq": (Seq2Seq, STEPS, {"encoder"}),
    "cells": (Cells, STEPS, {"enter", "first", "second"}),
    "packed": (Packed, STEPS, {"rnn"}),
    "nsnet2": (lambda: NSNet2(24, 32), (2, 4, 161), {"fc_in.0", "rnn1", "rnn2", "fc_out.0", "fc_out.2"}),
    "bsrnn": (
        lambda: BSRNN(16, 12, 2, bands=[4, 8], channels=1),
        (1, 5, 24),
        {
            "split.fcs.0",
            *(f"blocks.{i}.{over}.rnn" for i in (0, 1) for over in ("time", "band")),
            *(f"masks.{i}.fc{k}" for i in (0, 1) for k in (1, 2)),
        },
    ),
}


def build(name: str):
    make, shape, groups = NETS[name]
    return *perturbed(make, shape), groups


@pytest.mark.parametrize("name", NETS)
def test_full_width_computes_the_same_function_and_gradients(name):
    net, x, groups = build(name)
    for sort in (None, "l1", "random"):
        model = elastic.convert(net, x, divisor=4, sort=sort)
        assert set(elastic.plan(model).groups) == groups
        assert not any(type(m) in (nn.LSTM, nn.GRU) for m in model.modules())
        assert list(net.state_dict()) == [k for k in model.state_dict() if ".calibrated." not in k]
        gradients = []
        for m in (net, model):
            m.zero_grad()
            inputs = x.clone().requires_grad_()
            m(inputs).square().sum().backward()
            gradients.append(inputs.grad)
        assert error(model(x), net(x)) < 1e-5
        assert error(*gradients[::-1]) < 1e-4
        if sort is None:
            for (key, p), q in zip(net.named_parameters(), model.parameters(), strict=True):
                assert error(q.grad, p.grad) < 1e-4, key


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_narrow_is_the_full_network_without_the_inactive_units(name):
    net, x, _ = build(name)
    model = elastic.convert(net, x, divisor=4, sort=None)
    known = elastic.plan(model)
    for width in (0.5, 0.7, {next(iter(known.groups)): 0.25}):
        with masked(net, known.dims, known.units("", width)):
            expected = net(x)
        assert error(expected, net(x)) > 1e-3
        with elastic.width(model, width):
            assert error(model(x), expected) < 1e-5


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_extract_and_cost(name):
    net, x, _ = build(name)
    model = elastic.convert(net, x, divisor=4)
    for width in (1.0, 0.5, 0.3, {next(iter(elastic.plan(model).groups)): 0.5}):
        plain = elastic.extract(model, width)
        for (key, module), old in zip(plain.named_modules(), net.modules(), strict=True):
            assert type(module) is type(old), key
        with elastic.width(model, width):
            assert error(model(x), plain(x)) < 5e-6
            assert error(elastic.view(model, width)(x), plain(x)) < 5e-6
        assert error(copy.deepcopy(plain)(x), plain(x)) == 0
        cost = elastic.cost(model, width)
        assert cost.params == sum(p.numel() for p in plain.parameters())
        assert cost.macs == _counted(plain, x)


def _counted(plain: nn.Module, x: torch.Tensor) -> int:
    """Multiply-accumulates of one run, as torch counts them: in float64 its recurrent layers are matrix products."""
    plain = copy.deepcopy(plain).double()
    with FlopCounterMode(display=False) as counter:
        plain(x.double())
    return counter.get_total_flops() // 2


@torch.no_grad()
def test_nsnet2_half_is_a_network_built_at_half_and_streams():
    torch.manual_seed(0)
    model, x = elastic.convert(NSNet2(48, 64).eval(), torch.randn(1, 4, 161)), torch.randn(2, 6, 161)
    plain = elastic.extract(model, 0.5)
    NSNet2(24, 32).load_state_dict(plain.state_dict())
    with elastic.width(model, 0.5):
        whole = model(x)
        for net in (model, plain):
            state, parts = None, []
            for frame in x.split(1, 1):
                gain, state = net.stream(frame, state)
                parts.append(gain)
            assert [s.shape[-1] for s in state] == [24, 24]
            assert error(torch.cat(parts, 1), whole) < 1e-6


@torch.no_grad()
def test_unbatched_input_and_a_state_that_leaves_the_network():
    net = Residual().eval()
    model = elastic.convert(net, torch.randn(5, 6), divisor=4)
    assert set(elastic.plan(model).groups) == {"enter", "rnn"}

    class State(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.rnn, self.out = nn.Linear(6, 16), nn.GRU(16, 8), nn.Linear(8, 3)

        def forward(self, x):
            y, h = self.rnn(self.enter(x))
            return self.out(y), h

    model = elastic.convert(State(), torch.randn(STEPS), divisor=4)
    assert set(elastic.plan(model).groups) == {"enter"}
    assert type(elastic.extract(model, 0.5).rnn) is nn.GRU
    with elastic.width(model, 0.5):
        y, h = model(torch.randn(STEPS))
        assert (y.shape[-1], h.shape[-1]) == (3, 8)


@torch.no_grad()
def test_pickle_and_save_and_load(tmp_path):
    net, x, _ = build("bilstm-residual")
    model = elastic.convert(net, x, divisor=4)
    elastic.save(model, tmp_path / "net.safetensors")
    loaded = elastic.load(tmp_path / "net.safetensors", Residual().eval())
    for other in (loaded, pickle.loads(pickle.dumps(model))):
        assert isinstance(other.rnn, SlimLSTM)
        assert elastic.cost(other, 0.5) == elastic.cost(model, 0.5)
        for width in (1.0, 0.5):
            with elastic.width(model, width), elastic.width(other, width):
                assert error(other(x), model(x)) < 1e-6


def test_a_subclass_stays_one_and_extraction_shares_nothing():
    class Mine(nn.GRU):
        pass

    net = GruGruLinear()
    net.first = Mine(6, 16, batch_first=True)
    model = elastic.convert(net, torch.randn(STEPS), divisor=4)
    assert isinstance(model.first, SlimGRU)
    assert isinstance(model.first, Mine)
    plain = elastic.extract(model, 1.0)
    assert type(plain.first) is Mine
    x = torch.randn(STEPS)
    before = plain(x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(plain(x), before)
    with torch.no_grad():
        plain.first.weight_ih_l0.zero_()
    assert not torch.equal(plain(x), before)
