import sys

import pytest
import torch
from torch import nn

import slimkernels.nn as slim
from slimkernels import elastic
from tests.helpers import check_graphs, error

SIZES = {1: (14,), 2: (9, 8), 3: (5, 6, 5)}
NAMES = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]


def pair(name, *args, **kwargs):
    """The torch module and the slimmable one with its weights."""
    plain = getattr(nn, name)(*args, **kwargs)
    ours = getattr(slim, f"Slim{name}")(*args, **kwargs)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return plain, ours


def sized(name, channels, batch=(2,)):
    return torch.randn(*batch, channels, *SIZES[int(name[-2])], requires_grad=True)


def assert_same(plain, ours, x, call=lambda module, x: module(x)):
    expected, actual = call(plain, x), call(ours, x)
    dy = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, [x, *m.parameters()], dy) for y, m in [(expected, plain), (actual, ours)]]
    assert error(actual, expected) <= 1e-5
    for e, a in zip(*gradients, strict=True):
        assert error(a, e) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kwargs", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "bias": False}, {"groups": 4, "padding": 2}], ids=str
)
def test_slim_conv_module_at_full_width_is_the_torch_module(name, kwargs):
    plain, ours = pair(name, 8, 12, 3, **kwargs)
    assert isinstance(ours, getattr(nn, name))
    assert_same(plain, ours, sized(name, 8))
    assert_same(plain, ours, sized(name, 8, batch=()))


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
@pytest.mark.parametrize("name", NAMES[:3])
def test_slim_conv_module_padding_mode(name, mode):
    plain, ours = pair(name, 4, 6, 3, padding=2, padding_mode=mode)
    assert_same(plain, ours, sized(name, 4))
    plain, ours = pair(name, 4, 6, 3, padding="same", padding_mode=mode)
    assert_same(plain, ours, sized(name, 4))


@pytest.mark.parametrize("name", NAMES[3:])
def test_slim_conv_transpose_module_output_size(name):
    plain, ours = pair(name, 4, 6, 3, stride=2, padding=1)
    size = [2 * s for s in SIZES[int(name[-2])]]
    assert_same(plain, ours, sized(name, 4), lambda module, x: module(x, output_size=size))


@pytest.mark.parametrize("name", NAMES)
def test_slim_conv_module_at_a_width(name):
    _, ours = pair(name, 8, 12, 3, padding=1)
    ours.activation = "relu"
    ours.set_width(7)
    assert ours.width == 7
    x = sized(name, 5)
    small = getattr(nn, name)(5, 7, 3, padding=1)
    with torch.no_grad():
        small.weight.copy_(ours.weight[:5, :7] if "Transpose" in name else ours.weight[:7, :5])
        small.bias.copy_(ours.bias[:7])
    residual = torch.randn_like(small(x))
    y = ours(x, residual=residual)
    assert error(y, torch.relu(small(x) + residual)) <= 1e-6
    y.sum().backward()
    active = (slice(5), slice(7)) if "Transpose" in name else (slice(7), slice(5))
    assert ours.weight.grad[active].abs().sum() > 0
    ours.weight.grad[active] = 0
    assert ours.weight.grad.abs().sum() == 0
    ours.set_width(None)
    assert ours.width == 12


@pytest.mark.parametrize(("groups", "per_in", "per_out"), [(8, 1, 1), (8, 1, 2), (4, 3, 2)])
@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
def test_slim_conv_module_groups_follow_the_input(name, groups, per_in, per_out):
    _, ours = pair(name, groups * per_in, groups * per_out, 3, groups=groups)
    active = groups - 3
    ours.set_width(active * per_out)
    x = sized(name, active * per_in)
    small = getattr(nn, name)(active * per_in, active * per_out, 3, groups=active)
    with torch.no_grad():
        small.weight.copy_(ours.weight[: len(small.weight)])
        small.bias.copy_(ours.bias[: active * per_out])
    assert error(ours(x), small(x)) <= 1e-6


@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d"])
@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
def test_slim_conv_module_gathers_in_index(name, depthwise):
    groups = 8 if depthwise else 1
    plain, ours = pair(name, 8, 8, 3, groups=groups)
    index = torch.tensor([0, 1, 4, 5, 6])
    ours.in_index = index
    ours.set_width(5 if depthwise else 8)
    x = sized(name, 5)
    spread = torch.zeros(2, 8, *x.shape[2:]).index_copy(1, index, x)
    expected = plain(spread)
    assert error(ours(x), expected[:, index] if depthwise else expected) <= 1e-6


def test_slim_conv_module_widths_compile_to_few_graphs():
    module = slim.SlimConv2d(32, 40, 3, padding=1, activation="relu")

    def run(x, n):
        module.set_width(n)
        return module(x)

    check_graphs(run, [(torch.randn(2, c, 5, 6, requires_grad=True), c + 5) for c in range(5, 29, 2)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: slim.SlimConv2d(4, 6, 3).set_width(7), "SlimConv2d: expected a width between 1 and 6, got 7"),
        (lambda: slim.SlimConv2d(4, 6, 3).set_width(0), "SlimConv2d: expected a width between 1 and 6, got 0"),
        (
            lambda: slim.SlimConv2d(4, 8, 3, groups=4).set_width(5),
            "SlimConv2d: expected a width that is a whole number of groups, each with 2 outputs, got 5",
        ),
        (
            lambda: slim.SlimConv1d(8, 8, 3, groups=4)(torch.randn(1, 5, 9)),
            "SlimConv1d: expected x to have a whole number of groups, each with 2 channels, got 5 channels",
        ),
        (
            lambda: slim.SlimConv1d(8, 8, 3, groups=8)(torch.randn(1, 4, 9)),
            "SlimConv1d: expected width 4, the outputs of the 4 groups that x's 4 channels fill, got 8",
        ),
        (lambda: slim.SlimConv1d(8, 8, 3, activation="swish"), "SlimConv1d: expected activation to be one of none"),
        (lambda: slim.SlimConv1d(8, 8, 3)(torch.randn(1, 9, 9)), "expected x's channels / groups between 1 and 8"),
    ],
)
def test_slim_conv_module_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_moved_to_a_gpu_a_weight_lies_channels_last(monkeypatch):
    """Here ``meta`` is the GPU."""
    monkeypatch.setattr(sys.modules["slimkernels.nn.conv"], "on_gpu", lambda weight: weight.is_meta)
    with torch.device("cpu"):
        conv, depthwise, line = slim.SlimConv2d(8, 6, 3), slim.SlimConv2d(8, 8, 3, groups=8), slim.SlimConv1d(8, 6, 3)
    assert conv.weight.is_contiguous()
    conv.to("meta")
    assert conv.weight.stride(1) == 1
    assert isinstance(conv.weight, torch.nn.Parameter)
    conv.to(memory_format=torch.contiguous_format)  # asked for after the move
    assert conv.weight.is_contiguous()
    assert depthwise.to("meta").weight.is_contiguous()
    assert line.to("meta").weight.is_contiguous()


@pytest.mark.parametrize("kind", ["SlimConv2d", "SlimConvTranspose2d"])
def test_made_on_a_gpu_a_weight_lies_as_if_it_was_moved_there(kind, monkeypatch):
    monkeypatch.setattr(sys.modules["slimkernels.nn.conv"], "on_gpu", lambda weight: weight.is_meta)
    make, plain = getattr(slim, kind), getattr(torch.nn, kind.removeprefix("Slim"))
    with torch.device("cpu"):
        moved = make(8, 6, 3).to("meta")
        network = torch.nn.Sequential(plain(3, 8, 3), torch.nn.ReLU(), plain(8, 6, 3))
        elastic.convert(network, torch.randn(1, 3, 9, 9), widths=[0.5, 1.0])
    with torch.device("meta"):
        within = make(8, 6, 3)
    assert moved.weight.stride() == make(8, 6, 3, device="meta").weight.stride() == within.weight.stride()
    assert moved.weight.stride(1) == 1
    assert make(8, 8, 3, groups=8, device="meta").weight.is_contiguous()
    assert network[2].weight.is_contiguous()  # on the CPU


def test_converted_on_a_gpu_a_weight_lies_as_if_it_was_moved_there(monkeypatch):
    monkeypatch.setattr(sys.modules["slimkernels.nn.conv"], "on_gpu", lambda weight: True)  # the CPU is the GPU
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 6, 3))
    x = torch.randn(1, 3, 9, 9)
    expected = network(x)
    network = elastic.convert(network, x, widths=[0.5, 1.0])
    assert network[2].weight.stride(1) == 1
    torch.testing.assert_close(network(x), expected)
