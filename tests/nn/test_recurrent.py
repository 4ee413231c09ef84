import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from slimkernels.nn import SlimGRU, SlimGRUCell, SlimLinear, SlimLSTM, SlimLSTMCell
from tests.helpers import check_graphs, error

PAIRS = [(SlimLSTM, nn.LSTM), (SlimGRU, nn.GRU)]
CELLS = [(SlimLSTMCell, nn.LSTMCell), (SlimGRUCell, nn.GRUCell)]


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [t for part in value for t in flat(part)]


def twins(slim, plain, *args, **kwargs):
    module, other = slim(*args, **kwargs), plain(*args, **kwargs)
    other.load_state_dict(module.state_dict())
    return module, other


def check_same(ours, theirs, module, other, limit=1e-6):
    ours, theirs = flat(ours), flat(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert error(a, b) <= limit
    sum(t.square().sum() for t in ours).backward()
    sum(t.square().sum() for t in theirs).backward()
    gradients = dict(other.named_parameters())
    for name, parameter in module.named_parameters():
        assert error(parameter.grad, gradients[name].grad) <= 10 * limit, name


def narrow(module, plain, h, i):
    """The plain network of that width with the slices of the module's weights."""
    other = plain(
        i, h, module.num_layers, batch_first=module.batch_first, bidirectional=module.bidirectional, bias=module.bias
    )
    gates = 4 if plain is nn.LSTM else 3
    directions = 2 if module.bidirectional else 1
    for name, parameter in other.named_parameters():
        full = getattr(module, name).detach().unflatten(0, (gates, -1))[:, :h].flatten(0, 1)
        if name.startswith("weight_ih") and "_l0" not in name:
            full = full.unflatten(1, (directions, -1))[:, :, :h].flatten(1)
        elif name.startswith("weight"):
            full = full[:, : parameter.shape[1]]
        parameter.data.copy_(full)
    return other


@pytest.mark.parametrize(("slim", "plain"), PAIRS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_full_width_equals_torch(slim, plain, bias, batch_first, bidirectional):
    module, other = twins(slim, plain, 9, 12, 2, bias=bias, batch_first=batch_first, bidirectional=bidirectional)
    x = torch.randn(5, 4, 9)
    check_same(module(x), other(x), module, other)


@pytest.mark.parametrize(("slim", "plain"), PAIRS)
def test_initial_state_and_unbatched_input(slim, plain):
    module, other = twins(slim, plain, 9, 12, 2)
    state = torch.randn(2, 3, 12)
    hx = (state, torch.randn(2, 3, 12)) if slim is SlimLSTM else state
    x = torch.randn(5, 3, 9)
    check_same(module(x, hx), other(x, hx), module, other)
    one = tuple(s[:, 0] for s in hx) if slim is SlimLSTM else hx[:, 0]
    module.zero_grad()
    other.zero_grad()
    ours, theirs = module(x[:, 0], one), other(x[:, 0], one)
    assert flat(ours)[0].shape == flat(theirs)[0].shape == (5, 12)
    check_same(ours, theirs, module, other)


def test_same_initialisation_and_state_dict():
    for slim, plain in PAIRS:
        torch.manual_seed(1)
        module = slim(5, 6, 2, bidirectional=True)
        torch.manual_seed(1)
        other = plain(5, 6, 2, bidirectional=True)
        assert list(module.state_dict()) == list(other.state_dict())
        for key, value in other.state_dict().items():
            assert torch.equal(module.state_dict()[key], value)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projection():
    module, other = twins(SlimLSTM, nn.LSTM, 9, 12, 2, bidirectional=True, proj_size=7)
    x = torch.randn(5, 4, 9)
    check_same(module(x), other(x), module, other)
    module.set_width(8)
    module.set_proj_width(3)
    y, (h_n, c_n) = module(x)
    assert y.shape == (5, 4, 6)
    assert h_n.shape == (4, 4, 3)
    assert c_n.shape == (4, 4, 8)
    with pytest.raises(ValueError, match="SlimLSTM: expected a projection width between 1 and 7, got 8"):
        module.set_proj_width(8)


@pytest.mark.parametrize(("slim", "plain"), PAIRS)
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("h", "i"), [(1, 1), (5, 7), (12, 9), (7, 3)])
def test_slice_equals_the_network_of_that_width(slim, plain, bidirectional, h, i):
    module = slim(9, 12, 2, bidirectional=bidirectional)
    module.set_width(h)
    assert module.width == h
    other = narrow(module, plain, h, i)
    x = torch.randn(6, 3, i)
    for a, b in zip(flat(module(x)), flat(other(x)), strict=True):
        assert error(a, b) <= 1e-6


@pytest.mark.parametrize(("slim", "plain"), PAIRS)
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_packed_sequences(slim, plain, bidirectional, enforce_sorted):
    module, other = twins(slim, plain, 9, 12, 2, batch_first=True, bidirectional=bidirectional)
    lengths = [7, 5, 5, 1] if enforce_sorted else [5, 1, 7, 5]
    x = torch.randn(4, 7, 9)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)
    (ours, ours_n), (theirs, theirs_n) = module(packed), other(packed)
    padded, sizes = pad_packed_sequence(ours, batch_first=True)
    expected, expected_sizes = pad_packed_sequence(theirs, batch_first=True)
    assert sizes.tolist() == expected_sizes.tolist() == lengths
    check_same([padded, ours_n], [expected, theirs_n], module, other)


def test_linear_after_a_bidirectional_layer_takes_two_blocks():
    lstm, linear = SlimLSTM(9, 12, bidirectional=True), SlimLinear(24, 9, in_blocks=2)
    lstm.set_width(5)
    x = torch.randn(6, 3, 9)
    weight = torch.cat([linear.weight[:, :5], linear.weight[:, 12:17]], 1)
    y = lstm(x)[0]
    assert error(linear(y), torch.nn.functional.linear(y, weight, linear.bias)) <= 1e-6


@pytest.mark.parametrize(("slim", "plain"), PAIRS)
def test_in_index_gathers_the_active_inputs(slim, plain):
    module = slim(9, 12, bidirectional=True)
    module.in_index = torch.tensor([0, 1, 5, 6, 7])
    other = slim(5, 12, bidirectional=True)
    weights = module.state_dict()
    other.load_state_dict({k: v[:, module.in_index] if k.startswith("weight_ih") else v for k, v in weights.items()})
    x = torch.randn(4, 2, 5)
    assert torch.equal(module(x)[0], other(x)[0])


@pytest.mark.parametrize(("slim", "plain"), PAIRS)
def test_streaming_equals_batch_processing(slim, plain):
    module = slim(9, 12, 2).eval()
    module.set_width(7)
    x = torch.randn(20, 1, 9)
    with torch.inference_mode():
        y, _ = module(x)
        state, steps = None, []
        for t in range(20):
            step, state = module(x[t : t + 1], state)
            steps.append(step)
    assert error(torch.cat(steps), y) <= 1e-6


@pytest.mark.parametrize(("slim", "plain"), CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cells(slim, plain, bias):
    module, other = twins(slim, plain, 9, 12, bias=bias)
    assert list(module.state_dict()) == list(other.state_dict())
    x, state = torch.randn(4, 9), torch.randn(4, 12)
    hx = (state, torch.randn(4, 12)) if slim is SlimLSTMCell else state
    check_same(module(x, hx), other(x, hx), module, other)
    assert flat(module(x[0]))[0].shape == (12,)
    module.set_width(5)
    gates = module.weight_hh.shape[0] // 12
    small = plain(7, 5, bias=bias)
    for name, parameter in small.named_parameters():
        full = getattr(module, name).detach().unflatten(0, (gates, 12))[:, :5].flatten(0, 1)
        parameter.data.copy_(full[:, : parameter.shape[1]] if full.dim() == 2 else full)
    for a, b in zip(flat(module(x[:, :7])), flat(small(x[:, :7])), strict=True):
        assert error(a, b) <= 1e-6


@pytest.mark.parametrize(("slim", "plain"), PAIRS)
def test_dropout_acts_in_training_only(slim, plain):
    module = slim(9, 12, 2, dropout=0.5)
    x = torch.randn(5, 3, 9)
    assert not torch.equal(module(x)[0], module(x)[0])
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])


@pytest.mark.parametrize(("slim", "plain"), PAIRS)
def test_parameters_are_read_where_they_are(slim, plain):
    """A copy, another dtype, a replaced parameter and a swapped one all count at the next call."""
    module = slim(9, 12)
    x = torch.randn(5, 3, 9)
    y = module(x)[0]
    assert torch.equal(copy.deepcopy(module)(x)[0], y)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x)[0], y)
    assert module.double()(x.double())[0].dtype == torch.float64
    module.float()
    zeros = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    assert torch.func.functional_call(module, zeros, (x,))[0].abs().sum() == 0
    module.weight_hh_l0 = nn.Parameter(torch.zeros_like(module.weight_hh_l0))
    assert not torch.equal(module(x)[0], y)


@pytest.mark.parametrize(("slim", "plain"), PAIRS)
def test_twelve_widths_compile_to_few_graphs(slim, plain):
    module = slim(16, 64, 2, bidirectional=True)
    widths = range(4, 40, 3)

    def call(x, width):
        return module(x)[0]

    class Inputs:
        def __iter__(self):
            for h in widths:
                module.set_width(h)
                yield torch.randn(3, 2, 11, requires_grad=True), torch.empty(h, 0)

    check_graphs(call, Inputs())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SlimLSTM(9, 12).set_width(13), "SlimLSTM: expected a width between 1 and 12, got 13"),
        (lambda: SlimGRU(9, 12).set_width(0), "SlimGRU: expected a width between 1 and 12, got 0"),
        (lambda: SlimGRU(9, 12, in_blocks=2), "SlimGRU: expected in_blocks to divide input_size=9, got 2"),
        (lambda: SlimGRUCell(9, 12, in_blocks=2), "SlimGRUCell: expected in_blocks to divide input_size=9, got 2"),
        (lambda: SlimGRU(9, 12, proj_size=3), "proj_size argument is only supported for LSTM, not RNN or GRU"),
        (lambda: SlimGRU(9, 12)(torch.randn(9)), r"SlimGRU: expected input to have 2 or 3 dimensions, got \(9,\)"),
        (lambda: SlimGRUCell(9, 12)(torch.randn(1, 1, 9)), "SlimGRUCell: expected input to have 1 or 2 dimensions"),
        (lambda: SlimLSTM(9, 12)(torch.randn(3, 2, 10)), r"slim_lstm: expected x.shape\[-1\] between 1 and 9, got 10"),
        (lambda: SlimGRU(9, 12)(torch.randn(3, 2, 9), torch.randn(1, 2, 5)), r"expected h0 of shape \(1, 2, 12\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
