"""Two gloo processes with half of a batch each against one process with all of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from slimkernels import elastic
from slimkernels.models.resnet import CifarResNet
from slimkernels.nn import SlimBatchNorm2d, SlimSyncBatchNorm
from slimkernels.train.step import accumulate_passes
from tests.two_ranks import two_ranks

WIDTHS = [1.0, 0.75, 0.5, 0.25]
# (dtype, channels-last, affine, activation, residual)
LAYERS = {
    "plain": (torch.float32, False, True, "none", False),
    "channels-last": (torch.float32, True, True, "relu", True),
    "no-affine": (torch.float32, False, False, "silu", True),
    "float64": (torch.float64, False, True, "tanh", False),
    "bfloat16": (torch.bfloat16, True, True, "none", True),
}
SPLIT = 3  # of eight images the first rank has three: the ranks' counts differ


def layer(kind, dtype, affine, activation):
    torch.manual_seed(0)
    norm = kind(16, affine=affine, activation=activation, dtype=torch.float64 if dtype == torch.float64 else None)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


def run_layer(kind, case, rows):
    """Output, gradients and statistics at several widths, of the images ``rows`` of the batch."""
    dtype, last, affine, activation, has_residual = LAYERS[case]
    norm = layer(kind, dtype, affine, activation)
    generator = torch.Generator().manual_seed(1)
    found = {}
    for c in (16, 9, 4):
        x, residual, dy = (torch.randn(8, c, 5, 3, generator=generator, dtype=torch.float64) for _ in range(3))
        x = x * 3 + 20
        order = torch.channels_last if last else torch.contiguous_format
        x, residual, dy = (t[rows].to(dtype).contiguous(memory_format=order) for t in (x, residual, dy))
        x.requires_grad_()
        residual.requires_grad_()
        norm.set_width(c)
        norm.zero_grad()
        y = norm(x, residual if has_residual else None)
        y.backward(dy)
        found[c] = {
            "y": y.detach(),
            "dx": x.grad,
            "dresidual": residual.grad,
            "dw": norm.weight.grad if affine else None,
            "db": norm.bias.grad if affine else None,
            "mean": norm.running_mean.clone(),
            "var": norm.running_var.clone(),
        }
    return found


def network(norm="shared", sync=True):
    torch.manual_seed(0)
    net = CifarResNet(8, (8, 16, 16))
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if sync else net
    widths = WIDTHS if norm == "switchable" else (0.25, 1.0)
    return elastic.convert(net, torch.randn(2, 3, 8, 8), widths=widths, divisor=2, sort=None, norm=norm)


def data():
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 10


def train(model, inner, part):
    accumulate_passes(model, part, F.cross_entropy, WIDTHS)
    state = {n: b.clone() for n, b in inner.named_buffers() if "running" in n}
    return {n: p.grad.clone() for n, p in inner.named_parameters() if p.grad is not None}, state


def job(rank, directory):
    rows = slice(0, SPLIT) if rank == 0 else slice(SPLIT, 8)
    found = {case: run_layer(SlimSyncBatchNorm, case, rows) for case in LAYERS}
    for norm in ("shared", "switchable"):
        model = network(norm)
        half = tuple(t[4 * rank : 4 * rank + 4] for t in data())
        ddp = DistributedDataParallel(model)
        found[norm] = train(ddp, model, half)
    one = SlimSyncBatchNorm(4)
    try:
        one(torch.randn(1 if rank == 0 else 0, 4, 1))
    except ValueError as error:
        found["error"] = str(error)
    one.eval()
    if rank == 0:  # nothing is exchanged: this would hang
        found["eval"] = one(torch.randn(2, 4, 3)).shape
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_ranks(job, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", LAYERS)
def test_layer_equals_that_of_the_whole_batch(ranks, case):
    dtype = LAYERS[case][0]
    whole = run_layer(SlimBatchNorm2d, case, slice(0, 8))
    limit = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2}[dtype]
    for c, expected in whole.items():
        for name, value in expected.items():
            parts = [rank[case][c][name] for rank in ranks]
            if value is None:
                assert parts == [None, None]
                continue
            if name in ("mean", "var"):
                assert torch.equal(parts[0], parts[1])
                got = parts[0]
            else:
                got = parts[0] + parts[1] if name in ("dw", "db") else torch.cat(parts)
            off = (got.double() - value.double()).norm() / value.double().norm()
            assert off < limit, f"{name} at {c} channels: {off}"
        assert ranks[0][case][c]["y"].stride()[1:] == whole[c]["y"].stride()[1:]


@pytest.mark.parametrize("norm", ["shared", "switchable"])
def test_network_trains_as_on_the_whole_batch(ranks, norm):
    model = network(norm, sync=False)
    gradients, state = train(model, model, data())
    for rank in ranks:
        got_gradients, got_state = rank[norm]
        assert got_gradients.keys() == gradients.keys()
        for name, expected in gradients.items():
            off = (got_gradients[name] - expected).norm() / expected.norm().clamp_min(1e-6)
            assert off < 1e-4, f"{name}: {off}"
        for name, expected in state.items():
            torch.testing.assert_close(got_state[name], expected, msg=lambda m, name=name: f"{name}: {m}")


def test_one_value_over_all_ranks(ranks):
    message = "SlimSyncBatchNorm: expected more than 1 value per channel over all ranks in training, got 1"
    assert [rank["error"] for rank in ranks] == [message, message]


def test_eval_exchanges_nothing(ranks):
    assert ranks[0]["eval"] == (2, 4, 3)


def test_alone_it_is_an_ordinary_batch_norm():
    x = torch.randn(4, 6, 5)
    norm, expected = SlimSyncBatchNorm(8), nn.BatchNorm1d(6)
    norm.set_width(6)
    torch.testing.assert_close(norm(x), expected(x))
    torch.testing.assert_close(norm.running_var[:6], expected.running_var)


def test_convert_extract_and_deploy():
    model = network("switchable").eval()
    assert all(type(m) is SlimSyncBatchNorm for n, m in model.named_modules() if n.rpartition(".")[2].startswith("bn"))
    plain = elastic.extract(model, 0.5).eval()
    norms = [m for m in plain.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(type(m) is nn.SyncBatchNorm for m in norms)
    x, _ = data()
    with torch.no_grad(), elastic.width(model, 0.5):
        expected = model(x)
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-4)
    deployed = elastic.deploy(model, widths=[0.5])
    torch.testing.assert_close(deployed(x), expected, rtol=1e-4, atol=1e-4)
