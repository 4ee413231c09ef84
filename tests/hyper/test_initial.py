"""Where generated weights without a base start: fitted to the target, standardized, smooth over the size."""

import pytest
import torch
from torch import nn

from slimkernels import elastic, hyper


def block(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))
    x = torch.randn(2, 3, 6, 6)
    model = elastic.convert(net, x, divisor=1)
    return hyper.WeightGenerator(model, **{"base": None, "hidden": 64, "layers": 3, "noise": "none", **options}), x


def test_reconstruct_fits_trained_weights():
    gen, x = block()
    with elastic.width(gen.target, 1.0):
        expected = gen.target(x).detach()
    before = (gen.call(x) - expected).norm() / expected.norm()
    distances = hyper.reconstruct(gen, 300, 0.01)
    assert max(distances.values()) < 0.05, distances
    after = (gen.call(x) - expected).norm() / expected.norm()
    assert after < 0.2 < before
    assert all(p.grad is None for p in gen.parameters())


def test_reconstruct_is_harder_with_the_published_residual_scalars():
    found = [sum(hyper.reconstruct(block(skip=s, layers=4)[0], 60, 0.01).values()) for s in (1.0, 0.1)]
    assert found[0] < found[1]


def test_reconstruct_fits_one_block_only():
    gen, _ = block(blocks=["0", "2", "5"])
    kept = [p.clone() for p in gen.networks[0].parameters()]
    assert set(hyper.reconstruct(gen, 2, block=1)) == {"2.weight", "2.bias"}
    assert all(torch.equal(a, b) for a, b in zip(kept, gen.networks[0].parameters(), strict=True))


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_standardized_channels_keep_the_variance(width):
    gen, _ = block(standardized=True)
    for w in gen(width).values():
        if w.dim() > 1:
            rows = w.flatten(1)
            torch.testing.assert_close(rows.mean(1), torch.zeros(len(rows)), rtol=0, atol=1e-6)
            wanted = torch.full((len(rows),), 2 / rows.shape[1])
            torch.testing.assert_close(rows.square().mean(1), wanted, rtol=1e-3, atol=0)
    sum(w.square().sum() for w in gen(width).values()).backward()
    assert gen.networks[0].gain.grad.abs().sum() > 0


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_centered_channels_are_not_nearly_equal(width):
    kernels = {kind: block(standardized=kind)[0](width)["2.weight"].flatten(1) for kind in (True, "centered")}
    torch.testing.assert_close(kernels["centered"].mean(1), torch.zeros(len(kernels[True])), rtol=0, atol=1e-6)
    alike = {kind: torch.corrcoef(w).triu(1).abs().sum().item() for kind, w in kernels.items()}
    assert alike["centered"] < 0.7 * alike[True]


def test_standardized_transposed_convolution():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3))
    model = elastic.convert(net, torch.randn(1, 3, 5, 5), divisor=1)
    w = hyper.WeightGenerator(model, base=None, standardized=True, hidden=16, layers=2).eval()(0.5)["2.weight"]
    assert w.shape == (4, 6, 3, 3)
    torch.testing.assert_close(w.mean((0, 2, 3)), torch.zeros(6), rtol=0, atol=1e-6)


def test_high_bands_of_the_sizes_are_not_used():
    gen, _ = block(bands=4, size_bands=1)
    n = gen.networks[0]
    sum(w.square().sum() for w in gen(0.5).values()).backward()
    unused = (n.used == 0).expand_as(n.w_in)
    weight, bias = n.used[0, 0], n.used[1, 0]  # of the first convolution
    assert int((weight == 0).sum()) == 2 * 2 * 4 + 2 * 2 * 3  # layer and layers: no band, the two sizes: one of four
    assert int((bias == 0).sum()) == 2 * 3 * 4 + 2 * 2 * 3  # nor the input channel, of which there is one
    assert not n.w_in[unused].any()
    assert not n.w_in.grad[unused].any()
    assert block(bands=4, size_bands=None)[0].networks[0].used is None


def test_errors():
    with pytest.raises(ValueError, match="expected a generator without base and not standardized, got base='residual'"):
        hyper.reconstruct(block(base="residual")[0])
    with pytest.raises(ValueError, match="not standardized, got standardized weights"):
        hyper.reconstruct(block(standardized=True)[0])
    with pytest.raises(ValueError, match="expected standardized weights without base only, got base='residual'"):
        block(base="residual", standardized=True)
    with pytest.raises(ValueError, match="expected standardized to be one of False, True, 'centered', got 'rows'"):
        block(standardized="rows")
    with pytest.raises(ValueError, match="expected size_bands to be an integer or None, got -1"):
        block(size_bands=-1)


@torch.no_grad()
@pytest.mark.parametrize("standardized", [False, True])
def test_match_outputs_gives_layers_the_variation_of_the_targets(standardized):
    gen, _ = block(standardized=standardized)
    x = torch.randn(32, 3, 6, 6)
    hyper.match_outputs(gen.eval(), x)
    for depth in (1, 3, 6):  # after each layer
        a, b = (net[:depth](x).std(0).mean() for net in (gen.materialize(), elastic.extract(gen.target, 1.0)))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=0)


@torch.no_grad()
def test_match_outputs_makes_the_networks_own_output_small():
    gen, _ = block(standardized="centered")
    x = torch.randn(32, 3, 6, 6)
    hyper.match_outputs(gen.eval(), x, last=0.25)
    torch.testing.assert_close(float(gen.materialize()(x).std(0).mean()), 0.25, rtol=1e-3, atol=0)
    a, b = (net[:3](x).std(0).mean() for net in (gen.materialize(), elastic.extract(gen.target, 1.0)))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=0)
