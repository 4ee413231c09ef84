"""Batch and group norm for GPUs, interpreted: every width, layout, activation and optional argument."""

import pytest
import torch

from slimkernels.ops import slim_batch_norm, slim_group_norm
from slimkernels.ops._common import ACTIVATIONS
from tests.emulation.launchers import launched_on_cpu
from tests.helpers import DTYPES, ODD_SIZES, check_as_good_as_pytorch, dtype_id, error, layouts
from tests.ops import test_slim_batch_norm as batch
from tests.ops import test_slim_group_norm as group

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.interpreted

slow = pytest.mark.slow_emulation
SHAPES = [(3, 24, 4, 5), *(pytest.param(s, marks=slow) for s in [(3, 24), (3, 24, 7), (2, 24, 2, 3, 4)])]
KINDS = ["training", "eval", "group"]


@pytest.fixture(autouse=True)
def _on_cpu():
    with launched_on_cpu("slim_batch_norm", "slim_group_norm"):
        yield


def made(kind, shape, full, **options):
    """Op, oracle, arguments and keywords."""
    if kind == "group":
        options.setdefault("group_size", 4)
        return slim_group_norm, group.oracle, *group.sample(shape, full, **options)
    return slim_batch_norm, batch.oracle, *batch.sample(shape, full, training=kind == "training", **options)


def check(kind, dtype, shape, full, **options):
    op, oracle, args, kwargs = made(kind, shape, full, **options)
    check_as_good_as_pytorch(op, oracle, args, kwargs, dtype)


def channels_last(t):
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("c", [c if c in (9, 33) else pytest.param(c, marks=slow) for c in ODD_SIZES if c > 7])
def test_channel_norm_odd_widths(c, dtype, kind):
    for shape in [(3, c, 5, 7), (2 if kind == "group" else 33, c)]:
        op, oracle, args, kwargs = made(kind, shape, c + 5, residual=True, activation="relu")
        check_as_good_as_pytorch(op, oracle, args, kwargs, dtype)
        kwargs["residual"] = channels_last(kwargs["residual"])
        check_as_good_as_pytorch(op, oracle, (channels_last(args[0]), *args[1:]), kwargs, dtype)


@pytest.mark.parametrize("c", [1, 3, 5, 7])
def test_batch_norm_few_channels(c):
    args, kwargs = batch.sample((6, c, 9, 5), c, training=True, residual=True, activation="silu")
    ours, theirs = (f(*args, **kwargs) for f in (slim_batch_norm, batch.oracle))
    assert error(ours, theirs) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_channel_norm_activations(activation, residual, kind):
    check(kind, torch.float32, (2, 24, 17), 32, residual=residual, activation=activation)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channel_norm_layouts(shape, kind):
    op, oracle, (x, *rest), kwargs = made(kind, shape, 32, residual=True, activation="relu")
    residuals = [residual for _, residual in layouts(kwargs["residual"])]
    for i, (_, view) in enumerate(layouts(x)):
        for residual in {residuals[i - 1], residuals[-1 - i]}:
            inputs = (view, *rest), kwargs | {"residual": residual}
            check_as_good_as_pytorch(op, oracle, *inputs, torch.float32)
    for _, weight in layouts(rest[-2]):
        check_as_good_as_pytorch(op, oracle, (x, *rest[:-2], weight, weight.flip(0)), kwargs, torch.float32)


@pytest.mark.parametrize("shape", [(4, 8, 16), (1, 8, 64), (2, 8, 4, 4), (6, 8)], ids=str)
def test_channel_norm_keeps_the_layout(shape):
    for view in (torch.randn(shape), channels_last(torch.randn(shape))):
        y = slim_group_norm(view, group_size=4)
        assert y.stride() == torch.empty_like(view).stride()
        y = slim_batch_norm(view, None, None, training=True)
        assert y.stride() == torch.empty_like(view).stride()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("present", [(True, False), (False, True), (False, False)])
def test_channel_norm_optional_parameters(present, kind):
    op, oracle, args, kwargs = made(kind, (5, 24, 7), 32, residual=True, activation="elu")
    parameters = (t if given else None for t, given in zip(args[-2:], present, strict=True))
    check_as_good_as_pytorch(op, oracle, (*args[:-2], *parameters), kwargs, torch.float32)


@pytest.mark.parametrize("group_size", [1, 3, 8, 24, 40])
@pytest.mark.parametrize("shape", [(2, 24, 50), (1, 24, 9)])
def test_group_norm_sizes_of_groups(shape, group_size):
    for view in (torch.Tensor.contiguous, channels_last):
        args, kwargs = group.sample(shape, 40, activation="silu", group_size=group_size)
        check_as_good_as_pytorch(slim_group_norm, group.oracle, (view(args[0]), *args[1:]), kwargs, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 8), (0, 8, 4)])
def test_channel_norm_empty_batches(shape, kind):
    check(kind, torch.float32, shape, 12)


@slow
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("kind", ["training", "group"])
@pytest.mark.parametrize("shape", [(8, 5, 33, 31), (700, 17), (30, 17, 3, 3)], ids=str)
def test_channel_norm_keeps_its_accuracy_far_from_zero(shape, kind, last):
    if kind == "group" and len(shape) == 2:
        shape = (5, 333)
    op, oracle, (x, *rest), kwargs = made(kind, shape, 400, mean=3000.0)
    check_as_good_as_pytorch(op, oracle, (channels_last(x) if last else x, *rest), kwargs, torch.float32)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=slow)])
@pytest.mark.parametrize("last", [False, pytest.param(True, marks=slow)], ids=["first", "last"])
@pytest.mark.parametrize("kind", ["training", "group"])
def test_channel_norm_many_splits(kind, last, seed):
    """Enough rows for many programs a channel, and several tiles a program."""
    from tests.emulation import interpreter

    interpreter.set_seed(seed)
    op, oracle, (x, *rest), kwargs = made(kind, (2, 12, 130, 31), 16, activation="relu", residual=False)
    check_as_good_as_pytorch(op, oracle, (channels_last(x) if last else x, *rest), kwargs, torch.float32)
    names = {launch.name for launch in interpreter.LAUNCHES[-12:]}
    assert {"_channel_norm_statistics_kernel", "_channel_norm_merge_kernel", "_channel_norm_fwd_kernel"} <= names
    assert {"_channel_norm_bwd_sums_kernel", "_channel_norm_bwd_merge_kernel", "_channel_norm_bwd_x_kernel"} <= names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("kind", KINDS)
def test_channel_norm_16_bit_input_with_float32_parameters(kind, dtype):
    op, oracle, args, kwargs = made(kind, (6, 24, 10), 32, activation="relu")
    x, *rest = args
    rest[-2].requires_grad_()
    y = op(x.to(dtype), *rest, **kwargs)
    y.sum().backward()
    assert (y.dtype, rest[-2].grad.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(y.float(), oracle(*args, **kwargs), rtol=2e-2, atol=5e-2)


def test_batch_norm_updates_the_first_running_statistics():
    x, mean, var = torch.randn(9, 5, 7), torch.zeros(8), torch.ones(8)
    expected = mean.clone(), var.clone()
    slim_batch_norm(x, mean, var, training=True, momentum=0.3)
    torch.nn.functional.batch_norm(x, expected[0][:5], expected[1][:5], training=True, momentum=0.3)
    torch.testing.assert_close((mean, var), expected)


@pytest.mark.parametrize("needed", [0, 3, 4])
def test_batch_norm_only_the_gradient_that_is_asked_for(needed):
    for training in (True, False):
        args, kwargs = batch.sample((9, 24, 4), 32, training=training, activation="gelu")
        args[needed].requires_grad_()
        (ours,) = torch.autograd.grad(slim_batch_norm(*args, **kwargs).square().sum(), [args[needed]])
        (theirs,) = torch.autograd.grad(batch.oracle(*args, **kwargs).square().sum(), [args[needed]])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
