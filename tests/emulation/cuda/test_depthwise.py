"""Rung C2: the depthwise kernels on CPU fibers, in three schedules, against PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from slimkernels.cuda_kernels import slim_conv_depthwise as cuda_launchers
from slimkernels.reference import slim_conv as reference
from tests.emulation.cuda import depthwise
from tests.emulation.cuda.library import SCHEDULES, EmulationError, Kernels, guarded, skip_unless_possible
from tests.helpers import DTYPES, FLOOR, dtype_id, error

# batch, channels, multiplier, size, kernel, stride, padding, dilation
CASES = {
    "3x3": (2, 8, 1, (7, 9), (3, 3), (1, 1), (1, 1), (1, 1)),
    "c5-3x3-s2": (2, 5, 1, (9, 8), (3, 3), (2, 2), (1, 1), (1, 1)),
    "c16-7x7": (1, 16, 1, (14, 13), (7, 7), (1, 1), (3, 3), (1, 1)),
    "c33-5x3-d2": (1, 33, 1, (11, 70), (5, 3), (1, 1), (4, 2), (2, 2)),
    "c3-m2": (2, 3, 2, (6, 5), (3, 3), (1, 2), (1, 0), (1, 1)),
    "c4-m4-s3": (1, 4, 4, (10, 10), (2, 3), (3, 2), (0, 1), (1, 1)),
    "1d-k31": (2, 6, 1, (1, 700), (1, 31), (1, 1), (0, 15), (1, 1)),
    "1d-s4-d3": (1, 9, 1, (1, 131), (1, 4), (1, 4), (0, 5), (1, 3)),
    "halo": (1, 2, 1, (140, 150), (3, 3), (1, 1), (64, 64), (64, 64)),
    "c1-1x1": (3, 1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1)),
    "padding-beyond": (1, 8, 1, (3, 3), (3, 3), (1, 1), (4, 4), (1, 1)),
}


def sample(case, dtype, channels_last, sliced=True):
    """Tensors of one case: the weight is a full-size one, of which the first filters are active."""
    batch, c, multiplier, size, kernel, stride, padding, dilation = CASES[case]
    n = c * multiplier
    full = n + 3 if sliced else n
    out = [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, p, d, k, t in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    memory = torch.channels_last if channels_last else torch.contiguous_format

    def tensor(*shape):
        like = torch.empty(shape).contiguous(memory_format=memory)
        return guarded(shape, dtype, like.stride()).copy_(torch.randn(shape))

    x, dy, residual = tensor(batch, c, *size), tensor(batch, n, *out), tensor(batch, n, *out)
    weight, bias = torch.randn(full, 1, *kernel).to(dtype), torch.randn(full).to(dtype)
    return x, weight, bias, residual, dy, (stride, padding, dilation), n


def close(actual, dtype, exact):
    """As good as the float64 result rounded once (a stricter peer than PyTorch in 16 bits)."""
    assert error(actual, exact) <= 2 * error(exact.to(dtype), exact) + FLOOR[dtype]


def convolve(x, weight, bias, residual, geometry, n, activation):
    x, weight, bias, residual = (t.double() for t in (x, weight, bias, residual))
    stride, padding, dilation = geometry
    y = F.conv2d(x, weight[:n], bias[:n], stride, padding, dilation, x.shape[1]) + residual
    return getattr(F, activation)(y) if activation != "none" else y


# float16 differs from bfloat16 in its conversions only: one schedule.
RUNS = [(s, d) for s in SCHEDULES for d in DTYPES if not (s and d == torch.float16)]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("schedule", "dtype"), RUNS, ids=lambda v: dtype_id(v) or f"schedule{v}")
@pytest.mark.parametrize("case", CASES)
def test_depthwise_forward_and_gradients(case, schedule, dtype, channels_last):
    skip_unless_possible()
    check(Kernels(depthwise.STEMS, schedule), case, dtype, channels_last)


def check(kernels, case, dtype, channels_last):
    x, weight, bias, residual, dy, geometry, n = sample(case, dtype, channels_last)
    activation = "silu" if case == "3x3" else "none"
    arguments = (x, weight, bias, residual, geometry, n, activation)
    y = depthwise.forward(kernels, x, weight, bias, residual, torch.full_like(dy, float("nan")), geometry, activation)
    close(y, dtype, convolve(*arguments))
    stride, padding, dilation = geometry

    exact = torch.ops.aten.convolution_backward(
        dy.double(), x.double(), weight[:n].double(), None, stride, padding, dilation, False, [0, 0], x.shape[1],
        [True, True, False],
    )  # fmt: skip
    dx = depthwise.input_gradient(kernels, dy, weight, torch.full_like(x, float("nan")), geometry)
    close(dx, dtype, exact[0])
    dw = depthwise.weight_gradient(kernels, dy, x, weight, geometry)
    close(dw[:n], dtype, exact[1])
    assert not dw[n:].any()


@pytest.mark.parametrize("activation", ["relu", "gelu", "elu", "relu6", "hardswish", "tanh", "sigmoid"])
def test_depthwise_activations(activation):
    skip_unless_possible()
    x, weight, bias, residual, dy, geometry, n = sample("3x3", torch.float32, True)
    y = depthwise.forward(
        Kernels(depthwise.STEMS), x, weight, bias, residual, torch.full_like(dy, float("nan")), geometry, activation
    )
    assert error(y, convolve(x, weight, bias, residual, geometry, n, activation)) < 1e-6


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_depthwise_misaligned_views(channels_last):
    """Pointers that are not 16-byte aligned: the vector paths must not be taken, or must find the boundary."""
    skip_unless_possible()
    kernels = Kernels(depthwise.STEMS)
    x, weight, bias, residual, dy, geometry, n = sample("3x3", torch.float32, channels_last)
    for shift in (1, 2, 3):
        moved = torch.full((x.numel() + shift,), float("nan"))[shift:].as_strided(x.shape, x.stride()).copy_(x)
        y = depthwise.forward(kernels, moved, weight, bias, residual, torch.full_like(dy, float("nan")), geometry)
        assert error(y, convolve(x, weight, bias, residual, geometry, n, "none")) < 1e-6


def test_depthwise_weight_gradient_is_the_same_twice():
    skip_unless_possible()
    x, weight, _, _, dy, geometry, _ = sample("c33-5x3-d2", torch.float32, True)
    runs = [depthwise.weight_gradient(Kernels(depthwise.STEMS, s), dy, x, weight, geometry) for s in SCHEDULES]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("spatial", [1, 2])
def test_depthwise_through_the_launchers_that_slim_conv_calls(monkeypatch, spatial, channels_last):
    skip_unless_possible()
    monkeypatch.setattr(cuda_launchers, "operators", lambda: depthwise.Operators(Kernels(depthwise.STEMS)))
    monkeypatch.setattr(cuda_launchers, "available", lambda: True)
    x, weight, bias = torch.randn(2, 5, *[9, 8][:spatial]), torch.randn(14, 1, *[3, 2][:spatial]), torch.randn(14)
    if channels_last and spatial == 2:
        x = x.contiguous(memory_format=torch.channels_last)
    geometry = [2, 1][:spatial], [1, 0][:spatial], [1, 2][:spatial]
    expected = reference.slim_conv(x, weight, bias, 10, *geometry, 5, "none", None)
    residual = torch.randn(expected.shape)
    expected = torch.relu(expected + residual)
    y = cuda_launchers.slim_conv(x, weight, bias, 10, *geometry, 5, "relu", residual)
    assert y.stride() == reference.slim_conv(x, weight, bias, 10, *geometry, 5, "none", None).stride()
    assert error(y, expected) < 1e-6
    gradients = cuda_launchers.slim_conv_backward(residual, x, weight, *geometry, 5, True, True, True)
    wanted = reference.slim_conv_backward(residual, x, weight, *geometry, 5, True, True, True)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert error(ours, theirs) < 1e-6
        assert ours.stride() == theirs.stride()


_BARRIER = "    __syncthreads();\n"
BUGS = {
    "barrier after the tile is staged": (
        "",
        f"{_BARRIER}#pragma unroll\n    for (int k",
        "#pragma unroll\n    for (int k",
    ),
    "barrier between sources": ("", "    if (s) __syncthreads();\n", ""),
    "barrier after the weights": ("", f"{_BARRIER}  }}\n  const int lane", "  }\n  const int lane"),
    "mask of the input": ("", "at >= 0 && at < a.in ?", "at >= 0 && at <= a.in ?"),
    "column of the kernel": ("", "column * g.weight_stride[2]", "column * g.weight_stride[1]"),
    "barrier in the reduction": ("_gradient", f"sum[t][v];\n{_BARRIER}", "sum[t][v];\n"),
    "barrier before the reduction": ("_gradient", f"++t) {{\n{_BARRIER}", "++t) {\n"),
    "last pixel": ("_gradient", "pixel < end;", "pixel < end - 1;"),
}


def break_and_check(name):
    file, old, new = BUGS[name]
    bug = (f"slim_conv_depthwise{file}.cu", old, new)
    for schedule in SCHEDULES:
        for case in ("3x3", "c33-5x3-d2", "c4-m4-s3"):
            for channels_last in (False, True):
                check(Kernels(depthwise.STEMS, schedule, bug), case, torch.float32, channels_last)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow_emulation] * (i % 3 > 0)) for i, n in enumerate(BUGS)]
)
def test_depthwise_planted_bugs_are_found(name):
    skip_unless_possible()
    with pytest.raises((AssertionError, EmulationError)):
        break_and_check(name)
