"""What people write by hand: sliced rightly at every width, or left alone with the reason; never wrong."""

import pytest
import torch
import torch.nn.functional as F

from slimkernels import elastic
from tests.elastic.handwritten import NETS
from tests.elastic.handwritten_forwards import TOKENS
from tests.elastic.nets import perturbed
from tests.helpers import error

# What is sliced, by the names of its width dimensions, and a word of the reason for every layer left alone.
EXPECTED: dict[str, tuple[set[str], dict[str, str]]] = {
    "gru-zeros": ({"rnn"}, {}),
    "lstm-new-zeros": ({"rnn"}, {}),
    "cell-zeros": ({"cell"}, {}),
    "keyword-state": ({"rnn"}, {}),
    "learned-state": ({"rnn"}, {}),
    "lstm-by-hand-zeros": (set(), {"of_x": "does not run when it is narrower"}),
    "lstm-by-hand-started": ({"of_x"}, {}),
    "outputs-of-given-size": ({"out.0.0", "out.0.2"}, {"cell": "does not run when it is narrower"}),
    "conv-lstm": (set(), {"a": "does not run when it is narrower", "gates": "does not run when it is narrower"}),
    "channel-norm": ({"a"}, {}),
    "rms-norm": ({"a"}, {}),
    "functional-norm": ({"a"}, {}),
    "var-mean-norm": ({"a"}, {}),
    "l2-normalised": ({"a"}, {}),
    "one-head": ({"a", "q", "v"}, {}),
    "heads-of-any-size": ({"a", "q", "v"}, {}),
    "any-number-of-heads": ({"a", "q"}, {}),
    "heads-of-the-embedding": ({"a"}, {}),
    "heads-by-unflatten": ({"a"}, {"q": "does not run when it is narrower"}),
    "packed-attention": ({"a"}, {}),
    "multihead": ({"a", "attention", "attention.out_proj", "m.0"}, {}),
    "non-local": ({"a", "q", "v"}, {}),
    "squeeze-excite": ({"a", "fc1"}, {}),
    "efficient-channel-attention": (set(), {"a": "over works across its channels"}),
    "film": ({"a"}, {}),
    "highway": ({"a"}, {}),
    "channel-softmax": ({"a"}, {}),
    "shuffle": ({"a"}, {}),
    "negated-too": ({"a"}, {}),
    "maxout": ({"out.0.0", "out.0.2"}, {"a": "no layer takes its channels in"}),
    "halves-added": ({"a"}, {}),
    "dense": ({"a", "layers.0", "layers.1", "layers.2"}, {}),
    "up-and-down": ({"a", "down"}, {}),
    "flattened": ({"a", "m.0", "m.2"}, {}),
    "flattened-to-a-given-size": ({"m.0", "m.2"}, {"a": "output of shape (1, 3) instead of (2, 3)"}),
    "spectral": ({"a"}, {}),
    "spectral-mixing": (set(), {"a": "cannot be taken apart"}),
    "running-sum": ({"a"}, {}),
    "causal": ({"a"}, {}),
    "gated-pair": ({"a", "gate"}, {}),
    "tied": ({"m.0"}, {"embed": "its weights are used outside of it"}),
    "positions": ({"embed", "m.0"}, {}),
    "outer": ({"out.0.0", "out.0.2"}, {"a": "of another dimension", "b": "of another dimension"}),
    "chosen": ({"a", "m.0"}, {"m.2": "aten.topk.default, which is not followed"}),
    "weight-norm": ({"2.0", "2.2"}, {"0": "its weight is computed"}),
    "by-name": ({"first", "second"}, {}),
    "pyramid": ({"a"}, {}),
}


def build(name):
    make, shape = NETS[name]
    net, x = perturbed(make, shape)
    return net.double(), torch.randint(0, 10, shape) if shape == TOKENS else x.double()


def test_every_network_is_listed():
    assert EXPECTED.keys() == NETS.keys()


@pytest.mark.parametrize("name", [name for name, (groups, _) in EXPECTED.items() if not groups])
def test_what_cannot_be_sliced_is_refused_with_the_reason(name):
    net, x = build(name)
    with pytest.raises(ValueError, match="expected a model with channels to slim") as refusal:
        elastic.convert(net, x, divisor=2)
    for layer, reason in EXPECTED[name][1].items():
        assert f"{layer}: " in str(refusal.value)
        assert reason in str(refusal.value)


@pytest.mark.parametrize("name", [name for name, (groups, _) in EXPECTED.items() if groups])
def test_every_width_is_the_extracted_network_with_its_gradients(name):
    net, x = build(name)
    groups, reasons = EXPECTED[name]
    model = elastic.convert(net, x, divisor=2)
    assert elastic.plan(model).groups.keys() == groups
    left = elastic.report(model).left_alone
    for layer, reason in reasons.items():
        assert reason in left[layer]
    assert error(model(x), net(x)) < 1e-12
    for width in (0.25, 0.5, 0.8, {next(iter(elastic.plan(model).groups)): 0.5}):
        plain = elastic.extract(model, width)
        model.zero_grad()
        with elastic.width(model, width):
            y = model(x)
            y.square().sum().backward()
        expected = plain(x)
        expected.square().sum().backward()
        assert error(y, expected) < 1e-12
        assert elastic.cost(model, width).params == sum(p.numel() for p in plain.parameters())
        ours = dict(model.named_parameters())
        for key, p in plain.named_parameters():
            if p.grad is not None:
                got = ours[key].grad.norm()
                assert abs(got - p.grad.norm()) <= 1e-10 * (1 + got), key


# What the narrow network is, said once more by hand.


def narrow(name, width):
    net, x = build(name)
    model = elastic.convert(net, x, divisor=2, sort=None)
    units = elastic.plan(model).units("", width)
    with elastic.width(model, width), torch.no_grad():
        return net, x, units, model(x)


@torch.no_grad()
def test_hand_written_norms_see_the_active_channels_only():
    net, x, units, y = narrow("rms-norm", 0.5)
    n = units["a"]
    assert n == 8
    h = F.rms_norm(net.a(x)[..., :n], (n,), net.norm.scale[:n], 1e-6)
    assert error(y, F.linear(h, net.out.weight[:, :n], net.out.bias)) < 1e-12
    net, x, units, y = narrow("channel-norm", 0.3)
    n = units["a"]
    h = net.a(x)[:, :n].movedim(1, -1)
    h = F.layer_norm(h, (n,), net.norm.weight[:n], net.norm.bias[:n], 1e-6).movedim(-1, 1)
    assert error(y, F.conv2d(h, net.out.weight[:, :n], net.out.bias)) < 1e-12


def attend(net, h, heads, size, rows, kept):
    """``heads`` heads of ``size`` channels: the ``rows`` of q, k and v, on the first ``kept`` features."""
    q, k, v = (
        F.linear(h, f.weight[rows, :kept], f.bias[rows]).unflatten(-1, (heads, size)) for f in (net.q, net.k, net.v)
    )
    y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
    return h + F.linear(y, net.back.weight[:kept, rows], net.back.bias[:kept])


@torch.no_grad()
def test_heads_are_left_out_whole():
    net, x, units, y = narrow("any-number-of-heads", 0.5)
    assert units == {"a": 8, "q": 2}
    h = attend(net, net.a(x)[..., :8], 2, 4, torch.arange(8), 8)
    assert error(y, F.linear(h, net.out.weight[:, :8], net.out.bias)) < 1e-12


@torch.no_grad()
def test_every_head_is_narrower():
    net, x, units, y = narrow("heads-of-the-embedding", 0.5)
    assert units == {"a": 2}  # of 4 features each, as there are 4 heads
    rows = torch.tensor([4 * head + i for head in range(4) for i in range(2)])
    h = attend(net, net.a(x)[..., :8], 4, 2, rows, 8)
    assert error(y, F.linear(h, net.out.weight[:, :8], net.out.bias)) < 1e-12


@torch.no_grad()
def test_states_written_at_the_full_size_are_reported_and_cut_in_what_is_extracted():
    net, x = build("cell-zeros")
    model = elastic.convert(net, x, divisor=2)
    assert elastic.report(model).notes == ["initial states written at the full size are cut to their first units: cell"]
    plain = elastic.extract(model, 0.5)
    narrower = NETS["cell-zeros"][0]().double()
    narrower.cell, narrower.out, narrower.hidden = torch.nn.LSTMCell(5, 8).double(), torch.nn.Linear(8, 3).double(), 8
    narrower.load_state_dict(plain.state_dict())
    assert torch.equal(narrower(x), plain(x))
