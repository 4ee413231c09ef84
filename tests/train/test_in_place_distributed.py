"""Gradients that add up in slices, in two gloo processes: the mean over ranks of what each half of the batch gives."""

import pytest
import torch.nn.functional as F
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from slimkernels.train.step import accumulate_passes
from tests.train.test_in_place import WIDTHS, check_same_gradients, data, network, ordinary
from tests.two_ranks import two_ranks

# (norm, depth, sub-networks): with depth, and with a norm's entries for each width, the last pass leaves parameters out.
CASES = {
    "shared": ("shared", False, WIDTHS),
    "switchable": ("switchable", False, WIDTHS),
    "depth": ("universal", True, [(1.0, None), (0.5, 0.5), (0.25, 0.34)]),
}


def half(rank):
    return tuple(t[4 * rank : 4 * rank + 4] for t in data(8))


def job(rank, directory):
    found = {}
    for name, (norm, depth, subnets) in CASES.items():
        model = network(norm, depth=depth)
        reduced = []

        def hook(state, bucket, reduced=reduced):
            reduced.append(bucket.index())
            done = distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
            return done.then(lambda f: f.value()[0])

        ddp = DistributedDataParallel(model, find_unused_parameters=name != "shared")
        ddp.register_comm_hook(None, hook)
        found[name] = []
        for before in (False, True):
            model.zero_grad()
            if before:  # gradients that are dropped
                accumulate_passes(ddp, half(rank), F.cross_entropy, subnets, reduce=False)
                model.zero_grad()
            reduced.clear()
            accumulate_passes(ddp, half(rank), F.cross_entropy, subnets)
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found[name].append((gradients, list(reduced)))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_ranks(job, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_mean_over_ranks_reduced_once(ranks, case):
    norm, depth, subnets = CASES[case]
    expected = network(norm, depth=depth)
    for rank in range(2):
        ordinary(expected, half(rank), subnets)
    for p in expected.parameters():
        if p.grad is not None:
            p.grad.div_(2)
    for rank in ranks:
        for gradients, reduced in rank[case]:
            assert reduced == [0]
            model = network(norm, depth=depth)
            for name, gradient in gradients.items():
                model.get_parameter(name).grad = gradient
            check_same_gradients(model, expected)
