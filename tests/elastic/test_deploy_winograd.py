"""3x3 convolutions of deployed networks by Winograd's algorithm: where it runs, and that it is as good as rule 1 asks."""

import copy

import pytest
import torch
from torch import nn

from slimkernels import elastic, models
from slimkernels._extension import _C
from tests.helpers import FLOOR, error

pytestmark = pytest.mark.skipif(_C is None, reason="needs the C++ kernels")


class Block(nn.Module):
    """A 3x3 convolution between two others, with a norm, an addition and an activation."""

    def __init__(self, inner, outer, padding=1, residual=False, act=None):
        super().__init__()
        self.enter = nn.Conv2d(3, inner, 1)
        self.conv = nn.Conv2d(inner, outer, 3, padding=padding, bias=act is None)
        self.norm = nn.BatchNorm2d(outer)
        self.added = nn.Conv2d(inner, outer, 1) if residual else None
        self.act = act or nn.Identity()

    def forward(self, x):
        x = self.enter(x).relu()
        y = self.norm(self.conv(x))
        return self.act(y if self.added is None else y + self.added(x))


def runs_on(deployed, name):
    return next(layer.runs_on for layer in deployed.report.layers if layer.name == name)


CASES = {
    "16-channels": (Block(16, 16), (1, 3, 16, 16)),
    "odd-channels": (Block(33, 50), (2, 3, 13, 22)),
    "no-padding-residual": (Block(40, 24, padding=1, residual=True, act=nn.ReLU()), (3, 3, 9, 31)),
    "wide-padding": (Block(24, 72, padding=2, act=nn.ReLU6()), (1, 3, 17, 10)),
    "padding-0": (Block(32, 17, padding=0, act=nn.SiLU()), (2, 3, 21, 15)),
    "deep": (Block(192, 96, residual=True), (2, 3, 15, 14)),
}


# Few tiles, many channels: one group of 4 tiles, part of one, one and a part.
FEW = {
    "few-tiles": (Block(256, 144, residual=True, act=nn.ReLU()), (1, 3, 7, 7)),
    "three-tiles": (Block(200, 50, act=nn.SiLU()), (1, 3, 4, 12)),
    "six-tiles": (Block(130, 100), (2, 3, 4, 12)),
}


@pytest.mark.parametrize("name", [*CASES, *FEW])
@torch.no_grad()
def test_as_good_as_pytorch(name):
    torch.manual_seed(0)
    net, shape = (CASES | FEW)[name]
    net, x = copy.deepcopy(net).eval(), torch.randn(shape)
    for buffer in net.buffers():
        buffer.add_(torch.rand_like(buffer.float()).to(buffer.dtype))
    model = elastic.convert(net, x, divisor=1)
    exact = copy.deepcopy(net).double()(x.double())
    limit = 2 * error(net(x), exact) + FLOOR[torch.float32]
    deployed, direct = elastic.deploy(model), elastic.deploy(model, winograd=False)
    assert error(deployed(x), exact) <= limit
    assert error(direct(x), exact) <= limit
    if name in CASES:
        assert "Winograd" in runs_on(deployed, "conv")
    elif torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert "as they are read" in runs_on(deployed, "conv")
    assert "Winograd" not in runs_on(direct, "conv")
    assert deployed.cache_bytes > direct.cache_bytes
    assert sum(t.flops for t in deployed.profile(x, repeats=1)) == sum(t.flops for t in direct.profile(x, repeats=1))


# In bfloat16: odd sizes, parts of vectors of channels, several blocks of tiles, weights asked for ahead; the side of the tiles
# with a norm and without one, where PyTorch rounds less often and the larger tile is no longer within the rule. 0: direct.
PAIRS = {
    "16-channels": (*CASES["16-channels"], 3, 0),
    "no-padding-residual": (*CASES["no-padding-residual"], 3, 2),
    "wide-padding": (*CASES["wide-padding"], 3, 2),
    "padding-0": (*CASES["padding-0"], 3, 2),
    "deep": (*CASES["deep"], 3, 2),
    "one-tile-an-image": (Block(128, 144, act=nn.ReLU()), (32, 3, 3, 3), 3, 0),
    "narrow-images": (Block(64, 64, residual=True), (3, 3, 31, 5), 3, 2),
    "many-tiles": (Block(34, 23, residual=True, act=nn.SiLU()), (2, 3, 40, 37), 3, 2),
    "few-tiles": (Block(320, 272, residual=True, act=nn.ReLU()), (1, 3, 7, 7), 2, 2),
    "one-image-of-one-tile": (Block(64, 64), (1, 3, 3, 3), 0, 0),
}


@pytest.mark.skipif(_C is not None and not _C.deploy_has_bfloat16(), reason="needs bfloat16 products")
@pytest.mark.parametrize("normed", [True, False], ids=["norm", "no-norm"])
@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_bfloat16_as_good_as_pytorch(name, normed):
    torch.manual_seed(0)
    net, shape, *sides = PAIRS[name]
    net, x = copy.deepcopy(net).eval(), torch.randn(shape).bfloat16()
    for buffer in net.buffers():
        buffer.add_(torch.rand_like(buffer.float()).to(buffer.dtype))
    if not normed:
        net.norm = nn.Identity()
    model = elastic.convert(net, x.float(), divisor=1)
    exact = copy.deepcopy(net).double()(x.double())
    limit = 2 * error(copy.deepcopy(net).bfloat16()(x), exact)  # without the floor
    deployed, direct = (elastic.deploy(model, dtype=torch.bfloat16, winograd=w) for w in (True, False))
    assert error(deployed(x), exact) <= limit
    assert error(direct(x), exact) <= limit
    side = sides[0 if normed else 1]
    if side:
        assert f"Winograd F({side}x{side}, 3x3)" in runs_on(deployed, "conv")
    else:
        assert "Winograd" not in runs_on(deployed, "conv")
    assert "Winograd" not in runs_on(direct, "conv")
    assert sum(t.flops for t in deployed.profile(x, repeats=1)) == sum(t.flops for t in direct.profile(x, repeats=1))


@pytest.mark.skipif(_C is not None and not _C.deploy_has_bfloat16(), reason="needs bfloat16 products")
@pytest.mark.parametrize("channels", [(32, 48), (50, 70)])
@pytest.mark.parametrize("width", [15, 16, 17])
@pytest.mark.parametrize("height", [12, 13, 14])
@torch.no_grad()
def test_one_layer_in_bfloat16(height, width, channels):
    """Convolution, norm and activation alone (what follows copies them), whose input has no error yet; all ends of an image."""
    torch.manual_seed(height * width)
    inner, outer = channels
    layer = nn.Sequential(nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU())
    net = nn.Sequential(*layer, nn.Conv2d(outer, outer, 1, bias=False)).eval()
    net[3].weight.copy_(torch.eye(outer)[:, :, None, None])
    for tensor in (net[1].weight, net[1].bias, *net[1].buffers()):
        tensor.add_(torch.rand_like(tensor.float()).to(tensor.dtype))
    x = torch.randn(2, inner, height, width).relu().bfloat16()
    exact = copy.deepcopy(net).double()(x.double())
    deployed = elastic.deploy(elastic.convert(net, x.float(), divisor=1), dtype=torch.bfloat16)
    y = deployed(x)
    assert "Winograd F(3x3, 3x3)" in runs_on(deployed, "0")
    assert error(y, exact) <= 2 * error(copy.deepcopy(net).bfloat16()(x), exact)


@pytest.mark.skipif(_C is not None and not _C.deploy_has_bfloat16(), reason="needs bfloat16 products")
@torch.no_grad()
def test_an_infinite_input_reaches_its_tile_only_in_bfloat16():
    x = torch.randn(1, 3, 24, 25)
    deployed = elastic.deploy(elastic.convert(Block(16, 16).eval(), x, divisor=1), dtype=torch.bfloat16)
    x[0, 0, 23, 4] = torch.inf
    y = deployed(x.bfloat16())
    assert "Winograd F(3x3, 3x3)" in runs_on(deployed, "conv")
    assert not torch.isfinite(y[:, :, 22:, 3:6]).all()
    assert torch.isfinite(y[:, :, :20]).all()
    assert torch.isfinite(y[:, :, :, 9:]).all()


@torch.no_grad()
def test_where_it_runs():
    x = torch.randn(1, 3, 16, 16)
    narrow = elastic.deploy(elastic.convert(Block(15, 32).eval(), x, divisor=1))
    narrow(x)
    assert "Winograd" not in runs_on(narrow, "conv")
    wide = elastic.deploy(elastic.convert(Block(512, 512).eval(), x, divisor=1))
    wide(torch.randn(1, 3, 7, 7))  # so few outputs that reading 36 weights for 9 takes longer
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert "as they are read" in runs_on(wide, "conv")
    elif torch.backends.cpu.get_cpu_capability() == "AVX2":  # with shorter vectors it does not
        assert "Winograd" not in runs_on(wide, "conv")
    wide(torch.randn(8, 3, 7, 7))
    assert "tiles at a time" in runs_on(wide, "conv")


@torch.no_grad()
def test_an_infinite_input_reaches_its_tile_only():
    x = torch.randn(1, 3, 24, 24)
    deployed = elastic.deploy(elastic.convert(Block(16, 16).eval(), x, divisor=1))
    x[0, 0, 5, 5] = torch.inf
    y = deployed(x)
    assert "Winograd" in runs_on(deployed, "conv")
    assert not torch.isfinite(y[:, :, 4:7, 4:7]).all()
    assert torch.isfinite(y[:, :, 8:]).all()
    assert torch.isfinite(y[:, :, :, 8:]).all()


@torch.no_grad()
def test_a_whole_network():
    torch.manual_seed(0)
    net, x = models.cifar_resnet20().eval(), torch.randn(8, 3, 32, 32)
    model = elastic.convert(net, x, divisor=4)
    deployed = elastic.deploy(model)
    for width in (1.0, 0.75):
        plain = elastic.extract(model, width).eval()
        exact = copy.deepcopy(plain).double()(x.double())
        deployed.set_width(width)
        y = deployed(x)
        assert error(y, exact) <= 2 * error(plain(x), exact) + FLOOR[torch.float32]
        assert torch.equal(y.argmax(1), exact.argmax(1))
        assert sum("Winograd" in layer.runs_on for layer in deployed.report.layers) >= 8
