"""``slim_linear`` for GPUs, interpreted: every width, layout, block slice, activation and split."""

import pytest
import torch

from slimkernels.ops import slim_linear
from slimkernels.ops._common import ACTIVATIONS
from tests.emulation.launchers import launched_on_cpu
from tests.helpers import DTYPES, ODD_SIZES, check_as_good_as_pytorch, dtype_id, layouts
from tests.ops.test_slim_linear import oracle, sample

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.interpreted
SOME = [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow_emulation) for dtype in DTYPES[::2])]


@pytest.fixture(autouse=True)
def _on_cpu():
    with launched_on_cpu("slim_linear"):
        yield


@pytest.mark.parametrize("dtype", SOME, ids=dtype_id)
@pytest.mark.parametrize("size", ODD_SIZES)
def test_slim_linear_interpreted_odd_sizes(size, dtype):
    for m, n, k in [(7, size, 33), (size, 21, 17), (5, 9, size)]:
        args, kwargs = sample(m, n, k, n + 6, k + 3, residual=True, activation="relu")
        check_as_good_as_pytorch(slim_linear, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("dtype", SOME, ids=dtype_id)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slim_linear_interpreted_activations(activation, dtype):
    args, kwargs = sample(37, 24, 40, 32, 64, residual=True, activation=activation)
    with torch.no_grad():  # fused; with gradients those that need their input are an op of their own
        torch.testing.assert_close(slim_linear(*args, **kwargs), oracle(*args, **kwargs), rtol=1e-4, atol=1e-5)
    check_as_good_as_pytorch(slim_linear, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_slim_linear_interpreted_layouts(dtype):
    (x, weight, bias, n), kwargs = sample(11, 20, 24, 32, 48, lead=(3,), residual=True)
    for (_, view), (_, residual) in zip(layouts(x), reversed(list(layouts(kwargs["residual"]))), strict=True):
        check_as_good_as_pytorch(slim_linear, oracle, (view, weight, bias, n), {"residual": residual}, dtype)
    for _, view in layouts(weight):
        check_as_good_as_pytorch(slim_linear, oracle, (x, view, bias, n), kwargs, dtype)
    for _, view in layouts(bias):
        check_as_good_as_pytorch(slim_linear, oracle, (x, weight, view, n), kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("in_blocks", "out_blocks"), [(1, 2), (2, 1), (2, 3), (3, 1)])
def test_slim_linear_interpreted_blocks(in_blocks, out_blocks, dtype):
    blocks = {"in_blocks": in_blocks, "out_blocks": out_blocks}
    for part in (7, 48):
        args, kwargs = sample(13, 5 * out_blocks, part * in_blocks, 8 * out_blocks, 50 * in_blocks)
        check_as_good_as_pytorch(slim_linear, oracle, args, kwargs | blocks, dtype)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (1, 1, 1, 8)])
def test_slim_linear_interpreted_empty_and_small_batches(shape):
    x, weight, bias = torch.randn(shape), torch.randn(12, 16), torch.randn(12)
    check_as_good_as_pytorch(slim_linear, oracle, (x, weight, bias, 9), {}, torch.float32)


@pytest.mark.parametrize("seed", [0, 1])
def test_slim_linear_interpreted_splits_long_sums(seed):
    from tests.emulation import interpreter

    interpreter.set_seed(seed)
    for blocks in ((1, 1), (2, 2)):
        args, kwargs = sample(2100, 24, 16, 48, 32)
        kwargs |= {"in_blocks": blocks[0], "out_blocks": blocks[1]}
        check_as_good_as_pytorch(slim_linear, oracle, args, kwargs, torch.bfloat16)
        launches = [one for one in interpreter.LAUNCHES if one.name == "_slim_linear_bwd_w_kernel"]
        assert launches


@pytest.mark.parametrize("dtype", SOME, ids=dtype_id)
def test_slim_linear_interpreted_large_tiles(dtype, monkeypatch):
    from slimkernels.triton_kernels import _common

    monkeypatch.setattr(_common, "MULTIPROCESSORS", 1)
    args, kwargs = sample(300, 144, 96, 160, 96, residual=True, activation="gelu")
    check_as_good_as_pytorch(slim_linear, oracle, args, kwargs, dtype)


def test_slim_linear_interpreted_in_tf32(monkeypatch):
    monkeypatch.setattr("slimkernels.triton_kernels.slim_linear.matmul_precision", lambda dtype: "tf32")
    (x, weight, bias, n), _ = sample(30, 20, 40, 32, 64)
    expected = oracle(x.double(), weight.double(), bias.double(), n)
    difference = (slim_linear(x, weight, bias, n).double() - expected).norm() / expected.norm()
    assert 1e-5 < difference < 1e-3


def test_slim_linear_interpreted_composes_float64():
    args, kwargs = sample(5, 4, 6, 8, 8, activation="gelu")
    check_as_good_as_pytorch(slim_linear, oracle, args, kwargs, torch.float64)
