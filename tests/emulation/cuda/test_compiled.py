"""Rung C1: nvcc compiles every kernel without a warning; nothing spills, everything fits, the right instructions are there."""

from dataclasses import replace

import pytest

from tests.emulation.cuda.compiled import STEMS, TARGETS, Compiled, compile_file, compile_text, skip_without_nvcc

SHARED_LIMIT = 163 * 1024  # bytes a block may use on sm_80
# What is moved in 16-byte steps, and what has to use tensor cores.
WIDE = {"depthwise_rows_kernel<float, 4>", "depthwise_rows_kernel<__nv_bfloat16, 8>", "depthwise_rows_kernel<__half, 8>",
        "depthwise_planes_kernel", "depthwise_gradient_kernel<float, 4>", "depthwise_gradient_kernel<__half, 8>",
        "depthwise_gradient_kernel<__nv_bfloat16, 8>", "slice_accumulate_kernel<float, float>",
        "slice_accumulate_kernel<__half, __half>", "slice_accumulate_kernel<__nv_bfloat16, __nv_bfloat16>"}  # fmt: skip
MATRIX = {
    f"inr_{kernel}_kernel<{operand}, {hidden}>"
    for kernel in ("forward", "backward", "gradient")
    for operand in (1, 2, 3)
    for hidden in (64, 128, 256, 512)
}
QUICK = ("inr_weights", "inr_weights_sums", "inr_weights_bfloat16")  # of the sources of inr_weights


def cases():
    for target in TARGETS:
        for stem in STEMS:
            quick = target == "sm_80" and (stem in QUICK or not stem.startswith("inr_weights"))
            marks = [] if quick else [pytest.mark.slow_emulation]
            yield pytest.param(stem, target, marks=marks, id=f"{stem}-{target}")


def is_one_of(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + "<") for prefix in prefixes)


def complaints(kernel: Compiled) -> list[str]:
    """What of the rules a kernel breaks."""
    wide = any(f"LDG.E{suffix}.128" in kernel.sass for suffix in ("", ".CONSTANT"))
    broken = {
        "spills": kernel.spills > 0,
        "a stack": kernel.stack > 0,
        "registers": kernel.registers > 255,
        "shared memory": kernel.shared > SHARED_LIMIT,
        "no 16-byte loads": is_one_of(kernel.name, WIDE) and not wide,
        "no tensor-core instruction": is_one_of(kernel.name, MATRIX) and "HMMA" not in kernel.sass,
    }
    return [f"{kernel.name}: {what}" for what, found in broken.items() if found]


@pytest.mark.parametrize(("stem", "target"), list(cases()))
def test_cuda_kernels_compile_and_fit(stem, target):
    skip_without_nvcc()
    assert not [what for kernel in compile_file(stem, target).values() for what in complaints(kernel)]


GOOD = Compiled("inr_forward_kernel<2, 64>", 120, 0, 0, 0, "HMMA.16816.F32.BF16 R4, R8, R12, R4 ;")
MOVES = replace(
    GOOD, name="depthwise_rows_kernel<float, 4>", sass="LDG.E.128.CONSTANT R4, [R2.64] ; LDG.E.128 R4, [R2.64]"
)
BAD = {
    "spills": replace(GOOD, spills=4),
    "a stack": replace(GOOD, stack=8),
    "registers": replace(GOOD, registers=256),
    "shared memory": replace(GOOD, shared=164 * 1024),
    "no tensor-core instruction": replace(GOOD, sass="FFMA R4, R8, R12, R4 ;"),
    "no 16-byte loads": replace(MOVES, sass="LDG.E.64 R4, [R2.64] ; STG.E.128 [R2.64], R4 ;"),
}


@pytest.mark.parametrize("what", BAD)
def test_cuda_rules_find_what_breaks_them(what):
    assert not complaints(GOOD) + complaints(MOVES)
    assert complaints(BAD[what]) == [f"{BAD[what].name}: {what}"]


def test_cuda_rules_find_a_matrix_kernel_that_multiplies_without_tensor_cores():
    """The kernel for float32 products, under the name of the one for bfloat16."""
    skip_without_nvcc()
    exact = compile_text(FMA_KERNEL, "sm_80")["inr_forward_kernel<2, 64>"]
    assert "FFMA" in exact.sass
    assert complaints(exact) == ["inr_forward_kernel<2, 64>: no tensor-core instruction"]


FMA_KERNEL = """
template <int kOperand, int kHidden>
__global__ void inr_forward_kernel(const float* a, const float* b, float* c) {
  for (int k = 0; k < kHidden; ++k) c[threadIdx.x] += a[k] * b[k * kHidden + threadIdx.x];
}
template __global__ void inr_forward_kernel<2, 64>(const float*, const float*, float*);
"""


@pytest.mark.slow_emulation
def test_cuda_kernels_that_the_rules_name_exist():
    skip_without_nvcc()
    names = {name for stem in STEMS for name in compile_file(stem, "sm_80")}
    for wanted in WIDE | MATRIX:
        assert any(is_one_of(name, {wanted}) for name in names), f"{wanted} is none of {sorted(names)}"
