"""Peak memory of forward and backward over the number of coordinates, each point in a process of its own."""

import subprocess
import sys

import pytest
import torch

from benchmarks.bench_inr_weights import WORKLOADS, Published, Recomputing
from benchmarks.harness import Provider, caller, extra_bytes
from slimkernels._extension import cpp_available
from tests.helpers import DEVICE

SCRIPT = """
import sys, torch
from benchmarks.published_inr import generate
from slimkernels.ops import InrParameters, InrTensor, inr_weights
from tests.ops.test_inr_weights import networks

torch.set_num_threads(1)
way, channels = sys.argv[1], int(sys.argv[2])
p = InrParameters(*(t.requires_grad_() for t in networks(1, 128, 3, 8)))

def step(size):
    tensors, active = [InrTensor(0, 1, (3, 3))], [(size, size)]
    if way == "published":
        weights = generate(p, tensors, active, norm=512.0)
    else:
        weights = inr_weights(p, tensors, active, norm=512.0, save=way)
    torch.autograd.grad(weights, p, [torch.ones_like(w) for w in weights])

def high_water():  # not getrusage: its maximum is inherited from the process that started this one
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

step(8)
before = high_water()
step(channels)
print(high_water() - before)
"""


def peak(way: str, channels: int) -> int:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, way, str(channels)], capture_output=True, text=True, check=True, timeout=300
    )
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.skipif(
    not cpp_available() or DEVICE != "cpu", reason="the C++ kernel's memory: it is not built, or not asked"
)
def test_inr_weights_recompute_needs_memory_for_the_weights_alone():
    curve = {channels: peak("recompute", channels) for channels in (64, 256)}
    weights = {channels: channels**2 * 9 * 4 for channels in curve}
    parameters = 4 * (128 * (6 + 12 * 8) + 3 * 128 * 128 + 9 * 128)
    for channels, extra in curve.items():
        assert extra <= 6 * (weights[channels] + parameters) + 2**21, curve
    assert curve[256] <= peak("published", 256) / 10
    kept = 3 * 128 * 256**2 * 4  # what "full" saves
    assert curve[256] + kept / 2 <= peak("full", 256)


@pytest.mark.skipif(
    not cpp_available() or DEVICE != "cpu", reason="the C++ kernel's memory: it is not built, or not asked"
)
def test_inr_weights_recompute_needs_a_tenth_of_eager():
    """The last block of ResNet-20, by PyTorch's allocator: results, gradients, and the kernel's own arrays."""
    options = (WORKLOADS["resnet20-last-block"], 256, 4, 16, torch.float32)
    taken = {}
    for kind in (Recomputing, Published):
        module = kind(*options)
        scale = torch.ones(4, requires_grad=True)
        call = caller(Provider(module, module, module, (scale,)), "full")
        call()
        taken[kind] = extra_bytes(call)
    gradients = 4 * sum(p.numel() for p in module.parameters())
    assert gradients < taken[Recomputing] <= taken[Published] / 10
