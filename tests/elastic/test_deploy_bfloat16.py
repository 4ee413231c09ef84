"""Deployed networks in bfloat16: depthwise convolutions in pairs of rows, images whose pixels have three numbers."""

import copy

import pytest
import torch
from torch import nn

from slimkernels import elastic
from slimkernels._extension import _C
from tests.helpers import error

pytestmark = pytest.mark.skipif(_C is None or not _C.deploy_has_bfloat16(), reason="needs bfloat16 products")


class Depthwise(nn.Module):
    def __init__(self, channels, residual=False, act=None, **options):
        super().__init__()
        self.enter = nn.Conv2d(4, channels, 1)
        self.conv = nn.Conv2d(channels, channels, groups=channels, **options)
        self.norm = nn.BatchNorm2d(channels)
        self.residual = residual
        self.act = act or nn.ReLU6()
        self.leave = nn.Conv2d(channels, 6, 1)

    def forward(self, x):
        x = self.enter(x)
        y = self.norm(self.conv(x))
        return self.leave(self.act(y + x if self.residual else y))


def stem(channels, kernel, stride, padding, image=3):
    return nn.Sequential(
        nn.Conv2d(image, channels, kernel, stride=stride, padding=padding, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 7, 1),
    )


NETS = {
    "depthwise-32": (Depthwise(32, kernel_size=3, padding=1), (2, 4, 9, 14)),
    "depthwise-70-stride": (Depthwise(70, kernel_size=3, padding=1, stride=2), (1, 4, 15, 19)),
    "depthwise-16": (Depthwise(16, kernel_size=3, padding=1), (2, 4, 9, 22)),
    "depthwise-16-odd": (Depthwise(16, kernel_size=3, padding=1), (1, 4, 8, 15)),
    "depthwise-16-5x5": (Depthwise(16, act=nn.SiLU(), kernel_size=5, padding=2), (1, 4, 9, 16)),
    "depthwise-16-stride": (Depthwise(16, kernel_size=3, padding=1, stride=2), (1, 4, 9, 16)),
    "depthwise-16-residual": (Depthwise(16, residual=True, kernel_size=3, padding=1), (1, 4, 7, 8)),
    "depthwise-48-silu": (Depthwise(48, act=nn.SiLU(), kernel_size=3, padding=1), (1, 4, 8, 8)),
    "depthwise-20": (Depthwise(20, kernel_size=5, padding=2), (1, 4, 12, 10)),
    "depthwise-5x5-stride": (Depthwise(64, kernel_size=5, padding=2, stride=2), (1, 4, 13, 30)),
    "depthwise-one-row": (Depthwise(36, kernel_size=(1, 3), padding=(0, 1)), (1, 4, 6, 9)),
    "depthwise-dilated-down": (Depthwise(40, kernel_size=3, padding=(2, 1), dilation=(2, 1)), (1, 4, 9, 9)),
    "depthwise-residual": (Depthwise(32, residual=True, kernel_size=3, padding=1), (1, 4, 7, 7)),
    "depthwise-7x7": (Depthwise(34, kernel_size=7, padding=3), (1, 4, 11, 8)),
    "stem-7x7": (stem(20, 7, 2, 3), (2, 3, 30, 32)),
    "stem-3x3": (stem(16, 3, 2, 1), (1, 3, 17, 20)),
    "stem-odd-row": (stem(16, 3, 2, 1), (1, 3, 16, 21)),
    "stem-stride-1": (stem(16, 3, 1, 1), (1, 3, 8, 10)),
    "stem-even-kernel": (stem(16, 4, 4, 2), (1, 3, 16, 16)),
    "stem-one-channel": (stem(24, 5, 2, 2, image=1), (3, 1, 12, 14)),
    "stem-no-padding": (stem(16, 3, 2, 0), (1, 3, 12, 14)),
}


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_as_good_as_pytorch(name, last):
    torch.manual_seed(0)
    net, shape = NETS[name]
    net = copy.deepcopy(net).eval()
    x = torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    for buffer in net.buffers():
        buffer.add_(torch.rand_like(buffer.float()).to(buffer.dtype))
    model = elastic.convert(net, x.float(), divisor=1)
    exact = copy.deepcopy(net).double()(x.double())
    deployed = elastic.deploy(model, dtype=torch.bfloat16)
    assert error(deployed(x), exact) <= 2 * error(copy.deepcopy(net).bfloat16()(x), exact)  # without the floor
    assert not any("PyTorch" in layer.runs_on for layer in deployed.report.layers)


@torch.no_grad()
def test_memory_that_holds_no_number_is_not_read():
    """The pair at the end of a row may reach beyond it: the arena is full of NaN before the second network runs."""
    net, shape = NETS["stem-3x3"]
    net, x = copy.deepcopy(net).eval(), torch.randn(shape).bfloat16()
    other = elastic.deploy(elastic.convert(copy.deepcopy(net), x.float(), divisor=1), dtype=torch.bfloat16)
    deployed = elastic.deploy(elastic.convert(net, x.float(), divisor=1), dtype=torch.bfloat16)
    other(torch.full((2, 3, 40, 40), torch.nan, dtype=torch.bfloat16))
    assert torch.isfinite(deployed(x)).all()


class Pool(nn.Module):
    """Max pooling of what a convolution that copies its input gives."""

    def __init__(self, channels, **options):
        super().__init__()
        self.enter = nn.Conv2d(channels, channels, 1, bias=False)
        self.pool = nn.MaxPool2d(**options)
        self.leave = nn.Conv2d(channels, channels, 1, bias=False)
        for conv in (self.enter, self.leave):
            conv.weight.data.copy_(torch.eye(channels)[:, :, None, None])

    def forward(self, x):
        return self.leave(self.pool(self.enter(x)))


@pytest.mark.parametrize("channels", [2, 16, 38, 64])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 2, "stride": 2, "ceil_mode": True},
        {"kernel_size": (3, 5), "stride": (1, 3), "padding": (1, 2), "dilation": (2, 1)},
    ],
    ids=["3x3", "2x2", "dilated"],
)
@torch.no_grad()
def test_max_pooling_is_exact(channels, options):
    torch.manual_seed(0)
    net = Pool(channels, **options).eval()
    x = torch.randn(2, channels, 13, 11).bfloat16()
    deployed = elastic.deploy(elastic.convert(net, x.float(), divisor=1), dtype=torch.bfloat16)
    for values in (x, x.abs(), -x.abs(), torch.zeros_like(x), torch.full_like(x, -3e38)):
        assert torch.equal(deployed(values), copy.deepcopy(net).bfloat16()(values))


@pytest.mark.parametrize(
    "nan", [0x7FC0, -0x0040, 0x7F81, -0x007F], ids=["plus", "minus", "signalling", "minus-signalling"]
)
@torch.no_grad()
def test_max_pooling_keeps_nan_and_infinities(nan):
    """The pooling comes first; what follows adds two halves of its first channel, the other one is 0."""
    net = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False)).eval()
    net[1].weight.fill_(1.0)
    net[2].weight.fill_(0.5)
    x = torch.randn(1, 2, 12, 40).bfloat16()
    x[:, 1] = 0
    deployed = elastic.deploy(elastic.convert(net, x.float(), divisor=1), dtype=torch.bfloat16)
    x[0, 0, 4, 4] = torch.tensor(nan, dtype=torch.int16).view(torch.bfloat16)
    x[0, 0, 8, 8] = torch.inf
    x[0, 0, 7:, 20:] = -torch.inf
    y, expected = deployed(x), copy.deepcopy(net).bfloat16()(x)
    assert expected.isnan().any()
    assert (expected == torch.inf).any()
    assert (expected == -torch.inf).any()
    assert torch.equal(y.nan_to_num(7.0, torch.inf, -torch.inf), expected.nan_to_num(7.0, torch.inf, -torch.inf))
    assert any("pooling" in layer.runs_on for layer in deployed.report.layers)
