"""Saving and loading an elastic model; its report."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from slimkernels import elastic
from tests.elastic.nets import NETS, build


@pytest.mark.parametrize("name", ["resnet20", "densenet", "vgg11", "convnext"])
@pytest.mark.parametrize("widths", [(0.25, 1.0), [0.25, 0.5]])
@torch.no_grad()
def test_round_trip(name, widths, tmp_path):
    net, x = build(name)
    model = elastic.convert(net, x, widths=widths, divisor=4)
    if name in ("resnet20", "densenet"):
        elastic.calibrate(model, [torch.randn_like(x)], [0.5])
    path = tmp_path / "net.safetensors"
    elastic.save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    torch.manual_seed(1)
    loaded = elastic.load(path, NETS[name][0]().eval())
    for width in (1.0, 0.5, 0.25, {next(iter(elastic.plan(model).groups)): 0.5}):
        with elastic.width(model, width), elastic.width(loaded, width):
            assert torch.equal(model(x), loaded(x))
        assert elastic.cost(loaded, width) == elastic.cost(model, width)
    assert str(elastic.report(loaded)) == str(elastic.report(model))


def test_tied_weights_and_other_example(tmp_path):
    def make() -> nn.Module:
        net = nn.Sequential(
            nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 2)
        )
        net[4].weight = net[2].weight
        return net

    model = elastic.convert(make(), torch.randn(1, 4))
    path = tmp_path / "net.safetensors"
    elastic.save(model, path)
    loaded = elastic.load(path, make(), torch.randn(3, 4))
    assert loaded[4].weight is loaded[2].weight
    assert torch.equal(loaded[4].weight, model[4].weight)
    assert elastic.cost(loaded, 1.0).macs == 3 * elastic.cost(model, 1.0).macs


def test_broken_and_foreign_files(tmp_path):
    net, x = build("resnet20")
    path = tmp_path / "net.safetensors"
    with pytest.raises(FileNotFoundError, match="load: no file"):
        elastic.load(path, net)
    elastic.save(elastic.convert(net, x), path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is cut off or no safetensors file"):
            elastic.load(tmp_path / "cut", net)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="was not written by slimkernels"):
        elastic.load(tmp_path / "foreign", net)
    other, _ = build("vgg11")
    with pytest.raises(ValueError, match=r"is of another model: expected 'conv1' with 16 channels \(out\), got none"):
        elastic.load(path, other)
    assert not any(type(m).__name__.startswith("Slim") for m in other.modules())
    with pytest.raises(ValueError, match="elastic already"):
        elastic.load(path, elastic.load(path, net))


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    net, x = build("resnet20")
    model = elastic.convert(net, x)
    path = tmp_path / "net.safetensors"
    elastic.save(model, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("slimkernels.elastic.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        elastic.save(model, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


def test_report():
    net, x = build("resnet20")
    found = elastic.report(elastic.convert(net, x, divisor=4))
    text = str(found)
    for name, group in found.groups.items():
        assert name in text
        assert group.size in (16, 24, 32)
    assert found.smallest["conv1"] == 4
    assert found.calibrated == (1.0,)
    assert "widths between 0.25 and 1, batch norm universal" in text
    assert "no layer was left alone" in text
    assert f"{sum(p.numel() for p in net.parameters()):,}" in text
