"""Tensors of more than 2^31 elements, whose addresses do not fit 32 bits: on a GPU only."""

import pytest
import torch
from torch.nn import functional as F

from slimkernels.ops import slice_accumulate_, slim_batch_norm, slim_conv, slim_linear, slim_rms_norm
from tests.helpers import DEVICE, error

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="takes some 10 GiB: on a GPU only")


@pytest.fixture(autouse=True)
def _little_memory():
    """Fresh memory is not filled here, and freed memory is given back."""
    torch.use_deterministic_algorithms(False)
    yield
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def large(*shape, **kwargs):
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, **kwargs)
    assert x.numel() > 2**31
    return x.normal_()


def check_ends(actual, expected):
    """Both ends of a large result against float32 on the same numbers."""
    assert error(actual, expected) < 1e-2


def test_large_linear_forward_and_gradients():
    rows, k, n = 2**20 + 77, 2050, 24
    x, weight = large(rows, k).requires_grad_(), torch.randn(40, 2060, device=DEVICE).bfloat16().requires_grad_()
    y = slim_linear(x, weight, None, n)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    part, wide = weight[:n, :k].detach().float(), torch.zeros(n, k, device=DEVICE)
    for ends in (slice(0, 300), slice(rows - 300, rows)):
        check_ends(y[ends], F.linear(x[ends].detach().float(), part))
        check_ends(dx[ends], dy[ends].float() @ part)
    for begin in range(0, rows, 2**17):
        ends = slice(begin, begin + 2**17)
        wide += dy[ends].float().t() @ x[ends].detach().float()
    check_ends(dw[:n, :k], wide)


@pytest.mark.parametrize("depthwise", [False, True])
def test_large_conv_forward_and_input_gradient(depthwise):
    batch, c, size = 70, 64, 704
    x = large(batch, c, size, size, memory_format=torch.channels_last).requires_grad_()
    n, groups = (c, c) if depthwise else (16, 1)
    weight = torch.randn(96 if depthwise else 24, 1 if depthwise else 80, 3, 3, device=DEVICE).bfloat16()
    y = slim_conv(x, weight, None, n, padding=1, groups=groups)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    part = weight[:n, : c // groups].float()
    for ends in (slice(0, 1), slice(batch - 1, batch)):
        check_ends(y[ends], F.conv2d(x[ends].detach().float(), part, padding=1, groups=groups))
        check_ends(dx[ends], F.conv_transpose2d(dy[ends].float(), part, padding=1, groups=groups))


def test_large_norms():
    rows, c = 2**20 + 77, 2050
    x, weight = large(rows, c), torch.randn(2060, device=DEVICE).bfloat16()
    y = slim_rms_norm(x, weight)
    for ends in (slice(0, 300), slice(rows - 300, rows)):
        check_ends(y[ends], F.rms_norm(x[ends].float(), (c,), weight[:c].float(), 1e-6))
    mean, var = torch.zeros(2060, device=DEVICE), torch.ones(2060, device=DEVICE)
    y = slim_batch_norm(x, mean, var, weight, weight, training=False)
    for ends in (slice(0, 300), slice(rows - 300, rows)):
        expected = F.batch_norm(x[ends].float(), mean[:c], var[:c], weight[:c].float(), weight[:c].float())
        check_ends(y[ends], expected)


def test_large_slice_accumulate():
    rows, c = 2**20 + 77, 2050
    target, source = torch.zeros(rows, c + 6, dtype=torch.bfloat16, device=DEVICE), large(rows, c)
    slice_accumulate_([target], [source])
    assert torch.equal(target[-300:, :c], source[-300:])
    assert torch.equal(target[:300, :c], source[:300])
    assert target[:, c:].count_nonzero() == 0
