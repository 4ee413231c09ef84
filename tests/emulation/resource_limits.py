"""What rung T2 asks of every matrix kernel that a launcher launches."""

import itertools
from collections.abc import Iterable, Iterator

import pytest
import torch

from tests.emulation.aot import LIMITS, TARGETS, Resources
from tests.emulation.capture import Captured

PRECISIONS = [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")]


def matrix_cases(shapes: Iterable[str], fast: set[tuple]) -> Iterator:
    """(shape, dtype, precision, target): all of them; those that are not ``fast`` in make test-gpu-emulated only."""
    for name, (dtype, precision), target in itertools.product(shapes, PRECISIONS, TARGETS):
        marks = () if (name, dtype, target) in fast else pytest.mark.slow_emulation
        yield pytest.param(name, dtype, precision, target, marks=marks)


def check_matrix_kernel(launch: Captured, target: str, rows: str) -> Resources:
    """No spills, little enough shared memory, and the tensor cores in use; ``rows`` names the tile's rows.

    Float32 that is multiplied exactly ("ieee") has no tensor core to use.
    """
    found = launch.resources(target)
    what = f"{launch.name} for {target}, {launch.constants}"
    # On AMD a scalar register that spills goes to a lane of a vector register: what counts is memory, the stack.
    spilled = found.stack if target == "gfx942" else found.spills
    assert spilled == 0, f"{spilled} bytes of spills in {what}"
    # One choice of blocks serves sm_80 and sm_120 (and sm_86 and sm_89), of which the latter have less.
    assert found.shared <= LIMITS["sm_120"].shared_per_block, f"{found.shared} bytes of shared memory in {what}"
    exact = launch.constants["PRECISION"] == "ieee" and "*fp32" in (
        launch.signature.get("x_ptr") or launch.signature["src_ptr"]
    )
    if not exact:
        assert found.tensor_core_instructions > 0, f"no tensor core in {what}"
        if target == "sm_90" and launch.constants[rows] >= 64:
            assert found.mix["WGMMA"] > 0, f"no wgmma in {what}"
    return found
