"""Batch-norm statistics of all widths in one pass."""

import pytest
import torch
from torch import nn

from slimkernels import elastic
from tests.elastic.nets import build
from tests.helpers import error

WIDTHS = [0.25, 0.5, 1.0]


def reset_statistics(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None


@pytest.mark.parametrize("norm", ["universal", "switchable"])
@pytest.mark.parametrize("name", ["resnet20", "densenet"])
@torch.no_grad()
def test_statistics_are_those_of_the_plain_sub_network(name, norm):
    net, x = build(name)
    model = elastic.convert(net, x, widths=WIDTHS, norm=norm, divisor=4)
    batches = [torch.randn_like(x) for _ in range(3)]
    elastic.calibrate(model, ((b, torch.zeros(len(b))) for b in batches), WIDTHS)
    for width in WIDTHS:
        plain = elastic.extract(model, width)
        again = elastic.extract(model, width)
        reset_statistics(again)
        again.train()
        for b in batches:
            again(b)
        again.eval()
        for (key, mine), right in zip(plain.named_buffers(), again.buffers(), strict=True):
            if mine.is_floating_point():
                assert error(mine, right) < 1e-4, key
        with elastic.width(model, width):
            assert error(model(x), again(x)) < 1e-4
    assert elastic.report(model).calibrated == tuple(WIDTHS)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_mode_width_and_gradients_stay():
    net, x = build("resnet20")
    model = elastic.convert(net, x, divisor=4)
    model.train()
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    elastic.set_width(model, 0.7)
    elastic.calibrate(model, [x], [0.5])
    assert modes == [m.training for m in model.modules()]
    assert elastic.plan(model).current == 0.7
    assert all(p.grad is None for p in model.parameters())
    assert elastic.report(model).calibrated == (0.5, 1.0)


@pytest.mark.parametrize("norm", ["universal", "switchable", "shared"])
def test_a_loader_that_raises_leaves_the_old_statistics(norm):
    net, x = build("resnet20")
    model = elastic.convert(net, x, widths=WIDTHS, norm=norm, divisor=4)
    widths = [0.5] if norm == "shared" else [0.25, 0.5]
    elastic.calibrate(model, [torch.randn_like(x)], widths[-1:])
    before = state(model)

    def loader():
        yield torch.randn_like(x)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        elastic.calibrate(model, loader(), widths)
    after = state(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    with elastic.width(model, 0.5):
        model.eval()(x)


def test_calibrate_errors():
    net, x = build("resnet20")
    model = elastic.convert(net, x, divisor=4)
    before = state(model)
    for args, text in [
        (([x],), "expected widths, as the model takes any between 0.25 and 1, got none"),
        (([x], [0.1]), "expected width between 0.25 and 1, got 0.1"),
        (([x], []), "expected at least one width"),
        (([], [0.5]), "expected at least one batch"),
    ]:
        with pytest.raises(ValueError, match=text):
            elastic.calibrate(model, *args)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    without = elastic.convert(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(2, 4))
    with pytest.raises(ValueError, match="expected a model with batch norms, got none"):
        elastic.calibrate(without, [torch.randn(2, 4)], [0.5])
    shared = elastic.convert(net, x, divisor=4, norm="shared")
    with pytest.raises(ValueError, match="share one set of statistics, got 2"):
        elastic.calibrate(shared, [x], [0.5, 1.0])
