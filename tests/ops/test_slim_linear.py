import pytest
import torch
import torch.nn.functional as F

from slimkernels._extension import cpp_available, cpp_info
from slimkernels.ops import slim_linear
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


def oracle(x, weight, bias=None, out_features=None, *, in_blocks=1, out_blocks=1, activation="none", residual=None):
    n = weight.shape[0] if out_features is None else out_features
    rows = torch.cat([part[: n // out_blocks] for part in weight.chunk(out_blocks, 0)])
    w = torch.cat([part[:, : x.shape[-1] // in_blocks] for part in rows.chunk(in_blocks, 1)], 1)
    b = None if bias is None else torch.cat([part[: n // out_blocks] for part in bias.chunk(out_blocks)])
    y = F.linear(x, w, b)
    y = y if residual is None else y + residual
    return y if activation == "none" else _activation.activation(y, activation)


def sample(m, n, k, full_n, full_k, *, bias=True, residual=False, lead=(), **kwargs):
    x = torch.randn(*lead, m, k)
    weight = torch.randn(full_n, full_k) / full_k**0.5
    kwargs["residual"] = torch.randn(*lead, m, n) if residual else None
    return (x, weight, torch.randn(full_n) if bias else None, n), kwargs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("size", ODD_SIZES)
def test_slim_linear_odd_sizes(size, dtype, device):
    for m, n, k in [(7, size, 33), (size, 21, 17), (5, 9, size)]:
        args, kwargs = sample(m, n, k, n + 6, k + 3, residual=True, activation="relu")
        check_as_good_as_pytorch(slim_linear, oracle, args, kwargs, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slim_linear_activations(activation, dtype, device):
    args, kwargs = sample(37, 24, 40, 32, 64, residual=True, activation=activation)
    check_as_good_as_pytorch(slim_linear, oracle, args, kwargs, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_slim_linear_layouts(dtype, device):
    (x, weight, bias, n), kwargs = sample(11, 20, 24, 32, 48, lead=(3,))
    for _, x_layout in layouts(x):
        check_as_good_as_pytorch(slim_linear, oracle, (x_layout, weight, bias, n), kwargs, dtype, device)
    for _, w_layout in layouts(weight):
        check_as_good_as_pytorch(slim_linear, oracle, (x, w_layout, bias, n), kwargs, dtype, device)
    for _, b_layout in layouts(bias):
        check_as_good_as_pytorch(slim_linear, oracle, (x, weight, b_layout, n), kwargs, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("in_blocks", "out_blocks"), [(1, 2), (2, 1), (2, 3), (3, 1)])
def test_slim_linear_blocks(in_blocks, out_blocks, dtype):
    args, kwargs = sample(13, 5 * out_blocks, 7 * in_blocks, 8 * out_blocks, 12 * in_blocks)
    check_as_good_as_pytorch(
        slim_linear, oracle, args, kwargs | {"in_blocks": in_blocks, "out_blocks": out_blocks}, dtype
    )


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (1, 1, 1, 8)])
def test_slim_linear_empty_and_small_batches(shape):
    x, weight, bias = torch.randn(shape), torch.randn(12, 16), torch.randn(12)
    check_as_good_as_pytorch(slim_linear, oracle, (x, weight, bias, 9), {}, torch.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slim_linear_gradcheck(activation):
    args, kwargs = sample(3, 4, 5, 6, 8, residual=True, activation=activation)
    check_gradients(slim_linear, (*args[:3],), kwargs | {"out_features": 4})


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_slim_linear_opcheck(activation):
    args, kwargs = sample(4, 6, 8, 10, 12, residual=True)
    x, w, b = (t.requires_grad_() for t in args[:3])
    packed = (x, w, b, 6, 1, 1, activation, kwargs["residual"].requires_grad_())
    torch.library.opcheck(torch.ops.slimkernels.slim_linear.default, packed)
    dy = torch.randn(4, 6)
    torch.library.opcheck(
        torch.ops.slimkernels.slim_linear_backward.default, (dy, x.detach(), w.detach(), 1, 1, True, True, True)
    )


def test_slim_linear_compiles_to_few_graphs():
    weight, bias = torch.randn(64, 48, requires_grad=True), torch.randn(64, requires_grad=True)
    inputs = [(torch.randn(5, w), weight, bias, w + 3) for w in range(4, 40, 3)]
    check_graphs(lambda x, w, b, n: slim_linear(x, w, b, n, activation="relu"), inputs)


def test_slim_linear_autocast_runs_in_the_autocast_dtype():
    x, weight = torch.randn(4, 8), torch.randn(12, 16, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = slim_linear(x, weight, None, 10)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    assert weight.grad[:10, :8].abs().sum() > 0
    assert weight.grad[10:].abs().sum() == 0


X, W, B = torch.randn(4, 8), torch.randn(12, 16), torch.randn(12)


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "message"),
    [
        ((X, W, B, 13), {}, ValueError, "slim_linear: expected out_features between 1 and 12, got 13"),
        ((X, W, B, 0), {}, ValueError, "slim_linear: expected out_features between 1 and 12, got 0"),
        ((torch.randn(4, 17), W, B, 3), {}, ValueError, r"expected x.shape\[-1\] between 1 and 16, got 17"),
        ((X, W[0], B, 3), {}, ValueError, r"expected weight to have 2 dimensions \(N, K\), got shape \(16,\)"),
        ((X, W, B[:5], 3), {}, ValueError, r"expected bias of shape \(12,\), got \(5,\)"),
        ((X, W, B, 3), {"residual": X}, ValueError, r"expected residual of shape \(4, 3\), got \(4, 8\)"),
        ((X, W, B, 3), {"activation": "swish"}, ValueError, "expected activation to be one of none, relu"),
        ((X, W, B, 4), {"out_blocks": 5}, ValueError, "expected out_blocks to divide the full size 12, got 5"),
        ((X, W, B, 5), {"out_blocks": 3}, ValueError, "expected out_features to be a multiple of out_blocks=3, got 5"),
        ((X, W.bfloat16(), B, 3), {}, TypeError, "expected weight of dtype torch.float32 like x, got torch.bfloat16"),
        ((X.long(), W, B, 3), {}, TypeError, "expected x of dtype float32, float64, bfloat16 or float16"),
        (([1.0], W, B, 3), {}, TypeError, "expected x to be a Tensor, got list"),
        ((X.to("meta"), W, B, 3), {}, ValueError, "expected weight on device meta like x, got cpu"),
        ((torch.tensor(1.0), W, B, 3), {}, ValueError, "expected x to have at least 1 dimension"),
    ],
)
def test_slim_linear_errors(args, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        slim_linear(*args, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 150, 300),
        (2, 67, 129),
        (3, 70, 31),
        (4, 300, 64),
        (5, 190, 77),  # few rows: the weight is read once, or the product is computed transposed
        (33, 200, 1031),
        (65, 130, 96),
        (130, 70, 33),
        (300, 193, 130),
        (700, 24, 20),  # several chunks of rows in the weight's gradient
        (140, 330, 600),  # several blocks of it
    ],
)
def test_slim_linear_several_tiles(m, n, k, dtype):
    args, kwargs = sample(m, n, k, n + 5, k + 6, residual=True, activation="relu")
    check_as_good_as_pytorch(slim_linear, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("m", [1, 4, 30, 400])
def test_slim_linear_blocks_of_several_tiles(m, dtype):
    args, kwargs = sample(m, 3 * 75, 2 * 139, 3 * 80, 2 * 160, residual=True, activation="tanh")
    check_as_good_as_pytorch(slim_linear, oracle, args, kwargs | {"in_blocks": 2, "out_blocks": 3}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("m", [1, 40, 600])
def test_slim_linear_two_threads(m, dtype):
    args, kwargs = sample(m, 140, 90, 160, 96, residual=True, activation="relu")
    torch.set_num_threads(2)
    try:
        check_as_good_as_pytorch(slim_linear, oracle, args, kwargs, dtype)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("m", [2, 40, 300])
def test_slim_linear_odd_weight_strides(m, dtype):
    x, bias = torch.randn(m, 40), torch.randn(90)
    weights = {
        "stored as (K, N)": torch.randn(64, 90).t(),
        "wide rows": torch.randn(90, 177)[:, 3:67],
        "every second row": torch.randn(180, 64)[::2],
        "every second column": torch.randn(90, 128)[:, ::2],
        "one row for all": torch.randn(1, 64).expand(90, 64),
        "overlapping rows": torch.randn(90 + 64).as_strided((90, 64), (1, 1)),
    }
    for weight in weights.values():
        for full_bias in (bias, torch.randn(180)[::2]):
            check_as_good_as_pytorch(slim_linear, oracle, (x / 8, weight, full_bias, 70), {}, dtype)


def test_slim_linear_one_row_or_column():
    for shape in [(1, 1), (1, 9), (9, 1)]:
        for m in (1, 6, 70):
            args = (torch.randn(m, 1), torch.randn(shape), torch.randn(shape[0]), 1)
            check_as_good_as_pytorch(slim_linear, oracle, args, {}, torch.float32)
            check_as_good_as_pytorch(slim_linear, oracle, args, {}, torch.bfloat16)


def test_slim_linear_bias_gradient_alone():
    x, weight = torch.randn(6, 8), torch.randn(12, 8)
    bias = torch.randn(12, requires_grad=True)
    slim_linear(x, weight, bias, 6, out_blocks=3).sum().backward()
    expected = torch.tensor([6.0, 6.0, 0.0, 0.0] * 3)
    assert torch.equal(bias.grad, expected)


@pytest.mark.skipif(
    not cpp_available() or cpp_info()["isa"] != "AVX512", reason="the kernel needs AVX-512 and is built"
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_id)
def test_slim_linear_kernel_is_the_one_that_runs(dtype):
    """The reference calls aten::linear; the kernel calls nothing of the kind."""
    x, weight = (
        torch.randn(20, 8, dtype=dtype, requires_grad=True),
        torch.randn(12, 16, dtype=dtype, requires_grad=True),
    )
    with torch.profiler.profile() as profile:
        slim_linear(x, weight, None, 9).sum().backward()
    called = {event.name for event in profile.events()}
    assert {"slimkernels::slim_linear", "slimkernels::slim_linear_backward"} <= called
    assert bool({"aten::linear", "aten::mm", "aten::matmul"} & called) == (dtype == torch.float64)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (torch.randn(4, 17), torch.randn(12, 16), None, 3, 1, 1, "none", None),
            r"x.shape\[-1\] between 1 and 16, got 17",
        ),
        (
            (torch.randn(4, 8), torch.randn(12, 16), None, 13, 1, 1, "none", None),
            "out_features between 1 and 12, got 13",
        ),
        ((torch.randn(4, 8), torch.randn(12, 16), torch.randn(5), 3, 1, 1, "none", None), r"bias of shape \(12,\)"),
        ((torch.randn(4, 8), torch.randn(12, 16), None, 3, 1, 1, "none", torch.randn(4, 4)), "residual of shape"),
    ],
)
@pytest.mark.skipif(not cpp_available(), reason="the C++ extension is not built")
def test_slim_linear_kernel_checks_what_protects_memory(args, message):
    with pytest.raises(ValueError, match=f"slim_linear: expected {message}"):
        torch.ops.slimkernels.slim_linear(*args)
