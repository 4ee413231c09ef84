"""Recurrent layers as they run on a GPU, composed of PyTorch's call of cuDNN: the same call on the CPU, against the ops."""

import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from slimkernels.nn import SlimGRU, SlimLSTM
from slimkernels.ops import _recurrent_gpu
from tests.emulation.test_gpu_launchers import Trace
from tests.helpers import tensors_in

CASES = {
    "one layer": {},
    "no bias": {"bias": False},
    "two layers, both ways": {"num_layers": 2, "bidirectional": True},
    "in blocks": {"in_blocks": 2},
    "projection": {"proj_size": 6, "num_layers": 2},
}


def layer(kind, options, width):
    torch.manual_seed(0)
    made = kind(8, 10, **options)
    made.set_width(width)
    if "proj_size" in options:
        made.set_proj_width(4)
    return made


def compose(monkeypatch, wanted):
    for op in ("slim_lstm", "slim_gru"):
        monkeypatch.setattr(sys.modules[f"slimkernels.ops.{op}"], "used", lambda x: wanted)


def run(made, x, composed, monkeypatch):
    """Outputs and gradients, through the ops or composed as on a GPU."""
    compose(monkeypatch, composed)
    x = x.detach().requires_grad_()
    out = tensors_in(made(x))
    grads = torch.autograd.grad([t.square().sum() for t in out], [x, *made.parameters()])
    return [*out, *grads]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("width", [7, 10])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", [SlimLSTM, SlimGRU])
def test_composed_layers_equal_the_ops(kind, name, width, monkeypatch):
    if kind is SlimGRU and "proj_size" in CASES[name]:
        pytest.skip("a GRU has no projection")
    made, x = layer(kind, CASES[name], width), torch.randn(5, 3, 6)
    expected = run(made, x, False, monkeypatch)
    for ours, theirs in zip(run(made, x, True, monkeypatch), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    compose(monkeypatch, True)
    packed = pack_padded_sequence(x, torch.tensor([5, 3, 1]))
    with torch.no_grad():
        y, states = made(packed)
        compose(monkeypatch, False)
        expected_y, expected_states = made(packed)
    torch.testing.assert_close(y.data, expected_y.data)
    torch.testing.assert_close(states, expected_states)


@pytest.mark.parametrize("kind", [SlimLSTM, SlimGRU])
def test_the_slices_are_packed_as_cudnn_wants_them(kind):
    """All of a layer's matrices, then all biases, in one buffer: what ``nn.RNNBase.flatten_parameters`` makes."""
    made = layer(kind, {"num_layers": 2, "bidirectional": True}, 7)
    gates = 4 if kind is SlimLSTM else 3
    parts = _recurrent_gpu.pack(made._weights(), gates, 6, 1, 7, 7, 2, True)
    assert len({t.untyped_storage().data_ptr() for t in parts}) == 1
    matrices, biases = ([t for t in parts if t.dim() == d] for d in (2, 1))
    end = 0
    for part in [*matrices, *biases]:
        assert part.storage_offset() == end
        assert part.is_contiguous()
        end += part.numel()
    torch.testing.assert_close(parts[0], made.weight_ih_l0.unflatten(0, (gates, 10))[:, :7, :6].flatten(0, 1))


@pytest.mark.parametrize("width", [7, 10])
def test_a_call_copies_the_active_slices_once_and_never_waits(width, monkeypatch):
    compose(monkeypatch, True)
    made, x = layer(SlimLSTM, {}, width), torch.randn(5, 3, 6)
    gathered = []
    concatenate = torch.cat
    monkeypatch.setattr(
        torch, "cat", lambda parts: gathered.append(sum(p.numel() for p in parts)) or concatenate(parts)
    )
    with torch.no_grad(), Trace(made.weight_hh_l0) as trace:
        made(x)
    plain = nn.LSTM(6, width)
    assert gathered == [sum(p.numel() for p in plain.parameters())]
    assert trace.waits == []
    assert len([c for c in trace.copies if c != "cat"]) <= 1  # rows of four gates, laid side by side
