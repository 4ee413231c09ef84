"""The ahead-of-time compiler rung itself: what it reads out, and that it finds each planted bug."""

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")
aot = pytest.importorskip("tests.emulation.aot", reason="needs Triton")


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr):
    offs, offs_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs[:, None] * K + k + offs_k[None, :])
        b = tl.load(b_ptr + (k + offs_k)[:, None] * BLOCK + offs[None, :])
        if DOT:
            acc = tl.dot(a, b, acc)
        else:
            acc += tl.sum(a.to(tl.float32), 1)[:, None] * tl.sum(b.to(tl.float32), 0)[None, :]
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


def compiled(target="sm_80", dtype="bf16", **options):
    pointers = dict.fromkeys(("a_ptr", "b_ptr"), aot.POINTERS[dtype]) | {"out_ptr": "*fp32"}
    constants = {"BLOCK": options.pop("BLOCK", 64), "BLOCK_K": 32, "DOT": options.pop("DOT", True)}
    divisible = options.pop("divisible", ["a_ptr", "b_ptr", "out_ptr", "K"])
    kernel = aot.compile_kernel(_dot_kernel, pointers | {"K": "i32"}, constants, target, divisible=divisible, **options)
    return aot.resources(kernel, target)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_aot_reads_the_resources_of_a_matrix_kernel(target):
    found = compiled(target)
    assert found.spills == 0
    assert 0 < found.registers <= 255
    assert found.shared > 0
    assert found.tensor_core_instructions > 0
    expected = {"sm_80": "HMMA", "sm_90": "WGMMA", "sm_100": "TCGEN05", "gfx942": "MFMA"}[target]
    assert found.mix[expected] > 0


def test_aot_finds_spills():
    found = compiled(BLOCK=256, warps=4)
    assert found.spills > 0


def test_aot_finds_missing_tensor_cores():
    assert compiled(BLOCK=16, DOT=False).tensor_core_instructions == 0


def test_aot_finds_too_much_shared_memory():
    found = compiled(BLOCK=256, warps=8, stages=7)
    assert found.shared > aot.LIMITS["sm_80"].shared_per_block
    assert (found.occupancy, found.limiter) == (0.0, "shared memory of one block")


@triton.jit
def _copy_kernel(x_ptr, out_ptr, N, stride, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs * stride, mask=offs < N, other=0.0), mask=offs < N)


@pytest.mark.parametrize(
    ("divisible", "ones", "wide"),
    [(["x_ptr", "out_ptr", "N"], ["stride"], True), (["x_ptr", "out_ptr"], ["stride"], False), ([], [], False)],
    ids=["aligned", "ragged", "strided"],
)
def test_aot_sees_16_byte_loads(divisible, ones, wide):
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "N": "i32"} | ({} if ones else {"stride": "i32"})
    for target in aot.TARGETS:
        kernel = aot.compile_kernel(
            _copy_kernel, signature, {"BLOCK": 1024}, target, divisible=divisible, ones=ones, warps=4
        )
        found = aot.resources(kernel, target)
        assert found.mix["LDG"] > 0
        assert (found.mix["LDG128"] > 0) == wide


@triton.jit
def _wrong_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, 2 * BLOCK)))


def test_aot_tells_what_does_not_compile():
    with pytest.raises(RuntimeError, match="_wrong_kernel does not compile for sm_90"):
        aot.compile_kernel(_wrong_kernel, {"x_ptr": "*fp32"}, {"BLOCK": 64}, "sm_90")
    with pytest.raises(ValueError, match="expected every argument of _wrong_kernel"):
        aot.compile_kernel(_wrong_kernel, {"x_ptr": "*fp32"}, {}, "sm_90")


def test_occupancy_bound():
    assert aot.occupancy_bound(32, 0, 4, "sm_80") == (1.0, "warps")
    assert aot.occupancy_bound(128, 0, 4, "sm_80") == (0.25, "registers")
    assert aot.occupancy_bound(32, 80 * 1024, 4, "sm_80") == (0.125, "shared memory")
    assert aot.occupancy_bound(32, 0, 1, "sm_80") == (0.5, "blocks")
