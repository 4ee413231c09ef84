"""The norms for GPUs, compiled ahead of time: they fit the registers and load 16 bytes at a time where memory allows it."""

import pytest
import torch

from tests.helpers import dtype_id

pytest.importorskip("triton", reason="Triton is not installed")
aot = pytest.importorskip("tests.emulation.aot", reason="needs Triton")
cases = pytest.importorskip("tests.emulation.norm_cases")
_row_norm = pytest.importorskip("slimkernels.triton_kernels._row_norm")
_rows = pytest.importorskip("slimkernels.triton_kernels._rows")
slow = pytest.mark.slow_emulation

SUMS = {"_channel_norm_merge_kernel", "_channel_norm_bwd_merge_kernel", "_norm_bwd_w_kernel"}  # of few partial results
FAST = {("slim_batch_norm", "bf16", "sm_80"), ("slim_layer_norm", "f32", "sm_90")}
CASES = [
    pytest.param(op, dtype, target, marks=() if (op, dtype_id(dtype), target) in FAST else (slow,))
    for op in cases.OPS
    for dtype in cases.DTYPES
    for target in aot.TARGETS
]


def compiled(op, dtype, target, layout):
    for direction in cases.DIRECTIONS:
        for launch in cases.launches(op, direction, dtype, layout):
            yield launch, launch.resources(target)


@pytest.mark.parametrize(("op", "dtype", "target"), CASES, ids=dtype_id)
def test_norms_fit_and_load_16_bytes(op, dtype, target):
    for layout in cases.LAYOUTS[op]:
        for launch, found in compiled(op, dtype, target, layout):
            what = f"{launch.name} for {target}, {layout}"
            assert (found.spills, found.stack) == (0, 0), f"{found.spills} bytes of spills in {what}"
            assert found.shared <= aot.LIMITS["sm_120"].shared_per_block, what
            # A wavefront has 64 lanes: on AMD some of these tiles are too small for 16 bytes a lane.
            if layout != "ragged" and target != "gfx942" and launch.name not in SUMS:
                assert found.mix["LDG128"] > 0, f"no 16-byte load in {what}"
                # What waits for memory needs other warps to run meanwhile.
                assert found.occupancy >= 0.25, f"{found.registers} registers let too few warps reside in {what}"


@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), *(pytest.param(shape, marks=slow) for shape in [(3, 1, 5), (1, 7, 1)])], ids=str
)
def test_norms_of_single_values_compile(op, shape):
    for direction in cases.DIRECTIONS:
        for launch in cases.launches(op, direction, torch.float32, shape):
            assert launch.resources("sm_90").spills == 0


def test_the_limits_find_tiles_with_too_much_a_thread(monkeypatch):
    """As many threads for three tensors and two sums as forward has for one tensor."""
    options = _rows.Rows.options
    monkeypatch.setattr(_rows.Rows, "options", lambda rows, warps: options(rows, rows.warps))
    for op, layout in [("slim_batch_norm", "channels-last"), ("slim_group_norm", "ragged")]:
        launch = next(
            k
            for k in cases.launches(op, "backward", torch.bfloat16, layout)
            if k.name == "_channel_norm_bwd_sums_kernel"
        )
        found = launch.resources("sm_80")
        assert found.occupancy < 0.25 if layout == "channels-last" else found.spills > 0
    monkeypatch.setattr(_row_norm, "aligned", lambda *tensors, sizes=(): True)
    rows, *_ = cases.launches("slim_layer_norm", "backward", torch.bfloat16, "ragged")
    assert rows.resources("sm_80").occupancy < 0.25


def test_a_ragged_width_has_no_16_byte_load():
    launch, found = next(iter(compiled("slim_layer_norm", torch.float32, "sm_90", "ragged")))
    assert launch.name == "_row_norm_fwd_kernel"
    assert found.mix["LDG128"] == 0
