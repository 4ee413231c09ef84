import pytest
import torch
import torch.nn.functional as F

from slimkernels.ops import slim_layer_norm
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


def oracle(x, weight=None, bias=None, *, eps=1e-5, activation="none", residual=None):
    c = x.shape[-1]
    weight, bias = (None if t is None else t[:c] for t in (weight, bias))
    y = F.layer_norm(x, (c,), weight, bias, eps)
    y = y if residual is None else y + residual
    return y if activation == "none" else _activation.activation(y, activation)


def sample(shape, full, *, residual=False, mean=0.0, **kwargs):
    kwargs["residual"] = torch.randn(shape) if residual else None
    return (torch.randn(shape) + mean, torch.randn(full), torch.randn(full)), kwargs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("c", [c for c in ODD_SIZES if c > 1] + [1000])
def test_slim_layer_norm_odd_widths(c, dtype, device):
    for shape in [(37, c), (3, 5, c)]:
        args, kwargs = sample(shape, c + 5, residual=True, activation="relu")
        check_as_good_as_pytorch(slim_layer_norm, oracle, args, kwargs, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slim_layer_norm_activations(activation, residual, dtype):
    args, kwargs = sample((70, 24), 32, residual=residual, activation=activation)
    check_as_good_as_pytorch(slim_layer_norm, oracle, args, kwargs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(33, 24), (5, 7, 24), (3, 4, 5, 24)], ids=str)
def test_slim_layer_norm_layouts(shape, dtype):
    args, kwargs = sample(shape, 32, residual=True, activation="relu")
    for _, x in layouts(args[0]):
        for _, residual in layouts(kwargs["residual"]):
            check_as_good_as_pytorch(slim_layer_norm, oracle, (x, *args[1:]), kwargs | {"residual": residual}, dtype)
    for _, weight in layouts(args[1]):
        check_as_good_as_pytorch(slim_layer_norm, oracle, (args[0], weight, weight.flip(0)), kwargs, dtype)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (1, 1, 8)])
def test_slim_layer_norm_empty_and_small_batches(shape):
    args, kwargs = sample(shape, 12, residual=True, activation="silu")
    check_as_good_as_pytorch(slim_layer_norm, oracle, args, kwargs, torch.float32)


@pytest.mark.parametrize("present", [(True, False), (False, True), (False, False)])
def test_slim_layer_norm_optional_parameters(present):
    args, kwargs = sample((20, 24), 32, residual=True, activation="elu")
    parameters = (t if given else None for t, given in zip(args[1:], present, strict=True))
    check_as_good_as_pytorch(slim_layer_norm, oracle, (args[0], *parameters), kwargs, torch.float32)


def test_slim_layer_norm_keeps_its_accuracy_far_from_zero():
    args, kwargs = sample((50, 333), 400, mean=3000.0)
    check_as_good_as_pytorch(slim_layer_norm, oracle, args, kwargs, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_slim_layer_norm_16_bit_input_with_float32_parameters(dtype):
    (x, weight, bias), kwargs = sample((6, 24), 32, activation="relu")
    weight.requires_grad_()
    y = slim_layer_norm(x.to(dtype), weight, bias, **kwargs)
    y.sum().backward()
    assert y.dtype == dtype
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), oracle(x, weight, bias, **kwargs), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slim_layer_norm_gradcheck(activation):
    (x, weight, bias), kwargs = sample((3, 4), 6, residual=True, activation=activation)
    check_gradients(slim_layer_norm, (x, weight, bias), kwargs)
    residual = kwargs.pop("residual").double().requires_grad_()
    args = x.double(), weight.double(), bias.double()
    assert torch.autograd.gradcheck(lambda r: slim_layer_norm(*args, **kwargs, residual=r), residual)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_slim_layer_norm_opcheck(activation):
    (x, weight, bias), kwargs = sample((4, 6), 8, residual=True)
    leaves = x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    residual = kwargs["residual"].requires_grad_()
    torch.library.opcheck(torch.ops.slimkernels.slim_layer_norm.default, (*leaves, 1e-5, activation, residual))
    y, *statistics = torch.ops.slimkernels.slim_layer_norm.default(*leaves, 1e-5, activation, residual)
    by_output = activation in ("none", "relu")
    saved = (y.detach() if by_output else None, None if by_output else residual.detach())
    parameters = weight.detach(), bias.detach()
    torch.library.opcheck(
        torch.ops.slimkernels.slim_layer_norm_backward.default,
        (torch.randn_like(y), x.detach(), *statistics, *parameters, *saved, activation, True, True, True, True),
    )


def test_slim_layer_norm_compiles_to_few_graphs():
    weight, bias = torch.randn(64, requires_grad=True), torch.randn(64, requires_grad=True)
    inputs = [tuple(torch.randn(3, 4, c, requires_grad=True) for _ in range(2)) for c in range(4, 40, 3)]
    check_graphs(lambda x, r: slim_layer_norm(x, weight, bias, activation="relu", residual=r), inputs)


def test_slim_layer_norm_autocast_keeps_the_dtype_of_x():
    x, weight = torch.randn(4, 6).bfloat16(), torch.randn(8)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert slim_layer_norm(x, weight, residual=torch.randn(4, 6)).dtype == torch.bfloat16


X, W = torch.randn(4, 6), torch.randn(8)


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "message"),
    [
        (
            (torch.tensor(1.0), W),
            {},
            ValueError,
            r"slim_layer_norm: expected x to have at least 1 dimension \(\*, c\), got",
        ),
        ((torch.randn(4, 0), W), {}, ValueError, r"expected x to have at least 1 channel, got shape \(4, 0\)"),
        ((X, W[:5]), {}, ValueError, r"expected weight of shape \(C,\) with C >= x.shape\[-1\]=6, got \(5,\)"),
        ((X, W, W[None]), {}, ValueError, r"expected bias of shape \(C,\) with C >= x.shape\[-1\]=6, got \(1, 8\)"),
        ((X, W), {"residual": X[:1]}, ValueError, r"expected residual of shape \(4, 6\), got \(1, 6\)"),
        ((X, W), {"activation": "swish"}, ValueError, "expected activation to be one of none, relu"),
        ((X, W.double()), {}, TypeError, r"expected weight of dtype torch\.float32, got torch\.float64"),
        ((X, W), {"residual": X.double()}, TypeError, r"expected residual of dtype torch\.float32 like x, got"),
        ((X.long(), W), {}, TypeError, "expected x of dtype float32, float64, bfloat16 or float16"),
        ((X.to("meta"), W), {}, ValueError, "expected weight on device meta like x, got cpu"),
    ],
)
def test_slim_layer_norm_errors(args, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        slim_layer_norm(*args, **kwargs)
