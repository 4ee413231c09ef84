"""The norms for GPUs through Triton's compiler, the PTX run on the CPU: the compiled code computes the right thing."""

import pytest
import torch

from slimkernels import ops
from tests.emulation.launchers import launched_on_cpu
from tests.helpers import DTYPES, check_as_good_as_pytorch, dtype_id
from tests.ops import test_slim_batch_norm, test_slim_group_norm, test_slim_layer_norm, test_slim_rms_norm

pytest.importorskip("triton", reason="Triton is not installed")
driver = pytest.importorskip("tests.emulation.triton_driver", reason="needs Triton")
slow = pytest.mark.slow_emulation

TESTS = {
    "slim_batch_norm": test_slim_batch_norm,
    "slim_group_norm": test_slim_group_norm,
    "slim_layer_norm": test_slim_layer_norm,
    "slim_rms_norm": test_slim_rms_norm,
}
FAST = {("slim_batch_norm", "bf16", "sm_80"), ("slim_layer_norm", "f32", "sm_90")}
CASES = [
    pytest.param(op, dtype, target, marks=() if (op, dtype_id(dtype), target) in FAST else (slow,))
    for op in TESTS
    for dtype in DTYPES
    for target in driver.TARGETS
]


def problem(op, shape, activation):
    training = {"training": True} if op == "slim_batch_norm" else {}
    c = shape[-1] if op in ("slim_layer_norm", "slim_rms_norm") else shape[1]
    return TESTS[op].sample(shape, c + 5, residual=True, activation=activation, **training)


@pytest.mark.parametrize(("op", "dtype", "target"), CASES, ids=dtype_id)
def test_norms_simulated(op, dtype, target):
    with driver.simulated(target) as launches, launched_on_cpu(op):
        for shape, activation in [((3, 17, 11), "gelu"), ((2, 16, 16), "relu")]:
            args, kwargs = problem(op, shape, activation)
            check_as_good_as_pytorch(getattr(ops, op), TESTS[op].oracle, args, kwargs, dtype)
    assert len(launches) >= 6


@slow
@pytest.mark.parametrize("order", ["ahead", "behind"])
@pytest.mark.parametrize("op", TESTS)
def test_norms_simulated_with_warps_apart(op, order):
    args, kwargs = problem(op, (3, 40, 33), "silu")
    if op in ("slim_batch_norm", "slim_group_norm"):
        args = (args[0].movedim(1, -1).contiguous().movedim(-1, 1), *args[1:])
    with driver.simulated("sm_80", order), launched_on_cpu(op):
        check_as_good_as_pytorch(getattr(ops, op), TESTS[op].oracle, args, kwargs, torch.float32)
