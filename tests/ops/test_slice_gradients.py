"""``slim_conv_backward_slice`` and ``slim_batch_norm_backward_slice``: the full gradients, cut to the active slice; and
convolutions of few channels, several pixels of which share a vector."""

import pytest
import torch
import torch.nn.functional as F

from slimkernels.ops import slim_conv
from tests.helpers import DTYPES, check_as_good_as_pytorch, dtype_id

OPS = torch.ops.slimkernels


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_id)
@pytest.mark.parametrize(
    ("c", "n", "kernel", "groups", "size"),
    [(5, 7, 3, 1, 9), (16, 24, 1, 1, 8), (48, 40, 3, 1, 17), (6, 6, 3, 6, 2), (6, 6, 5, 6, 9)],
)
def test_conv_gradients_of_the_slice_are_those_of_the_whole(dtype, c, n, kernel, groups, size):
    x, weight = (
        channels_last(2, c, size, size).to(dtype),
        torch.randn(n + 2, c // groups + (groups == 1), kernel, kernel),
    )
    weight = weight.to(dtype)
    dy = channels_last(2, n, size, size).to(dtype)
    geometry = [1, 1], [kernel // 2, kernel // 2], [1, 1], groups
    args = dy, x, weight, *geometry
    for needs in ((True, True, True), (False, True, False), (True, False, True)):
        full, part = OPS.slim_conv_backward(*args, *needs), OPS.slim_conv_backward_slice(*args, *needs)
        assert torch.equal(full[0], part[0])
        assert torch.equal(full[1][:n, : c // groups] if needs[1] else full[1], part[1])
        assert torch.equal(full[2][:n] if needs[2] else full[2], part[2])
    torch.library.opcheck(OPS.slim_conv_backward_slice.default, (*args, True, True, True))
    args = dy, x, weight.contiguous(memory_format=torch.channels_last), *geometry
    torch.library.opcheck(OPS.slim_conv_backward_slice.default, (*args, True, True, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
def test_norm_gradients_of_the_slice_are_those_of_the_whole(dtype):
    x, dy = channels_last(3, 5, 4, 4).to(dtype), channels_last(3, 5, 4, 4).to(dtype)
    weight, bias = torch.randn(8, dtype=dtype), torch.randn(8, dtype=dtype)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var = torch.randn(5, dtype=statistics), torch.rand(5, dtype=statistics) + 0.5
    args = dy, x, mean, var, weight, bias, None, None, True, 1e-5, "relu", True, True, True, False
    full, part = OPS.slim_batch_norm_backward(*args), OPS.slim_batch_norm_backward_slice(*args)
    for f, p in zip(full, part, strict=True):
        assert torch.equal(f[: len(p)], p)
    assert part[1].shape == part[2].shape == (5,)
    torch.library.opcheck(OPS.slim_batch_norm_backward_slice.default, args)


# (channels in, out, kernel, stride, padding, dilation)
NARROW = [
    (4, 4, 3, 1, 1, 1),
    (8, 8, 3, 1, 1, 1),
    (3, 5, 3, 1, 1, 1),
    (6, 8, 5, 1, 2, 1),
    (4, 8, 3, 2, 1, 1),
    (8, 2, 3, 1, 2, 2),
    (4, 1, 3, 1, 0, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", NARROW, ids=str)
@pytest.mark.parametrize("width", [8, 18])
def test_narrow_convolutions(dtype, shape, width):
    c, n, kernel, stride, padding, dilation = shape
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    x, weight, bias = channels_last(2, c, 6, width), torch.randn(n + 3, c + 2, kernel, kernel), torch.randn(n + 3)
    residual = channels_last(*F.conv2d(x, weight[:n, :c], None, **options).shape)

    def ours(x, weight, bias, residual):
        return slim_conv(x, weight, bias, n, activation="relu", residual=residual, **options)

    def oracle(x, weight, bias, residual):
        return F.relu(F.conv2d(x, weight[:n, :c], bias[:n], **options) + residual)

    check_as_good_as_pytorch(ours, oracle, (x, weight, bias, residual), {}, dtype)
