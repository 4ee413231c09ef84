"""Folding and replacing batch norms."""

import pytest
import torch
from torch import nn

from slimkernels import elastic, hyper
from slimkernels.models import CifarResNet
from tests.elastic import nets


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "mobilenet_v2", "vgg11_bn", "googlenet", "unet"])
def test_folded_network_computes_the_same(name):
    net, x = nets.build(name)
    count = len(norms(net))
    with torch.no_grad():
        expected = net(x)
        folded = hyper.fold_batch_norm(net, x)
        torch.testing.assert_close(folded(x), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert count > 0
    assert len(norms(net)) == count
    assert norms(folded) == []


def test_transposed_and_grouped_layers_fold():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.BatchNorm2d(6),
        nn.Flatten(), nn.Linear(6 * 36, 5, bias=False), nn.BatchNorm1d(5),
    )  # fmt: skip
    for _ in range(3):
        net(torch.randn(4, 4, 6, 6))
    net.eval()
    x = torch.randn(2, 4, 6, 6)
    folded = hyper.fold_batch_norm(net, x)
    torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-5)
    assert [type(folded[i]) for i in (1, 3, 6)] == [nn.Identity] * 3


@pytest.mark.parametrize(("strategy", "start"), [("skipinit", 0.0), ("learned_scalar", 1.0)])
def test_learned_residual_scalars(strategy, start):
    net, x = nets.build("resnet20")
    made = hyper.replace_batch_norm(net, x, strategy)
    scales = {name: m for name, m in made.named_modules() if isinstance(m, hyper.Scale)}
    assert len(scales) == 9
    assert all(name.endswith("bn2") for name in scales)
    assert all(m.alpha.item() == start and m.alpha.requires_grad for m in scales.values())
    if start:
        torch.testing.assert_close(made(x), net(x), rtol=1e-3, atol=1e-4)
    else:
        y = torch.rand(1, 16, 4, 4)
        assert torch.equal(made.layer1[0](y), y)
    made(x).sum().backward()
    assert all(m.alpha.grad is not None for m in scales.values())


def test_scaled_sum_scales_both_branches():
    net, x = nets.build("resnet20")
    made, folded = (hyper.replace_batch_norm(net, x, strategy) for strategy in ("scaled_sum", "fold"))
    for block, channels in ((0, 16), (1, 16)):
        y = torch.randn(2, channels, 4, 4)
        torch.testing.assert_close(made.layer1[block](y), folded.layer1[block](y) / 2**0.5)
    y = torch.randn(2, 24, 4, 4)
    torch.testing.assert_close(made.layer3[0](y), folded.layer3[0](y) / 2**0.5)
    assert not any(m.alpha.requires_grad for m in made.modules() if isinstance(m, hyper.Scale))


def test_replaced_networks_are_elastic():
    net, x = nets.build("resnet20")
    for strategy in ("fold", "learned_scalar", "scaled_sum"):
        made = hyper.replace_batch_norm(net, x, strategy)
        model = elastic.convert(made, x, divisor=4)
        assert len(elastic.plan(model).groups) == 12
        torch.testing.assert_close(model(x), made(x), rtol=1e-4, atol=1e-5)


def test_keep_and_modes():
    net, x = nets.build("resnet20")
    assert len(norms(hyper.replace_batch_norm(net, x, "keep"))) == len(norms(net))
    net.train()
    assert hyper.fold_batch_norm(net, x).training
    assert net.training


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        nn.init.uniform_(self.bn.weight, 2, 3)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


def test_errors():
    net, x = nets.build("resnet20")
    with pytest.raises(ValueError, match=r"expected strategy to be one of fold, .*, got 'drop'"):
        hyper.replace_batch_norm(net, x, "drop")
    with pytest.raises(ValueError, match="a layer before a batch norm is used in another place too"):
        hyper.fold_batch_norm(Reused(), torch.randn(1, 3, 2, 2))
    with pytest.raises(ValueError, match="got none of them"):
        hyper.fold_batch_norm(nn.Sequential(nn.Conv2d(3, 3, 1)), torch.randn(1, 3, 2, 2))
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="expected residual branches that end in a batch norm for 'skipinit'"):
        hyper.replace_batch_norm(plain, torch.randn(1, 3, 2, 2), "skipinit")
    with pytest.raises(ValueError, match="before convert"):
        hyper.fold_batch_norm(elastic.convert(CifarResNet(20, (8, 8, 8)), x, norm="shared"), x)
    other, x = nets.build("resnet50")
    with pytest.raises(ValueError, match=r"expected a module for the shortcut beside 'layer1.1.bn3'"):
        hyper.replace_batch_norm(other, x, "scaled_sum")
