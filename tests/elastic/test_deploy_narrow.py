"""Convolutions of deployed networks with 4 or 8 outputs, several pixels in a vector."""

import copy

import pytest
import torch
from torch import nn

from slimkernels import elastic
from slimkernels._extension import _C
from tests.elastic.test_deploy_winograd import runs_on
from tests.helpers import FLOOR, error

pytestmark = pytest.mark.skipif(
    _C is None or torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs vectors of 16 numbers"
)


class Net(nn.Module):
    """The convolution between two others, with a norm, an addition and an activation."""

    def __init__(self, inner, outer, residual=False, act=None, **options):
        super().__init__()
        self.enter = nn.Conv2d(3, inner, 3, padding=1)
        self.conv = nn.Conv2d(inner, outer, **options)
        self.norm = nn.BatchNorm2d(outer)
        self.added = nn.Conv2d(inner, outer, 1, stride=options.get("stride", 1)) if residual else None
        self.act = act or nn.Identity()
        self.leave = nn.Conv2d(outer, 5, 3, padding=1)

    def forward(self, x):
        x = self.enter(x).relu()
        y = self.norm(self.conv(x))
        return self.leave(self.act(y if self.added is None else self.added(x) + y))


CASES = {
    "4-4": (Net(4, 4, kernel_size=3, padding=1, act=nn.ReLU()), (2, 3, 16, 16)),
    "4-4-residual-odd": (Net(4, 4, True, nn.SiLU(), kernel_size=3, padding=1), (3, 3, 13, 11)),
    "3-4-low": (Net(3, 4, kernel_size=3, padding=1), (1, 3, 5, 30)),
    "4-8-stride": (Net(4, 8, True, nn.ReLU6(), kernel_size=3, padding=1, stride=2), (2, 3, 17, 14)),
    "8-8": (Net(8, 8, True, nn.ReLU(), kernel_size=3, padding=1), (2, 3, 20, 9)),
    "4-8-1x1-stride": (Net(4, 8, kernel_size=1, stride=2), (2, 3, 9, 12)),
    "4-4-5x5-dilated": (Net(4, 4, kernel_size=5, padding=4, dilation=2), (1, 3, 12, 15)),
    "8-8-dilated-across": (Net(8, 8, kernel_size=3, padding=(1, 2), dilation=(1, 2)), (1, 3, 10, 7)),
    "4-4-no-padding": (Net(4, 4, kernel_size=3), (2, 3, 10, 6)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_as_good_as_pytorch(name, dtype):
    if dtype == torch.bfloat16 and not _C.deploy_has_bfloat16():
        pytest.skip("needs bfloat16 products")
    torch.manual_seed(0)
    net, shape = CASES[name]
    net, x = copy.deepcopy(net).eval(), torch.randn(shape).to(dtype)
    for buffer in net.buffers():
        buffer.add_(torch.rand_like(buffer.float()).to(buffer.dtype))
    model = elastic.convert(net, x.float(), divisor=1)
    exact = copy.deepcopy(net).double()(x.double())
    limit = 2 * error(copy.deepcopy(net).to(dtype)(x), exact) + FLOOR[dtype]
    deployed = elastic.deploy(model, dtype=dtype)
    assert error(deployed(x), exact) <= limit
    if dtype == torch.float32 or net.conv.in_channels % 2 == 0:  # an odd number of bfloat16 does not come in pairs
        assert "in the vector" in runs_on(deployed, "conv")


@torch.no_grad()
def test_where_it_does_not_run():
    """Inputs of more channels than a vector can give to its pixels."""
    net, x = Net(16, 4, kernel_size=3, padding=1).eval(), torch.randn(1, 3, 8, 8)
    deployed = elastic.deploy(elastic.convert(net, x, divisor=1))
    torch.testing.assert_close(deployed(x), net(x), rtol=1e-4, atol=1e-5)
    assert "in the vector" not in runs_on(deployed, "conv")


@torch.no_grad()
def test_an_infinite_input_stays_where_it_is():
    net, x = Net(4, 4, kernel_size=3, padding=1).eval(), torch.randn(1, 3, 24, 24)
    deployed = elastic.deploy(elastic.convert(net, x, divisor=1))
    x[0, 0, 5, 5] = torch.inf
    assert torch.equal(torch.isfinite(deployed(x)), torch.isfinite(net(x)))
