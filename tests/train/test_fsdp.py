"""FSDP2 over two gloo processes: an elastic network trains at several widths as on the whole batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from slimkernels import elastic
from slimkernels.models.resnet import CifarResNet
from slimkernels.train import sandwich_step
from tests.two_ranks import two_ranks

WIDTHS = [1.0, 0.5, 0.25]
STEPS = 3
CASES = {"shared": "root", "switchable": "blocks"}  # norm -> which modules are sharded by themselves


def network(norm, sync):
    torch.manual_seed(0)
    net = CifarResNet(8, (8, 16, 16))
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if sync else net
    widths = WIDTHS if norm == "switchable" else (0.25, 1.0)
    return elastic.convert(net, torch.randn(2, 3, 8, 8), widths=widths, divisor=2, sort=None, norm=norm)


def data():
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 10


def train(model, part):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        found = sandwich_step(model, part, F.cross_entropy, optimizer, widths=WIDTHS)
        losses.append({w: loss.item() for w, loss in found.items()})
    return losses


def job(rank, directory):
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for norm, sharded in CASES.items():
        model = network(norm, sync=True)
        for name, module in model.named_modules() if sharded == "blocks" else ():
            if name.startswith("layer") and name.count(".") == 1:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        losses = train(model, tuple(t[4 * rank : 4 * rank + 4] for t in data()))
        weights = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
        local = sum(p.to_local().numel() for p in model.parameters())
        found[norm] = losses, weights, local
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_ranks(job, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("norm", CASES)
def test_weights_are_those_of_one_process(ranks, norm):
    model = network(norm, sync=False)
    losses = train(model, data())
    for rank in ranks:
        for name, p in model.named_parameters():
            off = (rank[norm][1][name] - p.detach()).norm() / p.detach().norm().clamp_min(1e-3)
            assert off < 1e-3, f"{name}: {off}"
    for step, expected in enumerate(losses):
        for w, loss in expected.items():
            mean = (ranks[0][norm][0][step][w] + ranks[1][norm][0][step][w]) / 2
            assert mean == pytest.approx(loss, rel=1e-3), (step, w)


@pytest.mark.parametrize("norm", CASES)
def test_each_rank_keeps_a_part_of_the_weights(ranks, norm):
    total = sum(p.numel() for p in network(norm, sync=False).parameters())
    held = [rank[norm][2] for rank in ranks]
    assert sum(held) == total
    assert max(held) < 0.6 * total
