"""Two gloo processes on the loopback interface against one process with both halves of the batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from slimkernels.train import SlimmableTrainer, sandwich_step
from tests.train import stand_in
from tests.train.stand_in import OwnWidths, TinyNet, batch, data
from tests.two_ranks import two_ranks

STEPS = 3


def job(rank, directory):
    stand_in.install()
    return {each.__name__: each(rank, directory) for each in (job_sandwich, job_reductions, job_unused, job_trainer)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What every job gave on both ranks; one start of two processes for all."""
    return two_ranks(job, tmp_path_factory.mktemp("ranks"))


def half(rank):
    return tuple(t[6 * rank : 6 * rank + 6] for t in batch(12))


def steps(model, ddp, data, distill="kl", **options):
    torch.manual_seed(distributed.get_rank() + 7 if distributed.is_initialized() else 0)  # ranks differ, on purpose
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    widths, gradients = [], []
    for _ in range(STEPS):
        torch.rand(3)
        widths.append(list(sandwich_step(ddp, data, F.cross_entropy, optimizer, distill=distill, **options)))
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return {"widths": widths, "gradients": gradients}


def job_sandwich(rank, directory):
    model = TinyNet()
    return steps(model, DistributedDataParallel(model), half(rank))


def job_reductions(rank, directory):
    model = TinyNet()
    ddp, calls = DistributedDataParallel(model), []

    def hook(state, bucket):
        calls.append(bucket.index())
        return distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

    ddp.register_comm_hook(None, hook)
    sandwich_step(ddp, half(rank), F.cross_entropy, None)
    return calls


def job_unused(rank, directory):
    model = OwnWidths()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    return steps(model, ddp, half(rank), widths=[1.0, 0.5, 0.25])


def job_trainer(rank, directory):
    def run(folder, total, resume=False):
        model = TinyNet(dropout=0.2)
        sampler = DistributedSampler(data(48), 2, rank, shuffle=True)
        lines = []
        SlimmableTrainer(
            DistributedDataParallel(model),
            F.cross_entropy,
            torch.optim.Adam(model.parameters(), lr=0.01),
            train_loader=DataLoader(data(48), 3, sampler=sampler),
            accumulate=2,
            val_loader=DataLoader(data(13 + rank, rank), 6),
            checkpoint_dir=folder,
            progress=False,
            on_step=lambda step, losses: lines.append((step, {w: loss.item() for w, loss in losses.items()})),
        ).fit(steps=total, resume=resume)
        distributed.barrier()
        return lines, {name: p.detach().clone() for name, p in model.named_parameters()}

    straight, weights = run(f"{directory}/a", 7)
    first, _ = run(f"{directory}/b", 3)
    second, resumed = run(f"{directory}/b", 7, resume=True)
    return {"straight": straight, "resumed": first + second, "weights": weights, "resumed_weights": resumed}


@pytest.mark.parametrize("job", [job_sandwich, job_unused])
def test_widths_are_equal_and_gradients_those_of_one_process(ranks, job, tiny_elastic):
    ranks = [results[job.__name__] for results in ranks]
    options = {"widths": [1.0, 0.5, 0.25]} if job is job_unused else {}
    model = OwnWidths() if job is job_unused else TinyNet()
    alone = steps(model, model, batch(12), **options)
    assert ranks[0]["widths"] == ranks[1]["widths"] == alone["widths"]
    for rank in ranks:
        for ours, expected in zip(rank["gradients"], alone["gradients"], strict=True):
            assert ours.keys() == expected.keys()
            for name in expected:
                torch.testing.assert_close(ours[name], expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_are_reduced_once_a_step(ranks):
    assert [results["job_reductions"] for results in ranks] == [[0], [0]]


def test_trainer_keeps_ranks_equal_and_resumes_exactly(ranks):
    ranks = [results["job_trainer"] for results in ranks]
    for rank in ranks:
        assert rank["resumed"] == rank["straight"]
        for name, value in rank["weights"].items():
            assert torch.equal(value, ranks[0]["weights"][name])
            assert torch.equal(value, rank["resumed_weights"][name])
    widths = [[list(losses) for _, losses in rank["straight"]] for rank in ranks]
    assert widths[0] == widths[1]
    losses = [[list(losses.values()) for _, losses in rank["straight"]] for rank in ranks]
    assert losses[0] != losses[1]  # each its own half of the data
