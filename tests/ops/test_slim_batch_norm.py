import pytest
import torch
import torch.nn.functional as F

from slimkernels.ops import slim_batch_norm
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
    error,
    layouts,
)

SHAPES = [(33, 24), (5, 24, 37), (4, 24, 7, 9), (3, 24, 5, 4, 3)]


def oracle(x, mean, var, weight=None, bias=None, *, training=False, eps=1e-5, activation="none", residual=None):
    c = x.shape[1]
    mean, var, weight, bias = (None if t is None else t[:c] for t in (mean, var, weight, bias))
    y = F.batch_norm(x, mean, var, weight, bias, training, 0.1, eps)
    y = y if residual is None else y + residual
    return y if activation == "none" else _activation.activation(y, activation)


def buffer(t):
    t.no_grad = True
    return t


def stack(ts):
    return None if ts[0] is None else buffer(torch.stack(ts)) if hasattr(ts[0], "no_grad") else torch.stack(ts)


def sample(shape, full, *, training=False, residual=False, mean=0.0, **kwargs):
    x = torch.randn(shape) + mean
    statistics = (None, None) if training else (buffer(torch.randn(full) * 0.5), buffer(torch.rand(full) + 0.5))
    kwargs |= {"training": training, "residual": torch.randn(shape) if residual else None}
    return (x, *statistics, torch.randn(full), torch.randn(full)), kwargs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("c", ODD_SIZES)
def test_slim_batch_norm_odd_widths(c, training, dtype, device):
    def many(fn):
        """On slices: gradients of one or two entries are single sums, which may cancel by chance."""
        return lambda x, *rest, residual, **kwargs: torch.stack(
            [
                fn(x[i], *(None if t is None else t[i] for t in rest), residual=residual[i], **kwargs)
                for i in range(len(x))
            ]
        )

    for shape in [(4, c, 5, 7), (2, c, 129), (37, c)]:
        if c < 5:
            parts = [sample(shape, c + 5, training=training, residual=True, activation="relu") for _ in range(16)]
            args = tuple(stack(ts) for ts in zip(*(part[0] for part in parts), strict=True))
            kwargs = parts[0][1] | {"residual": stack([part[1]["residual"] for part in parts])}
            check_as_good_as_pytorch(many(slim_batch_norm), many(oracle), args, kwargs, dtype, device)
            continue
        args, kwargs = sample(shape, c + 5, training=training, residual=True, activation="relu")
        check_as_good_as_pytorch(slim_batch_norm, oracle, args, kwargs, dtype, device)
        last = shape[:1] + shape[2:] + shape[1:2]
        channels_last = torch.randn(last).movedim(-1, 1)
        kwargs["residual"] = torch.randn(last).movedim(-1, 1)
        check_as_good_as_pytorch(slim_batch_norm, oracle, (channels_last, *args[1:]), kwargs, dtype, device)


@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 63, 65, 255, 1025])
@pytest.mark.parametrize("n", [2, 9])
def test_slim_batch_norm_odd_planes(n, size):
    args, kwargs = sample((n, 6, size), 8, training=True, activation="silu")
    check_as_good_as_pytorch(slim_batch_norm, oracle, args, kwargs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slim_batch_norm_activations(activation, training, residual, dtype):
    for shape in SHAPES[1:3]:
        args, kwargs = sample(shape, 32, training=training, residual=residual, activation=activation)
        check_as_good_as_pytorch(slim_batch_norm, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slim_batch_norm_layouts(shape, training, dtype):
    args, kwargs = sample(shape, 32, training=training, residual=True, activation="relu")
    for _, x in layouts(args[0]):
        for _, residual in layouts(kwargs["residual"]):
            inputs = (x, *args[1:]), kwargs | {"residual": residual}
            check_as_good_as_pytorch(slim_batch_norm, oracle, *inputs, dtype)
    for _, weight in layouts(args[3]):
        check_as_good_as_pytorch(slim_batch_norm, oracle, (*args[:3], weight, weight.flip(0)), kwargs, dtype)
    for channels_last in (False, True):
        y = slim_batch_norm(
            args[0].movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else args[0],
            *args[1:],
            training=training,
        )
        assert y.movedim(1, -1).is_contiguous() == channels_last or len(shape) == 2


@pytest.mark.parametrize("present", [(True, False), (False, True), (False, False)])
def test_slim_batch_norm_optional_parameters(present):
    args, kwargs = sample(SHAPES[2], 32, training=True, residual=True, activation="elu")
    weight, bias = (t if given else None for t, given in zip(args[3:], present, strict=True))
    check_as_good_as_pytorch(slim_batch_norm, oracle, (args[0], None, None, weight, bias), kwargs, torch.float32)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(8, 5, 33, 31), (700, 5), (300, 17, 3, 3), (2000, 32)])
def test_slim_batch_norm_keeps_its_accuracy_far_from_zero(shape, channels_last):
    args, kwargs = sample(shape, 40, training=True, mean=3000.0)
    x = args[0].movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else args[0]
    x[0] += 500
    check_as_good_as_pytorch(slim_batch_norm, oracle, (x, *args[1:]), kwargs, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_slim_batch_norm_16_bit_input_with_float32_parameters(training, dtype):
    (x, mean, var, weight, bias), kwargs = sample(SHAPES[2], 32, training=training, residual=True, activation="relu")
    weight.requires_grad_(), bias.requires_grad_()
    x, kwargs["residual"] = x.to(dtype), kwargs["residual"].to(dtype)
    y = slim_batch_norm(x, mean, var, weight, bias, **kwargs)
    y.sum().backward()
    assert y.dtype == dtype
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    wide = oracle(x.float(), mean, var, weight, bias, **kwargs | {"residual": kwargs["residual"].float()})
    assert error(y.detach(), wide.detach()) < 5e-3


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("momentum", [0.1, 1.0, torch.tensor(0.25)], ids=["0.1", "1", "tensor"])
def test_slim_batch_norm_updates_the_first_running_statistics(momentum, dtype):
    x, parameters = (torch.randn(6, 9, 5) * 3 + 2).to(dtype), torch.float64 if dtype == torch.float64 else torch.float32
    mean, var = torch.randn(12, dtype=parameters), torch.rand(12, dtype=parameters)
    expected_mean, expected_var = mean.clone(), var.clone()
    slim_batch_norm(x, mean, var, training=True, momentum=momentum)
    F.batch_norm(x.to(parameters), expected_mean[:9], expected_var[:9], training=True, momentum=float(momentum))
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(var, expected_var)
    assert torch.equal(mean[9:], expected_mean[9:])
    assert torch.equal(var[9:], expected_var[9:])


def test_slim_batch_norm_empty_batch_leaves_the_statistics_alone():
    x, mean, var, weight = torch.randn(0, 6, 4, requires_grad=True), torch.randn(8), torch.rand(8), torch.randn(8)
    weight.requires_grad_()
    for training in (True, False):
        before = mean.clone(), var.clone()
        y = slim_batch_norm(x, mean, var, weight, training=training, activation="relu")
        y.sum().backward()
        assert y.shape == x.shape
        assert torch.equal(mean, before[0])
        assert torch.equal(var, before[1])
        assert torch.equal(weight.grad, torch.zeros(8))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_slim_batch_norm_gradcheck(training, activation):
    args, kwargs = sample((3, 2, 3), 4, training=training, residual=True, activation=activation)
    if training:
        x, _, _, weight, bias = args
        check_gradients(lambda x, w, b, **k: slim_batch_norm(x, None, None, w, b, **k), (x, weight, bias), kwargs)
    else:
        x, mean, var, weight, bias = args
        fixed = mean.double(), var.double()
        check_gradients(lambda x, w, b, **k: slim_batch_norm(x, *fixed, w, b, **k), (x, weight, bias), kwargs)
    residual = kwargs.pop("residual").double().requires_grad_()
    args = tuple(None if t is None else t.double() for t in args)
    assert torch.autograd.gradcheck(lambda r: slim_batch_norm(*args, **kwargs, residual=r), residual)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_slim_batch_norm_opcheck(training, activation, channels_last):
    args, kwargs = sample((4, 6, 3, 5), 8, training=training, residual=True)
    x, mean, var, weight, bias = args
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    leaves = x.requires_grad_(), mean, var, weight.requires_grad_(), bias.requires_grad_()
    residual = kwargs["residual"].requires_grad_()
    torch.library.opcheck(
        torch.ops.slimkernels.slim_batch_norm.default, (*leaves, training, 1e-5, activation, residual)
    )
    y, used_mean, used_var = torch.ops.slimkernels.slim_batch_norm.default(
        *leaves, training, 1e-5, activation, residual
    )
    by_output = activation in ("none", "relu")
    saved = (y.detach() if by_output else None, None if by_output else residual.detach())
    torch.library.opcheck(
        torch.ops.slimkernels.slim_batch_norm_backward.default,
        (
            *(torch.randn_like(y), x.detach(), used_mean, used_var, weight.detach(), bias.detach(), *saved),
            *(training, 1e-5, activation, True, True, True, True),
        ),
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_slim_batch_norm_compiles_to_few_graphs(training):
    weight, bias = torch.randn(64, requires_grad=True), torch.randn(64, requires_grad=True)
    mean, var = torch.randn(64), torch.rand(64)

    def call(x, residual):
        # Copies, so that the eager and the compiled run start from the same statistics.
        own_mean, own_var = mean.clone(), var.clone()
        y = slim_batch_norm(x, own_mean, own_var, weight, bias, training=training, activation="relu", residual=residual)
        return y, own_mean, own_var

    inputs = [tuple(torch.randn(3, c, 4, 5, requires_grad=True) for _ in range(2)) for c in range(4, 40, 3)]
    check_graphs(call, inputs)


def test_slim_batch_norm_autocast_keeps_the_dtype_of_x():
    x, weight = torch.randn(4, 6, 3).bfloat16(), torch.randn(8, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = slim_batch_norm(x, None, None, weight, training=True, residual=torch.randn(4, 6, 3))
    assert y.dtype == torch.bfloat16


X, S, W = torch.randn(4, 6, 3), torch.rand(8), torch.randn(8)


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "message"),
    [
        ((torch.randn(4), S, S), {}, ValueError, r"slim_batch_norm: expected x to have at least 2 dimensions"),
        ((torch.randn(4, 0), S, S), {}, ValueError, r"expected x to have at least 1 channel, got shape \(4, 0\)"),
        ((X, S[:5], S), {}, ValueError, r"expected running_mean of shape \(C,\) with C >= x.shape\[1\]=6, got \(5,\)"),
        ((X, S, S[:5]), {}, ValueError, r"expected running_var of shape \(C,\) with C >= x.shape\[1\]=6, got \(5,\)"),
        ((X, S, S, W[:5]), {}, ValueError, r"expected weight of shape \(C,\) with C >= x.shape\[1\]=6, got \(5,\)"),
        (
            (X, S, S, W, W[None]),
            {},
            ValueError,
            r"expected bias of shape \(C,\) with C >= x.shape\[1\]=6, got \(1, 8\)",
        ),
        ((X, S, None), {}, ValueError, "expected running_mean and running_var to be both given or both None"),
        ((X, None, None), {}, ValueError, "expected running_mean and running_var when training is False, got None"),
        ((X, S, S), {"residual": X[:1]}, ValueError, r"expected residual of shape \(4, 6, 3\), got \(1, 6, 3\)"),
        ((X, S, S), {"activation": "swish"}, ValueError, "expected activation to be one of none, relu"),
        ((X[:1, :, 0], S, S), {"training": True}, ValueError, "expected more than 1 value per channel in training"),
        ((X, S, S, W.double()), {}, TypeError, "expected weight of dtype torch.float32, got torch.float64"),
        ((X.half(), S, S, W.double()), {}, TypeError, "expected weight of dtype torch.float16 or float32, got"),
        ((X, S, S), {"residual": X.double()}, TypeError, "expected residual of dtype torch.float32 like x, got"),
        ((X.long(), S, S), {}, TypeError, "expected x of dtype float32, float64, bfloat16 or float16"),
        ((X.to("meta"), S, S), {}, ValueError, "expected running_mean on device meta like x, got cpu"),
    ],
)
def test_slim_batch_norm_errors(args, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        slim_batch_norm(*args, **kwargs)
