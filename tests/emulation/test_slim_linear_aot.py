"""``slim_linear`` for GPUs, compiled ahead of time: it fits the registers and shared memory and uses the tensor cores."""

import pytest
import torch

from tests.helpers import dtype_id

pytest.importorskip("triton", reason="Triton is not installed")
aot = pytest.importorskip("tests.emulation.aot", reason="needs Triton")
capture = pytest.importorskip("tests.emulation.capture", reason="needs Triton").capture
limits = pytest.importorskip("tests.emulation.resource_limits", reason="needs Triton")
kernels = pytest.importorskip("slimkernels.triton_kernels.slim_linear")

# (m, n, k, N, K, in_blocks, out_blocks): each makes pick_blocks choose other tiles, and Triton specialise otherwise.
SHAPES = {
    "large": (4096, 1024, 512, 1024, 1024, 1, 1),
    "middle": (512, 192, 256, 256, 512, 1, 1),
    "ragged": (4096, 1021, 509, 1024, 1024, 1, 1),
    "blocks": (4096, 1536, 512, 3072, 1024, 2, 3),
    "ragged-blocks": (500, 3 * 37, 2 * 21, 3 * 64, 2 * 40, 2, 3),
    "small": (9, 10, 8, 16, 16, 1, 1),
    "long": (50000, 64, 48, 64, 64, 1, 1),
}
FAST = {("ragged-blocks", torch.bfloat16, "sm_80"), ("large", torch.bfloat16, "sm_90")}


def launches(name, dtype):
    """Of forward, dx and dw."""
    m, n, k, full_n, full_k, in_blocks, out_blocks = SHAPES[name]
    x, dy, weight = (torch.zeros(shape, dtype=dtype) for shape in [(m, k), (m, n), (full_n, full_k)])
    bias, residual = weight[:, 0].contiguous(), dy.clone()
    blocks = in_blocks, out_blocks
    forward = capture(lambda: kernels.slim_linear(x, weight, bias, n, *blocks, "gelu", residual))
    backward = capture(lambda: kernels.slim_linear_backward(dy, x, weight, *blocks, True, True, False))
    assert [len(forward), len(backward)] == [1, 2]
    return zip([*forward, *backward], ["BLOCK_M", "BLOCK_M", "BLOCK_N"], strict=True)


@pytest.mark.parametrize(
    ("name", "dtype", "precision", "target"), list(limits.matrix_cases(SHAPES, FAST)), ids=dtype_id
)
def test_slim_linear_fits(name, dtype, precision, target, monkeypatch):
    monkeypatch.setattr(kernels, "matmul_precision", lambda dtype: precision)
    for launch, rows in launches(name, dtype):
        limits.check_matrix_kernel(launch, target, rows)


@pytest.mark.slow_emulation
def test_slim_linear_loads_16_bytes_where_rows_are_aligned():
    for launch, _ in launches("large", torch.bfloat16):
        found = launch.resources("sm_80")
        assert found.mix["LDGSTS128"] == found.mix["LDGSTS"] > 0


def test_the_limits_find_tiles_that_spill(monkeypatch):
    monkeypatch.setattr(kernels, "aligned", lambda *tensors, sizes=(): True)  # large tiles where rows are ragged
    (forward, rows), *_ = launches("ragged", torch.bfloat16)
    with pytest.raises(AssertionError, match="bytes of spills"):
        limits.check_matrix_kernel(forward, "sm_80", rows)
