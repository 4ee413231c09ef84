"""What needs no kernel to run: shapes on a fake GPU, no copy of a weight, no wait for the GPU, no CUDA at import."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from slimkernels.ops import slim_conv, slim_conv_transpose, slim_linear
from tests.helpers import tensors_in

pytest.importorskip("triton", reason="Triton is not installed")
capture = pytest.importorskip("tests.emulation.capture", reason="needs Triton").capture
kernels = {
    stem: pytest.importorskip(f"slimkernels.triton_kernels.{stem}")
    for stem in ("slim_linear", "slim_conv", "slim_conv_transpose")
}


def test_ops_trace_on_a_fake_gpu():
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, 8, 9, 9, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(32, 16, 3, 3, device="cuda", dtype=torch.bfloat16)
        y = slim_conv(x, weight, None, 20, stride=2, padding=1, activation="gelu")
        assert (y.device.type, y.shape, y.dtype) == ("cuda", (2, 20, 5, 5), torch.bfloat16)
        op = torch.ops.slimkernels.slim_conv_backward.default
        dx, dw, db = op(y, x, weight, [2, 2], [1, 1], [1, 1], 1, True, True, True)
        assert (dx.shape, dw.shape, db.shape, db.device.type) == (x.shape, weight.shape, (32,), "cuda")
        z = slim_conv_transpose(y, weight, None, 12, stride=2)
        assert (z.shape, z.device.type) == ((2, 12, 11, 11), "cuda")
        x, weight = torch.empty(4, 6, device="cuda"), torch.empty(9, 12, device="cuda")
        y = slim_linear(x, weight, None, 6, in_blocks=2, out_blocks=3, activation="silu")
        assert (y.shape, y.device.type) == ((4, 6), "cuda")
        op = torch.ops.slimkernels.slim_linear_backward.default
        assert [g.shape for g in op(y, x, weight, 2, 3, True, True, False)] == [x.shape, weight.shape, (0,)]
    assert not torch.cuda.is_initialized()


class Trace(TorchDispatchMode):
    """Every ATen call, and which of them make a copy of ``weight`` or wait for the GPU."""

    COPIES = ("copy_", "clone", "_to_copy", "contiguous", "index", "cat")
    WAITS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero")

    def __init__(self, weight):
        super().__init__()
        self.storage = weight.untyped_storage().data_ptr()
        self.copies, self.waits, self.calls = [], [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls.append(name)
        sources = tensors_in(args[1:] if name == "copy_" else args)
        reads = any(t.untyped_storage().data_ptr() == self.storage for t in sources)
        if name in self.COPIES and reads:
            self.copies.append(name)
        if name in self.WAITS:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def linear(dtype, **options):
    x, dy, weight = torch.zeros(5, 8, dtype=dtype), torch.zeros(5, 6, dtype=dtype), torch.zeros(12, 16, dtype=dtype)
    blocks = options.get("in_blocks", 1), options.get("out_blocks", 1)
    yield weight, lambda: kernels["slim_linear"].slim_linear(x, weight, weight[:, 0], 6, *blocks, "gelu", dy)
    backward = kernels["slim_linear"].slim_linear_backward
    yield weight, lambda: backward(dy, x, weight, *blocks, True, True, True)


def conv(dtype, spatial=2, groups=1, c=8, n=6):
    geometry = [[1] * spatial] * 3
    x, dy = torch.zeros(2, c, *[5] * spatial, dtype=dtype), torch.zeros(2, n, *[5] * spatial, dtype=dtype)
    weight = torch.zeros(12, 16 // groups, *[3] * spatial, dtype=dtype)
    module = kernels["slim_conv"]
    yield weight, lambda: module.slim_conv(x, weight, None, n, *geometry, groups, "relu", dy)
    yield weight, lambda: module.slim_conv_backward(dy, x, weight, *geometry, groups, True, True, True)


def conv_transpose(dtype):
    x, dy, weight = (torch.zeros(s, dtype=dtype) for s in [(2, 8, 5, 5), (2, 6, 5, 5), (12, 16, 3, 3)])
    geometry = [1, 1], [1, 1], [0, 0], [1, 1], 1
    module = kernels["slim_conv_transpose"]
    yield weight, lambda: module.slim_conv_transpose(x, weight, None, 6, *geometry, "relu", dy)
    yield weight, lambda: module.slim_conv_transpose_backward(dy, x, weight, 0, *geometry, True, True, False)


CALLS = {
    "linear": lambda: linear(torch.bfloat16),
    "linear-blocks": lambda: linear(torch.float32, in_blocks=2, out_blocks=3),
    "linear-composed": lambda: linear(torch.float64),
    "conv": lambda: conv(torch.bfloat16),
    "conv-1d": lambda: conv(torch.float32, spatial=1),
    "conv-groups": lambda: conv(torch.float16, groups=2),
    "conv-3d-composed": lambda: conv(torch.float32, spatial=3),
    "conv-depthwise-composed": lambda: conv(torch.float32, groups=8, n=8),
    "conv-transpose": lambda: conv_transpose(torch.bfloat16),
}


@pytest.mark.parametrize("name", CALLS)
def test_launchers_copy_no_weight_and_never_wait(name):
    for weight, call in CALLS[name]():
        with Trace(weight) as trace:
            launched = capture(call)
        assert trace.copies == []
        assert trace.waits == []
        assert bool(launched) != name.endswith("composed")


def test_the_trace_finds_copies_and_waits():
    weight = torch.zeros(8, 8)
    with Trace(weight) as trace:
        weight[:4, :4].contiguous()
        weight.sum().item()
        torch.empty(8, 8).copy_(weight)
    assert (trace.copies, trace.waits) == (["clone", "copy_"], ["_local_scalar_dense"])


def test_without_triton_the_references_run_and_the_cuda_kernels_still_do():
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "triton" else find(name, *args)
import torch
from slimkernels import _info, triton_kernels
from slimkernels.ops import _common
assert "Triton is not installed" in triton_kernels.reason_missing()
assert "Triton is not installed" in _info.collect()["GPU"]["Triton kernels"]
calls = []
_common.LIBRARY.impl = lambda name, run, key: calls.append(run)
_common.on_gpu("slim_linear", "triton_kernels.slim_linear")
x, weight = torch.randn(3, 4), torch.randn(6, 5)
y = calls[0](x, weight, None, 2, 1, 1, "relu", None)
assert torch.equal(y, torch.relu(x @ weight[:2, :4].t()))
_common.on_gpu("slim_conv", "cuda_kernels.slim_conv_depthwise", "triton_kernels.slim_conv")
from slimkernels.cuda_kernels import slim_conv_depthwise
_common.REASON_MISSING["cuda_kernels"] = lambda: ""
slim_conv_depthwise.available = lambda: True
class Operators:
    def depthwise_forward(self, x, weight, bias, residual, y, geometry, activation):
        y.fill_(7)
slim_conv_depthwise.operators = Operators
x, weight = torch.randn(2, 4, 5, 5), torch.randn(6, 1, 3, 3)
depthwise = calls[1](x, weight, None, 4, [1, 1], [1, 1], [1, 1], 4, "none", None)
assert (depthwise == 7).all()  # the CUDA C++ kernel: it needs no Triton
dense = calls[1](x, torch.randn(6, 5, 3, 3), None, 3, [1, 1], [1, 1], [1, 1], 1, "none", None)
assert dense.shape == (2, 3, 5, 5)
assert not (dense == 7).any()
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
