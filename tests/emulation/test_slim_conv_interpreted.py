"""``slim_conv`` for GPUs, interpreted: every width, geometry, layout, grouping, activation and split."""

import pytest
import torch

from slimkernels.ops import slim_conv
from slimkernels.ops._common import ACTIVATIONS
from tests.emulation.launchers import launched_on_cpu
from tests.helpers import DTYPES, ODD_SIZES, check_as_good_as_pytorch, dtype_id, layouts
from tests.ops.test_slim_conv import GEOMETRIES, oracle, sample

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.interpreted
slow = pytest.mark.slow_emulation
SOME = [torch.bfloat16, *(pytest.param(dtype, marks=slow) for dtype in DTYPES[::2])]


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr("slimkernels.triton_kernels._conv.conv_precision", lambda dtype: "ieee")
    with launched_on_cpu("slim_conv"):
        yield


@pytest.mark.parametrize("dtype", SOME, ids=dtype_id)
@pytest.mark.parametrize("channels_last", [True, pytest.param(False, marks=slow)])
@pytest.mark.parametrize("width", ODD_SIZES)
def test_slim_conv_interpreted_odd_widths(width, channels_last, dtype):
    for c, n in [(width, 6), (6, width)]:
        args, kwargs = sample(c, n, c + 3, n + 5, (3, 3), (4, 5), channels_last=channels_last, padding=1)
        check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("c", [5, 20])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_slim_conv_interpreted_geometry(geometry, c):
    args, kwargs = sample(c, 7, c + 3, 9, size=(11, 10), channels_last=True, activation="relu", **geometry)
    check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, torch.float32)


@pytest.mark.parametrize("dtype", SOME, ids=dtype_id)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slim_conv_interpreted_activations(activation, dtype):
    args, kwargs = sample(8, 9, 12, 12, (3, 3), (5, 6), channels_last=True, activation=activation, padding=1)
    with torch.no_grad():
        torch.testing.assert_close(slim_conv(*args, **kwargs), oracle(*args, **kwargs), rtol=1e-4, atol=1e-5)
    check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("dtype", SOME, ids=dtype_id)
@pytest.mark.parametrize(("groups", "per_in", "per_out"), [(2, 3, 5), (3, 4, 2), (5, 1, 3), (2, 20, 18), (6, 1, 1)])
def test_slim_conv_interpreted_groups(groups, per_in, per_out, dtype):
    c, n = groups * per_in, groups * per_out
    args, kwargs = sample(c, n, 2 * c, 2 * n, (3, 3), (6, 5), channels_last=True, groups=groups, padding=1)
    check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("dtype", SOME, ids=dtype_id)
@pytest.mark.parametrize(
    ("kernel", "size", "geometry"),
    [
        ((5,), (20,), {"padding": 2}),
        ((4,), (19,), {"stride": 3, "dilation": 2, "padding": 1}),
        ((1,), (7,), {}),
        ((2, 3, 2), (5, 6, 4), {"padding": 1}),
    ],
)
def test_slim_conv_interpreted_1d_and_3d(kernel, size, geometry, dtype):
    for c in (5, 18):
        args, kwargs = sample(c, 9, c + 2, 11, kernel, size, activation="silu", **geometry)
        check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, dtype)


def test_slim_conv_interpreted_layouts():
    (x, weight, bias, n), kwargs = sample(6, 7, 8, 9, (3, 2), (6, 5), activation="elu")
    for (_, view), (_, residual) in zip(layouts(x), reversed(list(layouts(kwargs["residual"]))), strict=True):
        arguments = kwargs | {"residual": residual}
        check_as_good_as_pytorch(slim_conv, oracle, (view, weight, bias, n), arguments, torch.float32)
    for _, view in layouts(weight):
        check_as_good_as_pytorch(slim_conv, oracle, (x, view, bias, n), kwargs, torch.float32)


@pytest.mark.parametrize("channels_last", [True, False])
def test_slim_conv_interpreted_keeps_the_memory_format(channels_last):
    (x, weight, _, n), _ = sample(6, 7, 8, 9, (3, 3), (6, 5), channels_last=channels_last, residual=False)
    y = slim_conv(x.requires_grad_(), weight, None, n)
    expected = torch.channels_last if channels_last else torch.contiguous_format
    assert y.is_contiguous(memory_format=expected)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.is_contiguous(memory_format=expected)


def test_slim_conv_interpreted_empty_and_without_batch():
    for shape in [(0, 6, 5, 5), (6, 5, 5)]:
        args = torch.randn(shape), torch.randn(9, 8, 3, 3), torch.randn(9), 7
        check_as_good_as_pytorch(slim_conv, oracle, args, {"padding": 1}, torch.float32)


@pytest.mark.parametrize(("c", "seed"), [(5, 0), (20, 1)])
def test_slim_conv_interpreted_splits_long_sums(seed, c):
    from tests.emulation import interpreter

    interpreter.set_seed(seed)
    args, kwargs = sample(c, 7, c + 1, 9, (2, 2), (31, 32), channels_last=True, residual=False)
    check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, torch.bfloat16)


@slow
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_slim_conv_interpreted_large_tiles(dtype, monkeypatch):
    from slimkernels.triton_kernels import _common

    monkeypatch.setattr(_common, "MULTIPROCESSORS", 1)
    args, kwargs = sample(64, 144, 64, 144, (3, 3), (13, 13), channels_last=True, activation="silu", padding=1)
    check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, dtype)
