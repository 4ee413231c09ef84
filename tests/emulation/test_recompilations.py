"""How many kernels Triton would compile over many widths: none for 30 random ones, once widths of every kind were seen."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
capture = pytest.importorskip("tests.emulation.capture", reason="needs Triton").capture
cases = pytest.importorskip("tests.emulation.norm_cases")
linear = pytest.importorskip("slimkernels.triton_kernels.slim_linear")
conv = pytest.importorskip("slimkernels.triton_kernels.slim_conv")

FULL = 1024


def on(*shape):
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def image(*shape):
    return on(*shape).contiguous(memory_format=torch.channels_last)


def run_linear(width):
    x, dy, weight = on(256, width), on(256, width), on(FULL, FULL)
    linear.slim_linear(x, weight, weight[:, 0], width, 1, 1, "none", None)
    linear.slim_linear_backward(dy, x, weight, 1, 1, True, True, False)


def run_conv(width):
    x, dy, weight = image(8, width, 14, 14), image(8, width, 14, 14), image(FULL, FULL, 3, 3)
    geometry = [1, 1], [1, 1], [1, 1]
    conv.slim_conv(x, weight, None, width, *geometry, 1, "none", None)
    conv.slim_conv_backward(dy, x, weight, *geometry, 1, True, True, False)


def run_norm(op):
    def run(width):
        shape = (8, width, 14, 14) if op in cases.OPS[:2] else (256, width)
        with torch.device("meta"):
            for direction in cases.DIRECTIONS:
                cases.problem(op, direction, torch.bfloat16, shape)[0]()

    return run


CALLS = {"slim_linear": run_linear, "slim_conv": run_conv} | {op: run_norm(op) for op in cases.OPS}


def kernels(run, width):
    """What decides whether Triton compiles: each launch's kernel, types, constants, divisibility and options."""
    return {
        repr((k.name, k.signature, k.constants, k.divisible, k.warps, k.stages, k.registers))
        for k in capture(lambda: run(width))
    }


@pytest.mark.parametrize("op", CALLS)
def test_random_widths_compile_nothing_new(op):
    drawn = torch.randint(1, FULL + 1, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    powers = [2**i for i in range(11)]
    seen = set()
    for width in [*powers, *(p + 1 for p in powers[:-1]), *(3 * p for p in powers[3:9]), *drawn[:30]]:
        seen |= kernels(CALLS[op], width)
    new = {width: found for width in drawn[30:] if (found := kernels(CALLS[op], width) - seen)}
    assert not new, new
    assert len(seen) < 120, f"{len(seen)} kernels for all widths"
