"""``slim_conv`` for GPUs, compiled ahead of time: it fits the registers and shared memory and uses the tensor cores."""

import pytest
import torch

from slimkernels.ops.slim_conv import conv_output_size
from tests.helpers import dtype_id

pytest.importorskip("triton", reason="Triton is not installed")
aot = pytest.importorskip("tests.emulation.aot", reason="needs Triton")
capture = pytest.importorskip("tests.emulation.capture", reason="needs Triton").capture
limits = pytest.importorskip("tests.emulation.resource_limits", reason="needs Triton")
kernels = pytest.importorskip("slimkernels.triton_kernels.slim_conv")

LAST = torch.channels_last
# c, n, C, N, kernel, size, batch, stride, padding, groups, layout of the weight
SHAPES = {
    "large": (256, 256, 512, 512, (3, 3), (56, 56), 4, 1, 1, 1, LAST),
    "contiguous-weight": (256, 256, 512, 512, (3, 3), (56, 56), 4, 1, 1, 1, torch.contiguous_format),
    "pointwise": (256, 512, 512, 512, (1, 1), (28, 28), 16, 1, 0, 1, LAST),
    "stride": (128, 128, 128, 128, (3, 3), (28, 28), 4, 2, 1, 1, LAST),
    "ragged": (123, 131, 256, 256, (3, 3), (28, 28), 4, 2, 1, 1, LAST),
    "stem": (3, 64, 3, 64, (7, 7), (112, 112), 1, 2, 3, 1, LAST),
    "groups": (128, 128, 256, 256, (3, 3), (28, 28), 4, 1, 1, 4, LAST),
}
FAST = {("large", torch.bfloat16, "sm_90"), ("ragged", torch.bfloat16, "sm_80")}


def launches(name, dtype):
    """Of forward, dx and dw."""
    c, n, full_c, full_n, kernel, size, batch, stride, padding, groups, layout = SHAPES[name]
    geometry = ([stride] * 2, [padding] * 2, [1, 1])
    out = conv_output_size(size, kernel, *geometry)
    x = torch.zeros(batch, c, *size, dtype=dtype).contiguous(memory_format=LAST)
    dy = torch.zeros(batch, n, *out, dtype=dtype).contiguous(memory_format=LAST)
    weight = torch.zeros(full_n, full_c // groups, *kernel, dtype=dtype).contiguous(memory_format=layout)
    bias = torch.zeros(full_n, dtype=dtype)
    forward = capture(lambda: kernels.slim_conv(x, weight, bias, n, *geometry, groups, "silu", dy))
    backward = capture(lambda: kernels.slim_conv_backward(dy, x, weight, *geometry, groups, True, True, False))
    assert [len(forward), len(backward)] == [1, 2]
    return zip([*forward, *backward], ["BLOCK_M", "BLOCK_M", "BLOCK_N"], strict=True)


@pytest.mark.parametrize(
    ("name", "dtype", "precision", "target"), list(limits.matrix_cases(SHAPES, FAST)), ids=dtype_id
)
def test_slim_conv_fits(name, dtype, precision, target, monkeypatch):
    monkeypatch.setattr("slimkernels.triton_kernels._conv.conv_precision", lambda dtype: precision)
    for launch, rows in launches(name, dtype):
        found = limits.check_matrix_kernel(launch, target, rows)
        if name in ("large", "pointwise") and target == "sm_80":
            assert found.mix["LDGSTS128"] == found.mix["LDGSTS"] > 0


def test_the_limits_find_tiles_of_slim_conv_that_spill(monkeypatch):
    """Tiles for rows that are loaded 16 bytes at once, where they are not."""
    monkeypatch.setattr("slimkernels.triton_kernels._conv.aligned", lambda *tensors, sizes=(): True)
    (forward, rows), *_ = launches("ragged", torch.bfloat16)
    with pytest.raises(AssertionError, match="bytes of"):
        limits.check_matrix_kernel(forward, "sm_80", rows)
