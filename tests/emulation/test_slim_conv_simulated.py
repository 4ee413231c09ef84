"""``slim_conv`` for GPUs through Triton's compiler, its PTX run on the CPU: the compiled code computes the right thing."""

import pytest
import torch

from slimkernels.ops import slim_conv
from tests.emulation.launchers import launched_on_cpu
from tests.helpers import DTYPES, check_as_good_as_pytorch, dtype_id, error, map_tensors, run_with_grads
from tests.ops.test_slim_conv import oracle, sample

pytest.importorskip("triton", reason="Triton is not installed")
driver = pytest.importorskip("tests.emulation.triton_driver", reason="needs Triton")
slow = pytest.mark.slow_emulation

CASES = {
    "flat": ((5, 7, 8, 9, (3, 3), (6, 5)), {"padding": 1, "activation": "relu"}),
    "lines": ((20, 18, 24, 20, (3, 2), (6, 5)), {"padding": 1, "activation": "gelu"}),
    "aligned": ((32, 48, 64, 64, (3, 3), (8, 8)), {"padding": 1, "activation": "silu"}),
    "stride": ((18, 17, 20, 20, (3, 3), (9, 8)), {"stride": 2, "padding": 1}),
    "dilation": ((6, 17, 20, 20, (2, 3), (9, 12)), {"stride": (3, 2), "padding": 2, "dilation": (2, 3)}),
    "groups": ((2 * 17, 2 * 5, 2 * 20, 12, (2, 2), (5, 4)), {"groups": 2}),
    "pointwise": ((32, 32, 48, 48, (1, 1), (6, 6)), {"activation": "relu"}),
    "one": ((1, 1, 2, 2, (3, 3), (4, 4)), {}),
    "1d": ((17, 9, 20, 12, (5,), (20,)), {"stride": 2, "padding": 2}),
}
FAST = {
    ("flat", torch.float32, "sm_80"),
    ("stride", torch.bfloat16, "sm_80"),
    ("aligned", torch.bfloat16, "sm_90"),
    ("groups", torch.float16, "sm_90"),
}
ALL = [
    pytest.param(name, dtype, target, marks=() if (name, dtype, target) in FAST else (slow,))
    for name in CASES
    for dtype in DTYPES
    for target in driver.TARGETS
]


def problem(name):
    shape, options = CASES[name]
    args, kwargs = sample(*shape, channels_last=len(shape[-1]) == 2, **options)
    if name in ("aligned", "pointwise"):  # as model.to(memory_format=torch.channels_last) leaves it
        args = (args[0], args[1].contiguous(memory_format=torch.channels_last), *args[2:])
    return args, kwargs


def set_precision(monkeypatch, precision):
    monkeypatch.setattr("slimkernels.triton_kernels._conv.conv_precision", lambda dtype: precision)


@pytest.mark.parametrize(("name", "dtype", "target"), ALL, ids=dtype_id)
def test_slim_conv_simulated(name, dtype, target, monkeypatch):
    set_precision(monkeypatch, "ieee")
    args, kwargs = problem(name)
    with driver.simulated(target) as launches, launched_on_cpu("slim_conv"):
        check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, dtype)
    assert {launch.kernel for launch in launches} == {"_slim_conv_kernel", "_slim_conv_bwd_w_kernel"}
    if dtype != torch.float32:
        assert all("mma.sync" in launch.ptx or "wgmma" in launch.ptx for launch in launches)


@pytest.mark.parametrize("target", [pytest.param("sm_80", marks=slow), "sm_90"])
def test_slim_conv_simulated_in_tf32(target, monkeypatch):
    set_precision(monkeypatch, "tf32")
    args, kwargs = map_tensors(problem("aligned"), lambda t: t.detach().requires_grad_())
    with driver.simulated(target) as launches, launched_on_cpu("slim_conv"):
        ours = run_with_grads(slim_conv, args, kwargs)
    assert all("tf32" in launch.ptx for launch in launches)
    exact = run_with_grads(oracle, *map_tensors((args, kwargs), lambda t: t.detach().double().requires_grad_()))
    for a, e in zip([*ours[0], *ours[1]], [*exact[0], *exact[1]], strict=True):
        assert error(a, e) < 2e-3  # 10 bits of mantissa, cut off


@slow
@pytest.mark.parametrize("target", driver.TARGETS)
@pytest.mark.parametrize("order", ["ahead", "behind"])
@pytest.mark.parametrize("name", ["flat", "aligned", "stride"])
def test_slim_conv_simulated_with_warps_apart(name, order, target, monkeypatch):
    set_precision(monkeypatch, "ieee")
    args, kwargs = problem(name)
    with driver.simulated(target, order), launched_on_cpu("slim_conv"):
        check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, torch.bfloat16)


@slow
@pytest.mark.parametrize("target", driver.TARGETS)
def test_slim_conv_simulated_with_split_sums(target, monkeypatch):
    set_precision(monkeypatch, "ieee")
    args, kwargs = sample(8, 9, 10, 12, (2, 2), (24, 25), channels_last=True, residual=False)
    with driver.simulated(target) as launches, launched_on_cpu("slim_conv"):
        check_as_good_as_pytorch(slim_conv, oracle, args, kwargs, torch.bfloat16)
    assert any(launch.kernel == "_slim_conv_bwd_w_kernel" and launch.grid[1] > 1 for launch in launches)


def test_slim_conv_copies_not_waited_for_are_found(monkeypatch):
    set_precision(monkeypatch, "ieee")
    args, kwargs = problem("aligned")

    def impatient(ptx):
        assert "cp.async.wait_group" in ptx
        return ptx.replace("cp.async.wait_group", "// cp.async.wait_group")

    with (
        torch.no_grad(),
        driver.simulated("sm_80", edit=impatient),
        launched_on_cpu("slim_conv"),
    ):
        y = slim_conv(*map_tensors(args, lambda t: t.to(torch.bfloat16)), **map_tensors(kwargs, torch.Tensor.bfloat16))
    assert y.isnan().any()


def test_slim_conv_outside_of_its_input_is_found(monkeypatch):
    """A padding that the output's size does not know of reads no memory; a batch that is not there does."""
    from slimkernels.triton_kernels._conv import launch_conv

    set_precision(monkeypatch, "ieee")
    x, weight = torch.randn(2, 6, 5, 5).contiguous(memory_format=torch.channels_last), torch.randn(8, 6, 3, 3)
    y = torch.empty(2, 5, 5, 8).permute(0, 3, 1, 2)
    with driver.simulated("sm_80"):
        launch_conv(x, weight, y, (1, 1, 1, 1, 1, 1), 1, False)
        torch.testing.assert_close(y, oracle(x, weight, padding=1))
        with pytest.raises(driver.PTXError, match=r"global .* out of bounds"):
            launch_conv(x, weight[:5], y, (1, 1, 1, 1, 1, 1), 1, False)


@slow
@pytest.mark.parametrize("target", driver.TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_slim_conv_transpose_simulated(dtype, target, monkeypatch):
    from slimkernels.ops import slim_conv_transpose
    from tests.ops import test_slim_conv_transpose as transpose

    set_precision(monkeypatch, "ieee")
    options = {"stride": 2, "padding": 1, "output_padding": 1, "channels_last": True, "activation": "relu"}
    args, kwargs = transpose.sample(17, 6, 20, 9, (3, 3), (5, 4), **options)
    with driver.simulated(target), launched_on_cpu("slim_conv_transpose"):
        check_as_good_as_pytorch(slim_conv_transpose, transpose.oracle, args, kwargs, dtype)
