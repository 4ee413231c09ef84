"""``slim_conv_transpose`` for GPUs, interpreted: its kernels are ``slim_conv``'s, in other roles."""

import pytest
import torch

from slimkernels.ops import slim_conv_transpose
from tests.emulation.launchers import launched_on_cpu
from tests.helpers import DTYPES, check_as_good_as_pytorch, dtype_id
from tests.ops.test_slim_conv_transpose import oracle, sample

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.interpreted
slow = pytest.mark.slow_emulation


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setattr("slimkernels.triton_kernels._conv.conv_precision", lambda dtype: "ieee")
    with launched_on_cpu("slim_conv_transpose"):
        yield


@pytest.mark.parametrize("c", [5, 18])
@pytest.mark.parametrize("channels_last", [True, pytest.param(False, marks=slow)])
@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel": (2, 2), "stride": 2},
        {"kernel": (3, 3), "stride": 2, "padding": 1, "output_padding": 1, "activation": "relu"},
        {"kernel": (4, 3), "stride": (3, 1), "padding": (0, 2), "dilation": (1, 2), "activation": "silu"},
        {"kernel": (1, 1)},
    ],
    ids=str,
)
def test_slim_conv_transpose_interpreted(geometry, channels_last, c):
    args, kwargs = sample(c, 7, c + 3, 9, size=(5, 4), channels_last=channels_last, **geometry)
    check_as_good_as_pytorch(slim_conv_transpose, oracle, args, kwargs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("groups", "per_in", "per_out"), [(2, 3, 5), (6, 1, 1), (2, 18, 17)])
def test_slim_conv_transpose_interpreted_groups(groups, per_in, per_out, dtype):
    c, n = groups * per_in, groups * per_out
    args, kwargs = sample(c, n, 2 * c, 2 * n, (3, 3), (4, 5), groups=groups, stride=2, channels_last=True)
    check_as_good_as_pytorch(slim_conv_transpose, oracle, args, kwargs, dtype)


@pytest.mark.parametrize(("kernel", "size"), [((4,), (9,)), ((2, 2, 2), (3, 2, 4))])
def test_slim_conv_transpose_interpreted_1d_and_3d(kernel, size):
    args, kwargs = sample(5, 6, 8, 9, kernel, size, stride=2)
    check_as_good_as_pytorch(slim_conv_transpose, oracle, args, kwargs, torch.bfloat16)
