"""``slim_linear`` for GPUs through Triton's compiler, its PTX run on the CPU: the compiled code computes the right thing."""

import pytest
import torch

from slimkernels.ops import slim_linear
from tests.emulation.launchers import launched_on_cpu
from tests.helpers import DTYPES, check_as_good_as_pytorch, dtype_id, error, map_tensors, run_with_grads
from tests.ops.test_slim_linear import oracle, sample

pytest.importorskip("triton", reason="Triton is not installed")
driver = pytest.importorskip("tests.emulation.triton_driver", reason="needs Triton")
slow = pytest.mark.slow_emulation

# (m, n, k, N, K, in_blocks, out_blocks)
SHAPES = {
    "ragged": (37, 21, 41, 30, 50, 1, 1),
    "aligned": (70, 48, 64, 64, 80, 1, 1),
    "blocks": (20, 3 * 7, 2 * 18, 3 * 9, 2 * 20, 2, 3),
    "one": (1, 1, 1, 3, 2, 1, 1),
}


def problem(name, activation="gelu", residual=True):
    m, n, k, full_n, full_k, in_blocks, out_blocks = SHAPES[name]
    blocks = {"in_blocks": in_blocks, "out_blocks": out_blocks}
    return sample(m, n, k, full_n, full_k, residual=residual, activation=activation, **blocks)


FAST = {
    ("ragged", torch.float32, "sm_80"),
    ("ragged", torch.bfloat16, "sm_90"),
    ("aligned", torch.bfloat16, "sm_80"),
    ("aligned", torch.float16, "sm_90"),
    ("blocks", torch.bfloat16, "sm_80"),
}
CASES = [
    pytest.param(name, dtype, target, marks=() if (name, dtype, target) in FAST else (slow,))
    for name in SHAPES
    for dtype in DTYPES
    for target in driver.TARGETS
]


@pytest.mark.parametrize(("name", "dtype", "target"), CASES, ids=dtype_id)
def test_slim_linear_simulated(name, dtype, target):
    args, kwargs = problem(name, "relu" if name == "aligned" else "gelu")
    with driver.simulated(target) as launches, launched_on_cpu("slim_linear"):
        check_as_good_as_pytorch(slim_linear, oracle, args, kwargs, dtype)
    assert {launch.kernel for launch in launches} == {"_slim_linear_kernel", "_slim_linear_bwd_w_kernel"}
    if dtype != torch.float32:
        assert all("mma.sync" in launch.ptx or "wgmma" in launch.ptx for launch in launches)


@pytest.mark.parametrize("target", ["sm_80", pytest.param("sm_90", marks=slow)])
def test_slim_linear_simulated_in_tf32(target, monkeypatch):
    monkeypatch.setattr("slimkernels.triton_kernels.slim_linear.matmul_precision", lambda dtype: "tf32")
    args, kwargs = problem("aligned")
    args, kwargs = map_tensors((args, kwargs), lambda t: t.detach().requires_grad_())
    with driver.simulated(target) as launches, launched_on_cpu("slim_linear"):
        ours = run_with_grads(slim_linear, args, kwargs)
    assert all("tf32" in launch.ptx for launch in launches)
    exact = run_with_grads(oracle, *map_tensors((args, kwargs), lambda t: t.detach().double().requires_grad_()))
    for a, e in zip([*ours[0], *ours[1]], [*exact[0], *exact[1]], strict=True):
        assert error(a, e) < 2e-3  # 10 bits of mantissa, cut off


@pytest.mark.parametrize("target", driver.TARGETS)
@pytest.mark.parametrize("order", ["ahead", pytest.param("behind", marks=slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=slow)], ids=dtype_id)
def test_slim_linear_simulated_with_warps_apart(dtype, order, target):
    args, kwargs = problem("aligned", "relu")
    with driver.simulated(target, order), launched_on_cpu("slim_linear"):
        check_as_good_as_pytorch(slim_linear, oracle, args, kwargs, dtype)


@slow
@pytest.mark.parametrize("target", driver.TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_slim_linear_simulated_with_split_sums_and_large_tiles(dtype, target, monkeypatch):
    from slimkernels.triton_kernels import _common

    with driver.simulated(target) as launches, launched_on_cpu("slim_linear"):
        args, kwargs = sample(1100, 32, 16, 48, 32, activation="silu")
        check_as_good_as_pytorch(slim_linear, oracle, args, kwargs, dtype)
        assert any(launch.grid[1] > 1 for launch in launches)
        monkeypatch.setattr(_common, "MULTIPROCESSORS", 1)
        args, kwargs = sample(144, 160, 96, 160, 96, activation="none")
        check_as_good_as_pytorch(slim_linear, oracle, args, kwargs, dtype)


def test_slim_linear_without_barriers_is_found():
    args, kwargs = problem("aligned", "none", residual=False)

    def without_barriers():
        for order in ("ahead", "behind"):
            with driver.simulated("sm_80", order, lambda ptx: ptx.replace("bar.sync", "// bar.sync")):
                check_as_good_as_pytorch(slim_linear, oracle, args, kwargs, torch.bfloat16)

    with launched_on_cpu("slim_linear"), pytest.raises(AssertionError, match=r"NaN|PyTorch's"):
        without_barriers()


def test_slim_linear_rows_that_are_not_there_are_found():
    from slimkernels.triton_kernels.slim_linear import launch_product

    x, weight, y = torch.randn(4, 20), torch.randn(8, 20), torch.empty(4, 9)
    with driver.simulated("sm_80"):
        launch_product(x[:, :16], weight[:, :16], y[:, :8], 1, 1)
        torch.testing.assert_close(y[:, :8], x[:, :16] @ weight[:, :16].t())
        with pytest.raises(driver.PTXError, match=r"global .* out of bounds"):
            launch_product(x[:, :16], weight[:, :16], y, 1, 1)
