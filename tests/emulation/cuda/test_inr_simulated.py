"""Rung C3 of ``inr_weights``: nvcc's PTX of all its kernels, executed on the CPU, against the reference in float64."""

import re

import pytest

from tests.emulation.cuda import inr
from tests.emulation.cuda.compiled import skip_without_nvcc
from tests.emulation.cuda.simulated import Simulated
from tests.emulation.cuda.test_inr_weights import OPERANDS, TENSORS, check, check_backward, check_segments, smooth_for
from tests.emulation.ptx_parse import PTXError
from tests.emulation.ptx_sim import ORDERS

# Kernels of a call; forward's are uploading its jobs, tables and matrices.
FORWARD = ("upload_kernel", "inr_tables_kernel", "inr_forward_kernel<{}, {}>")
BACKWARD = (
    "upload_kernel", "inr_tables_kernel", "upload_kernel", "inr_backward_kernel<{0}, {1}>", "inr_gradient_kernel<{0}, {1}>",
    "inr_sum_kernel", "inr_scale_kernel", "inr_table_gradient_kernel", "inr_first_gradient_kernel", "inr_sum_kernel",
)  # fmt: skip


@pytest.fixture(autouse=True)
def needs_nvcc():
    skip_without_nvcc()


def run(operand, turns, backward, hidden=33, edit=None, **more):
    kernels = Simulated(inr.STEMS_OF[OPERANDS[operand]], turns, edit)
    options = {"tensors": TENSORS[:2]} | more
    (check_backward if backward else check)(kernels, hidden, 1, OPERANDS[operand], smooth_for(operand), **options)
    size = inr.packing.padded_hidden(hidden, 9)
    names = [name.format(OPERANDS[operand], size) for name in (BACKWARD if backward else FORWARD)]
    return [launch.kernel for launch in kernels.launches], names


def runs():
    for operand in OPERANDS:
        for order in ORDERS:
            for backward in (False, True):
                quick = operand == "bf16" and order == "ahead"
                name = f"{operand}-{order}-{'backward' if backward else 'forward'}"
                marks = [] if quick else [pytest.mark.slow_emulation]
                yield pytest.param(operand, order, backward, marks=marks, id=name)


@pytest.mark.parametrize(("operand", "order", "backward"), list(runs()))
def test_inr_weights_simulated(operand, order, backward):
    launched, expected = run(operand, order, backward)
    assert launched == expected


@pytest.mark.slow_emulation
@pytest.mark.parametrize("hidden", [100, 200, 300])
@pytest.mark.parametrize("operand", ["tf32", "bf16"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_inr_weights_simulated_hidden_sizes(operand, hidden, backward):
    launched, expected = run(operand, "ahead", backward, hidden, tensors=TENSORS[:1])
    assert launched == expected


@pytest.mark.slow_emulation
def test_inr_weights_simulated_noise():
    noisy = {"noise": "element", "samples": 2, "order": "htty"}
    launched, _ = run("bf16", "behind", True, **noisy)
    assert "inr_table_gradient_kernel" not in launched


@pytest.mark.slow_emulation
def test_inr_weights_simulated_segments():
    check_segments(Simulated(inr.STEMS_OF[0], "behind"))


def without(pattern: str, replacement: str = ""):
    """An edit of the sources' PTX, where it holds the pattern."""
    return lambda ptx: re.sub(pattern, replacement, ptx)


# What is broken in the PTX, and whether it is seen in backward.
BUGS = {
    "barriers": (without(r"bar\.sync\s+0;"), False),
    "copies awaited": (without(r"cp\.async\.wait_group\s+\d;"), False),
    "columns of a fragment": (without(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans", "ldmatrix.sync.aligned.m8n8.x4"), True),
    "barriers of backward": (without(r"bar\.sync\s+0;"), True),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow_emulation] * (i > 0)) for i, n in enumerate(BUGS)]
)
def test_inr_weights_simulated_planted_bugs_are_found(name):
    edit, backward = BUGS[name]

    def broken():
        for order in ORDERS:
            run("bf16", order, backward, edit=edit)

    with pytest.raises((AssertionError, PTXError)):
        broken()
