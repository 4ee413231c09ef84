"""Whole steps of training: nothing between the ops waits for the GPU or copies from the host either.

The ops themselves are replayed in ``test_graph_capture.py``; here everything around them is watched: modules, autograd,
the sandwich step and its optimizer.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from slimkernels import elastic
from slimkernels import nn as slim
from slimkernels.train import sandwich_step
from tests.emulation.test_graph_capture import Graph, image, network


@pytest.mark.parametrize("distill", [None, "kl"])
@pytest.mark.parametrize("amp", [None, "bf16"])
def test_a_sandwich_step_never_waits(distill, amp):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, target = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))

    def step():
        sandwich_step(model, (x, target), F.cross_entropy, optimizer, widths=[1.0, 0.25], distill=distill, amp=amp)

    step()  # the first one traces the model, once
    with Graph() as graph:
        step()
    assert graph.broken == []


def test_a_calibrated_width_is_set_and_measured_without_waiting():
    model = network()
    elastic.calibrate(model, [torch.randn(4, 3, 8, 8) for _ in range(2)], widths=[0.25, 0.5])
    elastic.set_width(model, 0.75)  # between two measured ones
    model.to("meta").eval()  # the GPU of this test: numbers cannot be read there
    norms = [module for module in model.modules() if isinstance(module, slim.SlimBatchNorm2d)]
    x = torch.empty(4, 3, 8, 8, device="meta")
    with Graph() as graph, torch.no_grad():
        for width in (0.25, 0.75, 1.0, 0.3):
            elastic.set_width(model, width)
            assert model(x).is_meta
        assert norms[0].calibrated_ratios == (0.25, 0.5, 1.0)
        for norm in norms:
            norm.start_calibration([0.25, 0.6])
        for width in (0.25, 0.6):
            elastic.set_width(model, width)
            model(x)
    assert graph.broken == []


MODULES = {
    "linear": lambda: (slim.SlimLinear(16, 12), torch.randn(5, 9)),
    "conv": lambda: (slim.SlimConv2d(16, 12, 3), image(9, 6, 6)),
    "conv, depthwise": lambda: (slim.SlimConv2d(9, 9, 3, groups=9), image(9, 6, 6)),
    "conv, transposed": lambda: (slim.SlimConvTranspose2d(16, 12, 3), image(9, 6, 6)),
    "batch norm": lambda: (slim.SlimBatchNorm2d(16), image(9, 6, 6)),
    "group norm": lambda: (slim.SlimGroupNorm(4, 16), image(8, 6, 6)),
    "layer norm": lambda: (slim.SlimLayerNorm(16), torch.randn(5, 9)),
    "instance norm": lambda: (slim.SlimInstanceNorm2d(16, affine=True), image(8, 6, 6)),
    "lstm cell": lambda: (slim.SlimLSTMCell(16, 12), torch.randn(5, 9)),
    "gru cell": lambda: (slim.SlimGRUCell(16, 12), torch.randn(5, 9)),
    "rms norm": lambda: (slim.SlimRMSNorm(16), torch.randn(5, 9)),
    "embedding": lambda: (slim.SlimEmbedding(16, 12), torch.randint(16, (5, 3))),
    "lstm": lambda: (slim.SlimLSTM(16, 12), torch.randn(5, 3, 9)),
    "gru": lambda: (slim.SlimGRU(16, 12), torch.randn(5, 3, 9)),
    "attention": lambda: (slim.SlimMultiheadAttention(16, 4), *[torch.randn(5, 3, 9)] * 3),
    "attention, masked": lambda: (
        slim.SlimMultiheadAttention(16, 4),
        *(torch.randn(n, 3, 9) for n in (5, 6, 6)),
        torch.zeros(3, 6, dtype=torch.bool),
        False,
        torch.zeros(5, 6),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_never_wait(name):
    module, *inputs = MODULES[name]()
    with Graph() as graph:
        found = module(*inputs)
        (found if isinstance(found, torch.Tensor) else found[0]).sum().backward()
    assert graph.broken == []


def test_every_module_is_there():
    kinds = {type(make()[0]) for make in MODULES.values()}
    named = {getattr(slim, name) for name in slim.__all__ if name.startswith("Slim")}
    # 1d and 3d are the 2d modules' code, and a batch norm over processes talks to them.
    left_out = {k for k in named if k.__name__.endswith(("1d", "3d")) or "Sync" in k.__name__}
    assert named - left_out <= kinds


def test_a_library_that_does_not_load_is_a_reason_and_no_error(tmp_path):
    code = f"""
import importlib.util, sys, torch
torch.version.cuda = "13.0"
from slimkernels import cuda_kernels
open(r"{tmp_path}/_cuda.abi3.so", "w").write("no library")
import slimkernels
slimkernels.__path__ = [r"{tmp_path}"]
print(cuda_kernels.reason_missing())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("built for another machine or torch ("), done.stderr
