import pytest
import torch
import torch.nn.functional as F

from slimkernels.ops import slim_group_norm
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


def oracle(x, weight=None, bias=None, *, group_size, eps=1e-5, activation="none", residual=None):
    c = x.shape[1]
    weight, bias = (None if t is None else t[:c] for t in (weight, bias))
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch's backward fails for a bias without a weight
    whole = c // group_size * group_size
    parts = []
    for first, last in ((0, whole), (whole, c)):
        if last > first:
            groups = max((last - first) // group_size, 1)
            own = (None if t is None else t[first:last] for t in (weight, bias))
            parts.append(F.group_norm(x[:, first:last], groups, *own, eps))
    y = torch.cat(parts, 1)
    y = y if residual is None else y + residual
    return y if activation == "none" else _activation.activation(y, activation)


def sample(shape, full, *, residual=False, mean=0.0, group_size=4, **kwargs):
    kwargs |= {"residual": torch.randn(shape) if residual else None, "group_size": group_size}
    return (torch.randn(shape) + mean, torch.randn(full), torch.randn(full)), kwargs


def channels_last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("c", ODD_SIZES)
def test_slim_group_norm_odd_widths(c, dtype, device):
    for shape, group_size in [((3, c, 5, 7), 4), ((2, c, 129), c + 5), ((2, c, 50), 1), ((5, c, 16), 32)]:
        # At least 8 channels of parameters in use, so that no gradient is a single sum that may cancel by chance.
        shape = (shape[0], max(c, 8), *shape[2:])
        args, kwargs = sample(shape, c + 13, residual=True, activation="relu", group_size=group_size)
        check_as_good_as_pytorch(slim_group_norm, oracle, args, kwargs, dtype, device)
        kwargs["residual"] = channels_last(kwargs["residual"])
        check_as_good_as_pytorch(slim_group_norm, oracle, (channels_last(args[0]), *args[1:]), kwargs, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slim_group_norm_activations(activation, residual, dtype):
    args, kwargs = sample((7, 24, 10), 32, residual=residual, activation=activation)
    check_as_good_as_pytorch(slim_group_norm, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(33, 24), (5, 24, 7), (3, 24, 4, 5), (2, 24, 2, 3, 4)], ids=str)
def test_slim_group_norm_layouts(shape, dtype):
    args, kwargs = sample(shape, 32, residual=True, activation="relu")
    for _, x in layouts(args[0]):
        for _, residual in layouts(kwargs["residual"]):
            check_as_good_as_pytorch(slim_group_norm, oracle, (x, *args[1:]), kwargs | {"residual": residual}, dtype)
    for _, weight in layouts(args[1]):
        check_as_good_as_pytorch(slim_group_norm, oracle, (args[0], weight, weight.flip(0)), kwargs, dtype)


@pytest.mark.parametrize("shape", [(0, 8), (0, 8, 4), (1, 8, 1), (1, 8)])
def test_slim_group_norm_empty_and_small_batches(shape):
    args, kwargs = sample(shape, 12, residual=True, activation="silu")
    check_as_good_as_pytorch(slim_group_norm, oracle, args, kwargs, torch.float32)


@pytest.mark.parametrize("present", [(True, False), (False, True), (False, False)])
def test_slim_group_norm_optional_parameters(present):
    args, kwargs = sample((4, 24, 5), 32, residual=True, activation="elu")
    parameters = (t if given else None for t, given in zip(args[1:], present, strict=True))
    check_as_good_as_pytorch(slim_group_norm, oracle, (args[0], *parameters), kwargs, torch.float32)


def test_slim_group_norm_keeps_its_accuracy_far_from_zero():
    args, kwargs = sample((5, 33, 40), 40, mean=3000.0)
    check_as_good_as_pytorch(slim_group_norm, oracle, args, kwargs, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_slim_group_norm_16_bit_input_with_float32_parameters(dtype):
    (x, weight, bias), kwargs = sample((6, 24, 5), 32, activation="relu")
    weight.requires_grad_()
    y = slim_group_norm(x.to(dtype), weight, bias, **kwargs)
    y.sum().backward()
    assert y.dtype == dtype
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), oracle(x, weight, bias, **kwargs), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slim_group_norm_gradcheck(activation):
    (x, weight, bias), kwargs = sample((3, 4, 2), 6, residual=True, activation=activation)
    check_gradients(slim_group_norm, (x, weight, bias), kwargs)
    residual = kwargs.pop("residual").double().requires_grad_()
    args = x.double(), weight.double(), bias.double()
    assert torch.autograd.gradcheck(lambda r: slim_group_norm(*args, **kwargs, residual=r), residual)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_slim_group_norm_opcheck(activation):
    (x, weight, bias), kwargs = sample((4, 6, 5), 8, residual=True)
    leaves = x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    residual = kwargs["residual"].requires_grad_()
    torch.library.opcheck(torch.ops.slimkernels.slim_group_norm.default, (*leaves, 4, 1e-5, activation, residual))
    y, *statistics = torch.ops.slimkernels.slim_group_norm.default(*leaves, 4, 1e-5, activation, residual)
    by_output = activation in ("none", "relu")
    saved = (y.detach() if by_output else None, None if by_output else residual.detach())
    parameters = weight.detach(), bias.detach()
    torch.library.opcheck(
        torch.ops.slimkernels.slim_group_norm_backward.default,
        (torch.randn_like(y), x.detach(), *statistics, *parameters, *saved, 4, activation, True, True, True, True),
    )


def test_slim_group_norm_compiles_to_few_graphs():
    weight, bias = torch.randn(64, requires_grad=True), torch.randn(64, requires_grad=True)
    inputs = [tuple(torch.randn(3, c, 4, requires_grad=True) for _ in range(2)) for c in range(4, 40, 3)]
    check_graphs(lambda x, r: slim_group_norm(x, weight, bias, group_size=4, activation="relu", residual=r), inputs)


def test_slim_group_norm_autocast_keeps_the_dtype_of_x():
    x, weight = torch.randn(4, 6).bfloat16(), torch.randn(8)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert slim_group_norm(x, weight, group_size=2, residual=torch.randn(4, 6)).dtype == torch.bfloat16


X, W = torch.randn(4, 6), torch.randn(8)


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "message"),
    [
        ((X[0], W), {}, ValueError, r"slim_group_norm: expected x to have at least 2 dimensions \(N, c, \*\), got"),
        ((X, W), {"group_size": 0}, ValueError, "expected group_size of at least 1, got 0"),
        ((torch.randn(4, 0), W), {}, ValueError, r"expected x to have at least 1 channel, got shape \(4, 0\)"),
        ((X, W[:5]), {}, ValueError, r"expected weight of shape \(C,\) with C >= x.shape\[1\]=6, got \(5,\)"),
        ((X, W, W[None]), {}, ValueError, r"expected bias of shape \(C,\) with C >= x.shape\[1\]=6, got \(1, 8\)"),
        ((X, W), {"residual": X[:1]}, ValueError, r"expected residual of shape \(4, 6\), got \(1, 6\)"),
        ((X, W), {"activation": "swish"}, ValueError, "expected activation to be one of none, relu"),
        ((X, W.double()), {}, TypeError, r"expected weight of dtype torch\.float32, got torch\.float64"),
        ((X, W), {"residual": X.double()}, TypeError, r"expected residual of dtype torch\.float32 like x, got"),
        ((X.long(), W), {}, TypeError, "expected x of dtype float32, float64, bfloat16 or float16"),
        ((X.to("meta"), W), {}, ValueError, "expected weight on device meta like x, got cpu"),
    ],
)
def test_slim_group_norm_errors(args, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        slim_group_norm(*args, **{"group_size": 2} | kwargs)
