import pytest
import torch
import torch.nn.functional as F

from slimkernels._extension import cpp_available
from slimkernels.ops import slim_conv_transpose
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

CONVS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def oracle(
    x,
    weight,
    bias=None,
    out_channels=None,
    *,
    stride=1,
    padding=0,
    output_padding=0,
    dilation=1,
    groups=1,
    activation="none",
    residual=None,
):
    n = weight.shape[1] * groups if out_channels is None else out_channels
    w = weight[: x.shape[-weight.dim() + 1], : n // groups]
    b = None if bias is None else bias[:n]
    y = CONVS[weight.dim() - 2](x, w, b, stride, padding, output_padding, groups, dilation)
    y = y if residual is None else y + residual
    return y if activation == "none" else _activation.activation(y, activation)


def sample(c, n, full_c, full_n, kernel, size, *, batch=2, residual=True, channels_last=False, **kwargs):
    groups = kwargs.get("groups", 1)
    x = torch.randn(batch, c, *size)
    args = (x, torch.randn(full_c, full_n // groups, *kernel) / full_c**0.5, torch.randn(full_n), n)
    kwargs["residual"] = torch.randn_like(oracle(*args, **kwargs)) if residual else None
    if channels_last:
        args = (x.contiguous(memory_format=torch.channels_last), *args[1:])
    return args, kwargs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("size", ODD_SIZES)
def test_slim_conv_transpose_odd_widths(size, dtype, device):
    for c, n, channels_last in [(size, 21, False), (17, size, True)]:
        args, kwargs = sample(c, n, c + 3, n + 6, (2, 2), (5, 4), stride=2, channels_last=channels_last)
        check_as_good_as_pytorch(slim_conv_transpose, oracle, args, kwargs, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slim_conv_transpose_activations(activation, dtype):
    args, kwargs = sample(8, 9, 16, 24, (3, 3), (6, 7), stride=2, padding=1, output_padding=1, activation=activation)
    check_as_good_as_pytorch(slim_conv_transpose, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "geometry",
    [
        dict(kernel=(3, 3)),
        dict(kernel=(3, 3), stride=2, padding=1, output_padding=1),
        dict(kernel=(4, 4), stride=2, padding=1),
        dict(kernel=(2, 3), stride=(2, 1), padding=(0, 1)),
        dict(kernel=(3, 3), stride=2, dilation=2, padding=2, output_padding=1),
        dict(kernel=(1, 1)),
        dict(kernel=(2, 2), stride=3, output_padding=(2, 0)),
    ],
    ids=str,
)
def test_slim_conv_transpose_geometry(geometry, channels_last, dtype):
    for c, n in [(3, 16), (16, 20)]:
        args, kwargs = sample(c, n, c + 4, 32, size=(5, 6), channels_last=channels_last, **geometry)
        check_as_good_as_pytorch(slim_conv_transpose, oracle, args, kwargs, dtype)


@pytest.mark.parametrize(
    ("dtype", "threads"), [*((dtype, 1) for dtype in DTYPES), (torch.float32, 2)], ids=lambda v: str(v).split(".")[-1]
)
@pytest.mark.parametrize(
    ("c", "n", "kernel", "size", "geometry"),
    [
        (16, 8, (2, 2), (16, 15), dict(stride=2)),  # patches side by side
        (33, 40, (2, 3), (6, 7), dict(stride=(2, 3), activation="relu")),
        (150, 70, (2, 2), (9, 9), dict(stride=2)),  # several panels of either product
        (32, 16, (4, 4), (8, 8), dict(stride=2, padding=1, activation="silu")),  # patches that overlap
        (7, 5, (3, 3), (13, 12), dict(stride=2, padding=1, output_padding=1)),  # odd, and short runs
        (40, 9, (5, 4), (5, 6), dict(stride=(3, 1), padding=(4, 3), output_padding=(2, 0))),  # padding cuts whole rows
        (6, 5, (2, 2), (4, 5), dict(stride=3, output_padding=2)),  # gaps between patches
        (12, 21, (8, 8), (7, 9), dict(stride=4, padding=2)),  # a large kernel
        (24, 40, (4, 4), (1, 1), {}),  # one pixel
        (300, 60, (4, 4), (4, 4), dict(stride=2, padding=1)),  # a gradient of the weight that leaves the cache
    ],
    ids=str,
)
def test_slim_conv_transpose_patches(c, n, kernel, size, geometry, threads, dtype):
    args, kwargs = sample(c, n, c + 5, n + 11, kernel, size, batch=3, channels_last=True, residual=False, **geometry)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for weight in (args[1], args[1].contiguous(memory_format=torch.channels_last)):
            full = (args[0], weight, *args[2:])
            check_as_good_as_pytorch(slim_conv_transpose, oracle, full, kwargs, dtype)
        exact = (args[0], weight[:c, :n].clone(memory_format=torch.channels_last), None, None)
        check_as_good_as_pytorch(slim_conv_transpose, oracle, exact, kwargs, dtype)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_slim_conv_transpose_patches_gradients_one_by_one(needed):
    (x, weight, bias, n), _ = sample(8, 6, 10, 9, (4, 4), (5, 5), channels_last=True, residual=False)
    whole = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
    some = [
        t.clone(memory_format=torch.preserve_format).requires_grad_(i in needed)
        for i, t in enumerate((x, weight, bias))
    ]
    dy = torch.randn(2, n, 10, 10)
    for leaves in (whole, some):
        slim_conv_transpose(*leaves, n, stride=2, padding=1).backward(dy)
    for i, (a, b) in enumerate(zip(whole, some, strict=True)):
        assert (b.grad is not None) == (i in needed)
        if b.grad is not None:
            assert torch.equal(a.grad, b.grad)


@pytest.mark.skipif(not cpp_available(), reason="the reference leaves it to PyTorch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("shape", [(2, 6, 10, 9), (2, 6, 11, 10), (3, 6, 10, 10)], ids=str)
def test_slim_conv_transpose_backward_refuses_dy_of_another_size(shape, format, dtype):
    x, weight = (
        torch.randn(2, 8, 5, 5, dtype=dtype).contiguous(memory_format=format),
        torch.randn(10, 9, 4, 4).to(dtype),
    )
    call = torch.ops.slimkernels.slim_conv_transpose_backward.default
    geometry = [2, 2], [1, 1], [0, 0], [1, 1], 1
    with pytest.raises(
        ValueError, match=r"slim_conv_transpose_backward: expected dy of shape \[2, 6, 10, 10\], got \["
    ):
        call(torch.randn(shape, dtype=dtype), x, weight, 9, *geometry, True, True, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("groups", "per_in", "per_out"), [(2, 3, 5), (6, 1, 1), (4, 8, 8)])
def test_slim_conv_transpose_groups(groups, per_in, per_out, dtype):
    x, weight = torch.randn(2, groups * per_in, 5, 6), torch.randn((groups + 2) * per_in, per_out + 1, 3, 3)
    args = (x, weight, torch.randn((groups + 2) * (per_out + 1)), groups * per_out)
    check_as_good_as_pytorch(slim_conv_transpose, oracle, args, dict(groups=groups, padding=1, stride=2), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("kernel", "size", "geometry"),
    [((8,), (17,), dict(stride=4, padding=2)), ((3,), (9,), {}), ((2, 2, 2), (3, 4, 5), dict(stride=2))],
    ids=str,
)
def test_slim_conv_transpose_1d_and_3d(kernel, size, geometry, dtype):
    args, kwargs = sample(5, 7, 8, 24, kernel, size, activation="relu", **geometry)
    check_as_good_as_pytorch(slim_conv_transpose, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_slim_conv_transpose_layouts(dtype):
    x, weight, bias = torch.randn(3, 12, 5, 6), torch.randn(16, 20, 3, 3), torch.randn(20)
    for _, x_layout in layouts(x):
        check_as_good_as_pytorch(slim_conv_transpose, oracle, (x_layout, weight, bias, 18), dict(stride=2), dtype)
    for _, w_layout in layouts(weight):
        check_as_good_as_pytorch(slim_conv_transpose, oracle, (x, w_layout, bias, 18), dict(stride=2), dtype)


def test_slim_conv_transpose_without_batch_dimension_or_with_an_empty_batch():
    weight, bias = torch.randn(8, 12, 3, 3), torch.randn(12)
    for shape in [(6, 4, 5), (0, 6, 4, 5), (1, 1, 1, 1)]:
        args, kwargs = (torch.randn(shape), weight, bias, 9), dict(stride=2, activation="relu")
        check_as_good_as_pytorch(slim_conv_transpose, oracle, args, kwargs, torch.float32)


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_slim_conv_transpose_gradcheck(activation):
    args, kwargs = sample(2, 3, 3, 5, (3, 2), (3, 2), activation=activation, stride=(2, 1))
    check_gradients(slim_conv_transpose, args[:3], kwargs | dict(out_channels=3))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_slim_conv_transpose_opcheck(channels_last, activation):
    args, kwargs = sample(4, 6, 8, 10, (3, 3), (3, 4), stride=2, channels_last=channels_last)
    x, w, b = (t.requires_grad_() for t in args[:3])
    geometry = ([2, 2], [0, 0], [0, 0], [1, 1], 1)
    residual = kwargs["residual"].requires_grad_()
    op = torch.ops.slimkernels.slim_conv_transpose.default
    torch.library.opcheck(op, (x, w, b, 6, *geometry, activation, residual))
    dy = torch.randn(residual.shape)
    torch.library.opcheck(
        torch.ops.slimkernels.slim_conv_transpose_backward.default,
        (dy, x.detach(), w.detach(), 10, *geometry, True, True, True),
    )


def test_slim_conv_transpose_compiles_to_few_graphs():
    weight, bias = torch.randn(48, 64, 2, 2, requires_grad=True), torch.randn(64, requires_grad=True)
    inputs = [(torch.randn(2, c, 4, 3), weight, bias, c + 3) for c in range(4, 40, 3)]
    check_graphs(lambda x, w, b, n: slim_conv_transpose(x, w, b, n, stride=2, activation="relu"), inputs)


def test_slim_conv_transpose_autocast_runs_in_the_autocast_dtype():
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(16, 12, 3, 3, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = slim_conv_transpose(x, weight, None, 10)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad[:8, :10].abs().sum() > 0
    assert weight.grad[8:].abs().sum() == 0
    assert weight.grad[:, 10:].abs().sum() == 0


X, W, B = torch.randn(2, 8, 5, 5), torch.randn(16, 12, 3, 3), torch.randn(12)


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "message"),
    [
        ((X, W, B, 13), {}, ValueError, "slim_conv_transpose: expected out_channels between 1 and 12, got 13"),
        ((torch.randn(2, 17, 5, 5), W, B, 3), {}, ValueError, "expected x's channels between 1 and 16, got 17"),
        ((X, W, B, 3), {"groups": 3}, ValueError, "expected x's channels to be a multiple of groups=3, got 8"),
        ((X, W, None, 7), {"groups": 4}, ValueError, "expected out_channels to be a multiple of groups=4, got 7"),
        ((X, W[0, 0], B, 3), {}, ValueError, "expected weight to have 3 to 5 dimensions"),
        ((X[0, 0], W, B, 3), {}, ValueError, "expected x to have 3 or 4 dimensions for a weight of 4"),
        ((X, W, B[:5], 6), {}, ValueError, r"expected bias of shape \(N,\) with N at least 6, got \(5,\)"),
        ((X, W, B, 3), {"residual": X}, ValueError, r"expected residual of shape \(2, 3, 7, 7\), got \(2, 8, 5, 5\)"),
        ((X, W, B, 3), {"activation": "swish"}, ValueError, "expected activation to be one of none, relu"),
        ((X, W, B, 3), {"stride": 0}, ValueError, "expected stride to be 2 integers of at least 1, got 0"),
        ((X, W, B, 3), {"output_padding": 1}, ValueError, "expected output_padding smaller than stride or dilation"),
        ((X, W, B, 3), {"padding": 9}, ValueError, "expected x large enough for padding"),
        ((X, W.bfloat16(), B, 3), {}, TypeError, "expected weight of dtype torch.float32 like x"),
        ((X.long(), W, B, 3), {}, TypeError, "expected x of dtype float32, float64, bfloat16 or float16"),
        (([1.0], W, B, 3), {}, TypeError, "expected x to be a Tensor, got list"),
        ((X.to("meta"), W, B, 3), {}, ValueError, "expected weight on device meta like x, got cpu"),
    ],
)
def test_slim_conv_transpose_errors(args, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        slim_conv_transpose(*args, **kwargs)
