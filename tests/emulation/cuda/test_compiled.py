"""Rung C1: nvcc compiles every kernel without a warning; nothing spills, everything fits, the right instructions are there."""

import pytest

from tests.emulation.cuda.compiled import STEMS, TARGETS, compile_file, skip_without_nvcc

SHARED_LIMIT = 163 * 1024  # bytes a block may use on sm_80
# What is moved in 16-byte steps, and what has to use tensor cores.
WIDE = {"depthwise_rows_kernel<float, 4>", "depthwise_rows_kernel<__nv_bfloat16, 8>", "depthwise_rows_kernel<__half, 8>",
        "depthwise_planes_kernel", "depthwise_gradient_kernel<float, 4>", "depthwise_gradient_kernel<__half, 8>",
        "depthwise_gradient_kernel<__nv_bfloat16, 8>", "slice_accumulate_kernel<float, float>",
        "slice_accumulate_kernel<__half, __half>", "slice_accumulate_kernel<__nv_bfloat16, __nv_bfloat16>"}  # fmt: skip
MATRIX = {f"inr_backward_kernel<{operand}, {hidden}>" for operand in (1, 2, 3) for hidden in (64, 128, 256)} | {
    f"inr_forward_kernel<{operand}, {hidden}>" for operand in (1, 2, 3) for hidden in (64, 128, 256, 512)
}


def cases():
    for target in TARGETS:
        for stem in STEMS:
            quick = target == "sm_80" and (stem == "inr_weights_bfloat16" or not stem.startswith("inr_weights_"))
            marks = [] if quick else [pytest.mark.slow_emulation]
            yield pytest.param(stem, target, marks=marks, id=f"{stem}-{target}")


def is_one_of(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + "<") for prefix in prefixes)


@pytest.mark.parametrize(("stem", "target"), list(cases()))
def test_cuda_kernels_compile_and_fit(stem, target):
    skip_without_nvcc()
    for kernel in compile_file(stem, target).values():
        assert kernel.spills == 0, f"{kernel.name}: {kernel.spills} bytes spilled"
        assert kernel.stack == 0, f"{kernel.name}: {kernel.stack} bytes of stack"
        assert kernel.registers <= 255
        assert kernel.shared <= SHARED_LIMIT
        if is_one_of(kernel.name, WIDE):
            assert any(f"LDG.E{suffix}.128" in kernel.sass for suffix in ("", ".CONSTANT")), (
                f"{kernel.name}: 16-byte loads"
            )
        if is_one_of(kernel.name, MATRIX):
            assert "HMMA" in kernel.sass, f"{kernel.name}: no tensor-core instruction"


@pytest.mark.slow_emulation
def test_cuda_kernels_that_the_rules_name_exist():
    skip_without_nvcc()
    names = {name for stem in STEMS for name in compile_file(stem, "sm_80")}
    for wanted in WIDE | MATRIX:
        assert any(is_one_of(name, {wanted}) for name in names), f"{wanted} is none of {sorted(names)}"
