"""Layer and RMS norm for GPUs, interpreted: every width, layout, activation and optional argument."""

import pytest
import torch

from slimkernels.ops import slim_layer_norm, slim_rms_norm
from slimkernels.ops._common import ACTIVATIONS
from tests.emulation.launchers import launched_on_cpu
from tests.helpers import DTYPES, ODD_SIZES, check_as_good_as_pytorch, dtype_id, layouts
from tests.ops import test_slim_layer_norm as layer
from tests.ops import test_slim_rms_norm as rms

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.interpreted

OPS = {"layer": (slim_layer_norm, layer.oracle, layer.sample), "rms": (slim_rms_norm, rms.oracle, rms.sample)}


@pytest.fixture(autouse=True)
def _on_cpu():
    with launched_on_cpu("slim_layer_norm", "slim_rms_norm"):
        yield


def check(kind, dtype, shape, full, *, layout=lambda x: x, **options):
    op, oracle, sample = OPS[kind]
    (x, *parameters), kwargs = sample(shape, full, **options)
    check_as_good_as_pytorch(op, oracle, (layout(x), *parameters), kwargs, dtype)


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("c", ODD_SIZES[1:])
def test_row_norm_odd_widths(c, dtype, kind):
    check(kind, dtype, (11, c), c + 5, residual=True, activation="relu")
    check(kind, dtype, (1, c), c, activation="silu")


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_row_norm_activations(activation, residual, kind):
    for dtype in DTYPES[:2]:
        check(kind, dtype, (33, 24), 32, residual=residual, activation=activation)


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("shape", [(33, 24), (5, 7, 24), (3, 4, 5, 24)], ids=str)
def test_row_norm_layouts(shape, kind):
    op, oracle, sample = OPS[kind]
    (x, weight, *rest), kwargs = sample(shape, 32, residual=True, activation="relu")
    for (_, view), (_, residual) in zip(layouts(x), reversed(list(layouts(kwargs["residual"]))), strict=True):
        check_as_good_as_pytorch(op, oracle, (view, weight, *rest), kwargs | {"residual": residual}, torch.float32)
    for _, view in layouts(weight):
        check_as_good_as_pytorch(op, oracle, (x, view, *rest), kwargs, torch.float32)


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (1, 1, 8), (4, 1)])
def test_row_norm_empty_and_small(shape, kind):
    check(kind, torch.float32, shape, 12, residual=True, activation="silu")


@pytest.mark.parametrize("kind", OPS)
def test_row_norm_without_parameters(kind):
    op, oracle, sample = OPS[kind]
    (x, *parameters), kwargs = sample((20, 24), 32, residual=True, activation="elu")
    check_as_good_as_pytorch(op, oracle, (x, *[None] * len(parameters)), kwargs, torch.float32)
    if kind == "layer":
        check_as_good_as_pytorch(op, oracle, (x, None, parameters[1]), kwargs, torch.float32)
        check_as_good_as_pytorch(op, oracle, (x, parameters[0], None), kwargs, torch.float32)


def test_layer_norm_keeps_its_accuracy_far_from_zero():
    check("layer", torch.float32, (50, 333), 400, mean=3000.0)


@pytest.mark.parametrize("kind", OPS)
@pytest.mark.parametrize("c", [2048, 8200, pytest.param(16384, marks=pytest.mark.slow_emulation)])
def test_row_norm_wide_rows(c, kind):
    check(kind, torch.float32, (2, c), c, residual=True, activation="gelu")


@pytest.mark.parametrize("seed", [0, 1])
def test_row_norm_sums_over_many_programs(seed, monkeypatch):
    from slimkernels.triton_kernels import _row_norm
    from tests.emulation import interpreter

    monkeypatch.setattr(_row_norm, "MULTIPROCESSORS", 4)
    interpreter.set_seed(seed)
    check("layer", torch.float32, (39, 1000), 1024, activation="relu")
    names = [launch.name for launch in interpreter.LAUNCHES[-3:]]
    assert names == ["_row_norm_fwd_kernel", "_row_norm_bwd_kernel", "_norm_bwd_w_kernel"]
    assert interpreter.LAUNCHES[-2].programs == 7  # 20 tiles of 2 rows for at most 8 programs: 3 tiles each


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("kind", OPS)
def test_row_norm_16_bit_input_with_float32_parameters(kind, dtype):
    op, oracle, sample = OPS[kind]
    (x, weight, *rest), kwargs = sample((6, 24), 32, activation="relu")
    weight.requires_grad_()
    y = op(x.to(dtype), weight, *rest, **kwargs)
    y.sum().backward()
    assert (y.dtype, weight.grad.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(y.float(), oracle(x, weight, *rest, **kwargs), rtol=2e-2, atol=5e-2)


def test_row_norm_only_the_gradients_that_are_asked_for():
    x, weight, bias = torch.randn(9, 24), torch.randn(32, requires_grad=True), torch.randn(32)
    (dw,) = torch.autograd.grad(slim_layer_norm(x, weight, bias).square().sum(), [weight])
    (expected,) = torch.autograd.grad(layer.oracle(x, weight, bias).square().sum(), [weight])
    torch.testing.assert_close(dw, expected)
    assert (dw[24:] == 0).all()
