import pytest
import torch
import torch.nn.functional as F

from slimkernels._extension import cpp_available
from slimkernels.ops import slim_conv
from slimkernels.ops._common import ACTIVATIONS
from slimkernels.reference import _activation
from tests.helpers import (
    DEVICE,
    DEVICES,
    DTYPES,
    ODD_SIZES,
    check_as_good_as_pytorch,
    check_gradients,
    check_graphs,
    dtype_id,
    layouts,
)

CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def oracle(
    x,
    weight,
    bias=None,
    out_channels=None,
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    activation="none",
    residual=None,
):
    n = weight.shape[0] if out_channels is None else out_channels
    w = weight[:n, : x.shape[-weight.dim() + 1] // groups]
    y = CONVS[weight.dim() - 2](x, w, None if bias is None else bias[:n], stride, padding, dilation, groups)
    y = y if residual is None else y + residual
    return y if activation == "none" else _activation.activation(y, activation)


def sample(c, n, full_c, full_n, kernel, size, *, batch=2, bias=True, residual=True, channels_last=False, **kwargs):
    """Arguments for c -> n active of full_c -> full_n channels; ``kernel`` and ``size`` are tuples."""
    groups = kwargs.get("groups", 1)
    x = torch.randn(batch, c, *size)
    weight = torch.randn(full_n, full_c // groups, *kernel) / (full_c // groups) ** 0.5
    args = (x, weight, torch.randn(full_n) if bias else None, n)
    kwargs["residual"] = torch.randn_like(oracle(*args, **kwargs)) if residual else None
    if channels_last:
        memory_format = CHANNELS_LAST[len(size)]
        args = (x.contiguous(memory_format=memory_format), *args[1:])
        if residual:
            kwargs["residual"] = kwargs["residual"].contiguous(memory_format=memory_format)
    return args, kwargs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_slim_conv_odd_widths(size, channels_last, dtype, device):
    for c, n in [(size, 21), (17, size)]:
        args, kwargs = sample(c, n, c + 3, n + 6, (3, 3), (6, 7), padding=1, channels_last=channels_last)
        check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_slim_conv_activations(activation, channels_last, dtype):
    for c, n in [(8, 16), (4, 5)]:
        args, kwargs = sample(
            c, n, 16, 24, (3, 3), (9, 11), padding=1, activation=activation, channels_last=channels_last
        )
        check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, dtype)


GEOMETRIES = [
    dict(kernel=(3, 3), stride=2, padding=1),
    dict(kernel=(3, 3), stride=(1, 2), padding=(0, 1)),
    dict(kernel=(1, 1), stride=1),
    dict(kernel=(1, 1), stride=2),
    dict(kernel=(5, 3), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
    dict(kernel=(3, 3), padding=2, dilation=2),
    dict(kernel=(3, 3), padding=3),
    dict(kernel=(7, 7), stride=2, padding=3),
    dict(kernel=(2, 4), stride=3, padding=0),
    dict(kernel=(3, 4), padding="same"),
    dict(kernel=(4, 2), padding="same", dilation=(1, 3)),
    dict(kernel=(3, 3), padding="valid"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_slim_conv_geometry(geometry, channels_last, dtype):
    for c, n in [(3, 16), (16, 20), (6, 5)]:
        args, kwargs = sample(c, n, c + 4, 32, size=(13, 10), channels_last=channels_last, **geometry)
        check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize(
    ("batch", "c", "n", "size"),
    [
        (4, 16, 16, (32, 32)),
        (6, 8, 9, (12, 12)),
        (3, 12, 20, (17, 13)),
        (64, 64, 64, (8, 8)),
        (9, 33, 48, (9, 10)),
        (9, 100, 72, (7, 6)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_slim_conv_winograd(batch, c, n, size, padding, dtype):
    """Enough pixels for Winograd's algorithm, with tiles that reach over each edge."""
    for kwargs in (dict(bias=False, residual=False), dict(activation="relu")):
        args, kwargs = sample(
            c, n, c + 4, n + 6, (3, 3), size, batch=batch, padding=padding, channels_last=True, **kwargs
        )
        check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("full", [True, False], ids=["full", "sliced"])
@pytest.mark.parametrize(
    ("c", "n", "size"),
    [(17, 33, (9, 31)), (33, 17, (20, 30)), (300, 20, (5, 5)), (20, 200, (5, 9)), (150, 140, (1, 1))],
)
def test_slim_conv_pointwise(c, n, size, full, dtype):
    """Few and many pixels, more inputs or more outputs, more than one panel or block of either."""
    for kwargs in (dict(bias=False, residual=False), dict(activation="relu")):
        full_c, full_n = (c, n) if full else (c + 5, n + 7)
        args, kwargs = sample(c, n, full_c, full_n, (1, 1), size, channels_last=True, **kwargs)
        check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, dtype)
        wide = torch.cat([args[0], args[0]], 1)[:, :c]  # pixels further apart than their channels
        check_as_good_as_pytorch(slim_conv, oracle, (wide, *args[1:]), kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("geometry", GEOMETRIES[:11], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("channels", "full"), [(7, 9), (32, 40), (33, 33)])
def test_slim_conv_depthwise(channels, full, geometry, channels_last, dtype):
    kernel, rest = geometry["kernel"], {k: v for k, v in geometry.items() if k != "kernel"}
    x, weight = torch.randn(2, channels, 12, 9), torch.randn(full, 1, *kernel)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    args = (x, weight, torch.randn(full), channels)
    kwargs = dict(groups=channels, activation="relu6", **rest)
    kwargs["residual"] = torch.randn_like(oracle(*args, **kwargs))
    check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("groups", "per_in", "per_out"), [(2, 3, 5), (3, 4, 2), (5, 1, 3), (4, 8, 8)])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_slim_conv_groups(groups, per_in, per_out, channels_last, dtype):
    x = torch.randn(2, groups * per_in, 7, 8)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn((groups + 2) * per_out, per_in, 3, 3)
    args = (x, weight, torch.randn(len(weight)), groups * per_out)
    check_as_good_as_pytorch(slim_conv, oracle, args, dict(groups=groups, padding=1), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("kernel", "size", "geometry"),
    [
        ((3,), (20,), dict(padding=1)),
        ((3,), (33,), dict(padding=4, dilation=4)),
        ((8,), (33,), dict(stride=4, padding=2)),
        ((4,), (15,), dict(padding="same")),
        ((2, 3, 3), (4, 6, 5), dict(padding=1)),
        ((3, 3, 3), (5, 6, 7), dict(stride=(1, 2, 2), padding=1)),
        ((1, 1, 1), (3, 4, 5), {}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_slim_conv_1d_and_3d(kernel, size, geometry, dtype):
    for c, n, full_c in [(5, 7, 8), (16, 16, 24)]:
        args, kwargs = sample(c, n, full_c, 24, kernel, size, activation="tanh", **geometry)
        check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, dtype)
        if len(size) == 3:
            args, kwargs = sample(c, n, full_c, 24, kernel, size, channels_last=True, **geometry)
            check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, dtype)
    depthwise = dict(groups=6, **geometry)
    args = (torch.randn(2, 6, *size), torch.randn(8, 1, *kernel), None, 6)
    check_as_good_as_pytorch(slim_conv, oracle, args, depthwise, dtype)


# Each of these is large enough for the other side of a path's limit (oneDNN or our own kernel; see slim_conv_direct.cpp).
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(
    ("c", "n", "kernel", "stride"),
    [(40, 40, 3, 1), (20, 40, 3, 2), (17, 16, 5, 1), (40, 72, 1, 1), (130, 70, 1, 1), (48, 90, 1, 2)],
)
def test_slim_conv_of_ordinary_size(c, n, kernel, stride, dtype):
    geometry = dict(stride=stride, padding=kernel // 2, activation="relu")
    args, kwargs = sample(c, n, c + 8, n + 8, (kernel, kernel), (47, 45), channels_last=True, **geometry)
    check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("groups", [1, 12], ids=["dense", "depthwise"])
def test_slim_conv_layouts(groups, dtype):
    x, weight, bias = torch.randn(3, 12, 8, 9), torch.randn(20, 16 if groups == 1 else 1, 3, 3), torch.randn(20)
    n = 18 if groups == 1 else 12
    residual = torch.randn(3, n, 8, 9)
    kwargs = dict(padding=1, groups=groups, activation="relu", residual=residual)
    for _, x_layout in layouts(x):
        check_as_good_as_pytorch(slim_conv, oracle, (x_layout, weight, bias, n), kwargs, dtype)
    for _, w_layout in layouts(weight):
        check_as_good_as_pytorch(slim_conv, oracle, (x, w_layout, bias, n), kwargs, dtype)
    for _, r_layout in layouts(residual):
        check_as_good_as_pytorch(slim_conv, oracle, (x, weight, bias, n), kwargs | dict(residual=r_layout), dtype)
    for _, b_layout in layouts(bias):
        check_as_good_as_pytorch(slim_conv, oracle, (x, weight, b_layout, n), kwargs, dtype)


@pytest.mark.parametrize("padding", [1, "same"])
def test_slim_conv_without_batch_dimension_or_with_an_empty_batch(padding):
    weight, bias = torch.randn(12, 8, 3, 3), torch.randn(12)
    for shape in [(6, 7, 8), (0, 6, 7, 8), (1, 1, 1, 1)]:
        x = torch.randn(shape)
        residual = torch.randn(*shape[:-3], 9, *shape[-2:])
        kwargs = dict(padding=padding, activation="relu", residual=residual)
        check_as_good_as_pytorch(slim_conv, oracle, (x, weight, bias, 9), kwargs, torch.float32)


@pytest.mark.parametrize("out_of", ["x", "weight"])
def test_slim_conv_keeps_channels_last(out_of):
    x, weight = torch.randn(2, 6, 8, 9), torch.randn(20, 16, 3, 3)
    assert slim_conv(x, weight).is_contiguous()
    if out_of == "x":
        x = x.contiguous(memory_format=torch.channels_last)
    else:
        weight = weight.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    y = slim_conv(x, weight, None, 18, padding=1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.is_contiguous(memory_format=torch.channels_last)


def test_slim_conv_gradients_of_frozen_parts_are_none():
    x, weight, bias = torch.randn(2, 6, 8, 9), torch.randn(20, 16, 3, 3), torch.randn(20)
    for needed in (x, weight, bias):
        for t in (x, weight, bias):
            t.requires_grad_(t is needed).grad = None
        slim_conv(x, weight, bias, 7).sum().backward()
        assert [t.grad is not None for t in (x, weight, bias)] == [t is needed for t in (x, weight, bias)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slim_conv_gradcheck(activation):
    args, kwargs = sample(2, 3, 3, 5, (3, 2), (4, 3), activation=activation, stride=(2, 1), padding=1)
    check_gradients(slim_conv, args[:3], kwargs | dict(out_channels=3))


def test_slim_conv_gradcheck_depthwise():
    args = (torch.randn(2, 3, 4, 4), torch.randn(5, 1, 3, 3), torch.randn(5))
    check_gradients(slim_conv, args, dict(groups=3, out_channels=3, padding=1))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("groups", [1, 4], ids=["dense", "depthwise"])
def test_slim_conv_opcheck(groups, channels_last, activation):
    args, kwargs = sample(4, 4, 8, 12, (3, 3), (5, 6), groups=groups, padding=1, channels_last=channels_last)
    if groups > 1:
        args = (args[0], args[1][:, :1], *args[2:])
    x, w, b = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in args[:3])
    geometry = ([1, 1], [1, 1], [1, 1], groups)
    residual = kwargs["residual"].requires_grad_()
    torch.library.opcheck(torch.ops.slimkernels.slim_conv.default, (x, w, b, 4, *geometry, activation, residual))
    dy = torch.randn(2, 4, 5, 6)
    torch.library.opcheck(
        torch.ops.slimkernels.slim_conv_backward.default, (dy, x.detach(), w.detach(), *geometry, True, True, True)
    )


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
def test_slim_conv_compiles_to_few_graphs(depthwise, channels_last):
    weight = torch.randn(64, 1 if depthwise else 48, 3, 3, requires_grad=True)
    bias = torch.randn(64, requires_grad=True)
    inputs = []
    for c in range(4, 40, 3):
        x = torch.randn(2, c, 5, 6)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        inputs.append((x, weight, bias, c if depthwise else c + 3))
    check_graphs(
        lambda x, w, b, n: slim_conv(x, w, b, n, padding=1, groups=x.shape[1] if depthwise else 1, activation="relu"),
        inputs,
    )


def test_slim_conv_autocast_runs_in_the_autocast_dtype():
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(12, 16, 3, 3, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = slim_conv(x, weight, None, 10)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    assert weight.grad[:10, :8].abs().sum() > 0
    assert weight.grad[10:].abs().sum() == 0
    assert weight.grad[:, 8:].abs().sum() == 0


X, W, B = torch.randn(2, 8, 5, 5), torch.randn(12, 16, 3, 3), torch.randn(12)
ERRORS = [
    ((X, W, B, 13), {}, ValueError, "slim_conv: expected out_channels between 1 and 12, got 13"),
    ((X, W, B, 0), {}, ValueError, "slim_conv: expected out_channels between 1 and 12, got 0"),
    ((torch.randn(2, 17, 5, 5), W, B, 3), {}, ValueError, "expected x's channels / groups between 1 and 16, got 17"),
    ((X, W, B, 3), {"groups": 3}, ValueError, "expected x's channels to be a multiple of groups=3, got 8"),
    ((X, W, B, 7), {"groups": 4}, ValueError, "expected out_channels to be a multiple of groups=4, got 7"),
    ((X, W, B, 7), {"groups": 0}, ValueError, "expected x's channels to be a multiple of groups=0, got 8"),
    ((X, W[0, 0], B, 3), {}, ValueError, r"expected weight to have 3 to 5 dimensions, got shape \(3, 3\)"),
    ((X[0, 0], W, B, 3), {}, ValueError, r"expected x to have 3 or 4 dimensions for a weight of 4, got shape \(5, 5\)"),
    ((X, W, B[:5], 3), {}, ValueError, r"expected bias of shape \(12,\), got \(5,\)"),
    ((X, W, B, 3), {"residual": X}, ValueError, r"expected residual of shape \(2, 3, 3, 3\), got \(2, 8, 5, 5\)"),
    ((X, W, B, 3), {"activation": "swish"}, ValueError, "expected activation to be one of none, relu"),
    ((X, W, B, 3), {"stride": 0}, ValueError, "expected stride to be 2 integers of at least 1, got 0"),
    ((X, W, B, 3), {"dilation": (1, 2, 3)}, ValueError, "expected dilation to be 2 integers of at least 1"),
    ((X, W, B, 3), {"padding": -1}, ValueError, "expected padding to be 2 integers of at least 0, got -1"),
    ((X, W, B, 3), {"padding": "full"}, ValueError, "expected padding to be integers, 'same' or 'valid', got 'full'"),
    ((X, W, B, 3), {"padding": "same", "stride": 2}, ValueError, "expected stride 1 with padding='same'"),
    ((X, W, B, 3), {"dilation": 3}, ValueError, "expected x to be at least as large as the dilated kernel"),
    ((X, W.bfloat16(), B, 3), {}, TypeError, "expected weight of dtype torch.float32 like x, got torch.bfloat16"),
    ((X.long(), W, B, 3), {}, TypeError, "expected x of dtype float32, float64, bfloat16 or float16"),
    (([1.0], W, B, 3), {}, TypeError, "expected x to be a Tensor, got list"),
    ((X.to("meta"), W, B, 3), {}, ValueError, "expected weight on device meta like x, got cpu"),
]


@pytest.mark.parametrize(("args", "kwargs", "kind", "message"), ERRORS)
def test_slim_conv_errors(args, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        slim_conv(*args, **kwargs)


@pytest.mark.skipif(not cpp_available(), reason="the C++ kernels are not built or switched off")
@pytest.mark.parametrize(
    ("n", "groups", "weight", "stride", "message"),
    [
        (13, 1, W, [1, 1], "out_channels between 1 and 12, got 13"),
        (5, 1, W[:, :4], [1, 1], "x's channels / groups between 1 and 4, got 8"),
        (5, 3, W, [1, 1], "multiple of groups=3"),
        (5, 1, W, [0, 1], "stride to be 2 integers of at least 1"),
        (5, 1, W, [1], "stride to be 2 integers of at least 1"),
    ],
)
def test_slim_conv_cpp_checks_its_arguments(n, groups, weight, stride, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.slimkernels.slim_conv.default(X, weight, None, n, stride, [0, 0], [1, 1], groups, "none", None)
