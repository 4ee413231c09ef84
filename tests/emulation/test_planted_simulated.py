"""Rung T3 finds a bug of every Triton kernel, and barriers that are missing in the code of the norms."""

import pytest
import torch

from slimkernels import ops
from tests.emulation.launchers import launched_on_cpu
from tests.helpers import check_as_good_as_pytorch

pytest.importorskip("triton", reason="Triton is not installed")
driver = pytest.importorskip("tests.emulation.triton_driver", reason="needs Triton")
planted = pytest.importorskip("tests.emulation.planted", reason="needs Triton")
table = pytest.importorskip("tests.emulation.table")
FAST = ("features of a row",)


def test_every_triton_kernel_has_a_planted_bug():
    assert {bug.kernel for bug in planted.BUGS.values()} == table.triton_kernels()


@pytest.mark.slow_emulation
@pytest.mark.parametrize("op", planted.TESTS)
def test_copies_without_a_bug_pass(op, tmp_path):
    with driver.simulated("sm_80"), planted.kernels_with(None, op, tmp_path):
        planted.check(op)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow_emulation) for n in planted.BUGS]
)
def test_planted_bugs_are_found_simulated(name, tmp_path):
    bug = planted.BUGS[name]
    with (
        driver.simulated("sm_80"),
        planted.kernels_with(bug, bug.op, tmp_path),
        pytest.raises((AssertionError, driver.PTXError)),
    ):
        planted.check(bug.op)


@pytest.mark.slow_emulation
@pytest.mark.parametrize("op", ["slim_batch_norm", "slim_group_norm", "slim_layer_norm", "slim_rms_norm"])
def test_norms_without_barriers_are_found(op):
    from tests.emulation.test_norms_simulated import TESTS, problem

    args, kwargs = problem(op, (3, 40, 33), "silu")
    if op in ("slim_batch_norm", "slim_group_norm"):
        args = (args[0].movedim(1, -1).contiguous().movedim(-1, 1), *args[1:])

    def without_barriers():
        for order in ("ahead", "behind"):
            with driver.simulated("sm_80", order, lambda ptx: ptx.replace("bar.sync", "// bar.sync")):
                check_as_good_as_pytorch(getattr(ops, op), TESTS[op].oracle, args, kwargs, torch.float32)

    with launched_on_cpu(op), pytest.raises((AssertionError, driver.PTXError)):
        without_barriers()
