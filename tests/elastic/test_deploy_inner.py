"""Networks that cannot be traced: what they call is deployed by itself."""

import copy

import pytest
import torch
from torch import nn

from slimkernels import elastic
from slimkernels._extension import _C
from tests.elastic.test_deploy import check_like_extracted
from tests.helpers import error


class Output(dict):
    """As libraries of transformers return: a dict with attributes."""

    @property
    def last(self):
        return self["last"]


class Mlp(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(size, 24), nn.Linear(size, 24), nn.Linear(24, size)

    def forward(self, x, scale=None):
        y = self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return y if scale is None else y * scale


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm, self.mlp, self.extra = nn.LayerNorm(size), Mlp(size), nn.Linear(size, size)

    def forward(self, x, scale=None, **kwargs):
        rows, _ = x.shape[0], kwargs.get("unused")
        if rows > 1000:  # reads a size
            raise ValueError("too many")
        return x + self.mlp(self.norm(x), scale=scale) + self.extra(x.to(self.extra.weight.dtype)), kwargs


class Untraceable(nn.Module):
    """Reads values, passes arguments on by name, returns tuples and a dict of its own, looks at its layers' attributes."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(6, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(2))
        self.spare = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.out = nn.Linear(16, 3)

    def forward(self, x, scale=None):
        x = self.enter(x.to(self.enter.weight.dtype))
        for block in self.blocks:
            assert isinstance(block, Block)
            x, _ = block(x, scale=scale, unused=1)
        if x.sum() > 1e9:
            x = self.spare(x)
        assert self.spare[0].in_features
        return Output(last=self.out(x), hidden=x)


def untraceable():
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    return elastic.convert(Untraceable().eval(), x, divisor=1), x


@torch.no_grad()
def test_parts_are_deployed_and_give_what_the_extracted_network_gives():
    model, x = untraceable()
    deployed = elastic.deploy(model)
    assert not deployed.report.layers  # packed when they are called
    scale = torch.randn(16)
    for width in (1.0, 0.5, 0.3):
        plain = elastic.extract(model, width).eval()
        deployed.set_width(width)
        # Others than in the last call: the parts are traced anew.
        for arguments in ({}, {"scale": scale}, {}):
            found, expected = deployed(x, **arguments), plain(x, **arguments)
            assert type(found) is Output
            assert error(found.last, expected.last) < 1e-5
            assert error(found["hidden"], expected["hidden"]) < 1e-5
    report = deployed.report
    assert set(report.stopped) == {"", "blocks.0", "blocks.1"}
    layers = {layer.name: layer for layer in report.layers}
    assert set(layers) == {
        "enter",
        "out",
        *(f"blocks.{i}.{p}" for i in range(2) for p in ("extra", "mlp.up", "mlp.gate", "mlp.down")),
    }
    assert layers["blocks.1.mlp.gate"].operation == "linear + silu"
    assert layers["enter"].segment != layers["out"].segment
    assert "blocks.0 is not traced, what it calls is deployed by itself" in str(report)


@torch.no_grad()
def test_the_model_and_its_copies_keep_their_forward():
    model, x = untraceable()
    before = model(x).last
    deployed = elastic.deploy(model)
    deployed(x)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(x).last, before)
    model.out.weight.add_(1)  # written to: packed anew
    assert error(deployed(x).last, model(x).last) < 1e-5


@torch.no_grad()
def test_bfloat16_packs_the_weights_before_they_are_rounded():
    if _C is not None and not _C.deploy_has_bfloat16():
        pytest.skip("no bfloat16 products")
    model, x = untraceable()
    found = elastic.deploy(model, dtype=torch.bfloat16)(x).last
    exact = copy.deepcopy(elastic.extract(model, 1.0)).double()(x.double()).last
    rounded = elastic.extract(model, 1.0).bfloat16()(x.bfloat16()).last
    assert found.dtype == torch.bfloat16
    assert error(found, exact) <= 2 * error(rounded, exact) + 1e-2


@torch.no_grad()
def test_bytes_of_parts_count():
    model, x = untraceable()
    deployed = elastic.deploy(model, widths=[1.0, 0.5])
    unpacked = deployed.cache_bytes
    deployed(x)
    one = deployed.cache_bytes
    assert one > unpacked
    deployed.set_width(0.5)
    deployed(x)
    both = deployed.cache_bytes
    assert both > one
    tight = elastic.deploy(model, widths=[1.0, 0.5], max_cache_bytes=both - 1)
    expected = tight(x).last
    tight.set_width(0.5)
    tight(x)  # no room for both once it is packed: the other makes way
    assert tight.cached == [(0.5, None)]
    tight.set_width(1.0)
    assert torch.equal(tight(x).last, expected)
    small = elastic.deploy(model, max_cache_bytes=unpacked)
    with pytest.raises(ValueError, match="deploy: expected max_cache_bytes of at least"):
        small(x)


class Mixed(nn.Module):
    """A layer that does not run in C++, in a part of its own."""

    def __init__(self):
        super().__init__()
        self.odd = nn.Sequential(nn.Conv1d(4, 8, 3, padding="same", padding_mode="circular"), nn.Softplus())
        self.conv = nn.Conv1d(8, 4, 1)

    def forward(self, x):
        y = self.odd(x)
        return self.conv(y) if x.abs().sum() > 0 else y


@torch.no_grad()
def test_parts_without_work_run_as_they_are():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 9)
    model = elastic.convert(Mixed().eval(), x, divisor=1)
    deployed = elastic.deploy(model)
    for width in (1.0, 0.5):
        check_like_extracted(deployed, model, x, width)
