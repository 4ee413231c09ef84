"""The PTX simulator itself: what it computes is PyTorch's, and it finds each planted bug."""

import re

import numpy as np
import pytest
import torch

from tests.emulation.ptx_parse import PTXError
from tests.emulation.ptx_sim import ORDERS, run

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")
driver = pytest.importorskip("tests.emulation.triton_driver", reason="needs Triton")
libdevice = pytest.importorskip("triton.language.extra.libdevice")


@pytest.fixture(params=driver.TARGETS)
def target(request):
    with driver.simulated(request.param):
        yield request.param


@triton.jit
def _add_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr, OVER: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N + OVER, other=0.0)
    tl.store(out_ptr + offs, x + tl.load(y_ptr + offs, mask=offs < N, other=0.0), mask=offs < N)


def add(x, y, out, over=0):
    _add_kernel[(triton.cdiv(len(x), 128),)](x, y, out, len(x), BLOCK=128, OVER=over)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_sim_adds_and_stays_within_the_mask(dtype, offset, target):
    x, y = torch.randn(304).to(dtype)[offset : offset + 300], torch.randn(300).to(dtype)
    out = torch.full((310,), 7.0, dtype=dtype)
    add(x, y, out[:300])
    torch.testing.assert_close(out[:300], x + y)
    assert (out[300:] == 7).all()


def test_sim_finds_a_wrong_mask(target):
    with pytest.raises(PTXError, match="global read out of bounds"):
        add(torch.randn(301)[:300], torch.randn(300), torch.empty(300), over=1)


@triton.jit
def _functions_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.exp(x) + tl.erf(x) + libdevice.tanh(x) + tl.sqrt(tl.abs(x)) + tl.log(tl.abs(x) + 1) + tl.sigmoid(x)
    y += tl.cumsum(x, 0) + tl.sort(x) + tl.max(x, 0) + tl.argmin(x, 0) + (offs % 7 - offs // 5) * tl.sum(x, 0)
    tl.store(out_ptr + offs, y)


def test_sim_knows_functions_scans_sorts_and_integers(target):
    x, out, offs = torch.randn(128), torch.empty(128), torch.arange(128)
    _functions_kernel[(1,)](x, out, BLOCK=128)
    expected = x.exp() + x.erf() + x.tanh() + x.abs().sqrt() + (x.abs() + 1).log() + x.sigmoid() + x.cumsum(0)
    expected += x.sort().values + x.max() + x.argmin() + (offs % 7 - offs // 5) * x.sum()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@triton.jit
def _product_kernel(a_ptr, b_ptr, out_ptr, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """A pipelined product of (BLOCK, K) and (K, BLOCK)."""
    offs, offs_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs[:, None] * K + k + offs_k[None, :])
        b = tl.load(b_ptr + (k + offs_k)[:, None] * BLOCK + offs[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


def product(target, order="together", edit=None, dtype=torch.bfloat16):
    """Error of the product, and the PTX that made it."""
    torch.manual_seed(0)
    a, b, out = torch.randn(64, 160).to(dtype), torch.randn(160, 64).to(dtype), torch.empty(64, 64)
    with driver.simulated(target, order, edit) as launches:
        _product_kernel[(1,)](a, b, out, 160, BLOCK=64, BLOCK_K=32, num_stages=3)
    expected = a.double() @ b.double()
    return ((out.double() - expected).norm() / expected.norm()).item(), launches[0].ptx


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", driver.TARGETS)
def test_sim_multiplies_on_tensor_cores(name, order):
    error, ptx = product(name, order)
    assert error < 1e-6
    assert ("wgmma.mma_async" if name == "sm_90" else "mma.sync") in ptx
    assert "cp.async" in ptx


def test_sim_multiplies_tf32_and_f16(target):
    error, _ = product(target, dtype=torch.float32)
    assert 1e-4 < error < 1e-3
    assert product(target, dtype=torch.float16)[0] < 1e-6


def edited(pattern, replacement, count=0):
    """An edit of the PTX that must change it."""

    def edit(ptx):
        changed, times = re.subn(pattern, replacement, ptx, count=count)
        assert times > 0, f"no {pattern} in the PTX"
        return changed

    return edit


BUGS = {
    "no barrier": ("sm_80", edited(r"bar\.sync\s+0;", "")),
    "copies not waited for": ("sm_80", edited(r"cp\.async\.wait_group\s+\w+;", "cp.async.wait_group 9;")),
    "one copy not waited for": ("sm_80", edited(r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 3;")),
    "copies not committed": ("sm_80", edited(r"cp\.async\.commit_group;", "")),
    "no barrier, wgmma": ("sm_90", edited(r"bar\.sync\s+0;", "")),
    "product not waited for": ("sm_90", edited(r"wgmma\.wait_group\.sync\.aligned\s+\w+;", "")),
    "a product too few waited for": ("sm_90", edited(r"(wgmma\.wait_group\.sync\.aligned)\s+0;", r"\1 1;")),
    "an operand overwritten too early": ("sm_90", edited(r"(wgmma\.wait_group\.sync\.aligned)\s+1;", r"\1 2;")),
    "another swizzle": ("sm_80", edited(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans", "ldmatrix.sync.aligned.m8n8.x4")),
    "a wrong sign": ("sm_80", edited(r"xor\.b32(.*), 32;", r"xor.b32\1, 64;", 1)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_sim_finds_planted_bugs(bug):
    name, edit = BUGS[bug]
    found = []
    for order in ORDERS:
        try:
            found.append(not product(name, order, edit)[0] < 1e-6)
        except PTXError:
            found.append(True)
    assert any(found)


def test_sim_refuses_what_it_does_not_know():
    with pytest.raises(PTXError, match=r"unknown instruction at `mbarrier"):
        run(".visible .entry f() { mbarrier.init.shared.b64 [0], 1; ret; }", [], (1,), (32,))


HEADER = ".visible .entry f(.param .u64 p, .param .u32 n) { .reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<3>; "


def test_sim_runs_raw_ptx_and_finds_misaligned_accesses():
    body = "ld.param.u64 %rd1, [p]; ld.param.u32 %r1, [n]; mov.u32 %r2, %tid.x; mad.wide.u32 %rd2, %r2, %r1, %rd1; "
    ptx = HEADER + body + "st.global.u32 [%rd2], %r2; ret; }"
    buffer = np.zeros(32, np.uint32)
    run(ptx, [buffer, 4], (1,), (32,))
    assert buffer.tolist() == list(range(32))
    with pytest.raises(PTXError, match="misaligned global access of 4 bytes"):
        run(ptx, [buffer, 2], (1,), (32,))
    with pytest.raises(PTXError, match="global write out of bounds"):
        run(ptx, [buffer, 8], (1,), (32,))


@pytest.mark.parametrize(("kind", "one"), [("f16x2", 0x3C00), ("bf16x2", 0x3F80)])
def test_sim_compares_two_numbers_in_one_register(kind, one):
    """``setp %p|%q`` of packed numbers: each predicate is one number's, not the other's opposite."""
    body = (
        "ld.param.u64 %rd1, [p]; mov.u32 %r2, %tid.x; mad.wide.u32 %rd2, %r2, 4, %rd1; ld.global.b32 %r3, [%rd2];"
        f" mov.b32 %r4, 0; setp.gt.{kind} %p1|%p2, %r3, %r4; selp.b32 %r5, 1, 0, %p1; selp.b32 %r6, 2, 0, %p2;"
        " or.b32 %r7, %r5, %r6; st.global.u32 [%rd2], %r7; ret; }"
    )
    buffer = np.array([0, one, one << 16, one | one << 16, 0x8000 | one << 16, 0x8000 | one], np.uint32)
    run(HEADER + body, [buffer, 0], (1,), (6,))
    assert buffer.tolist() == [0, 1, 2, 3, 2, 0]


def test_sim_finds_barriers_that_not_all_threads_reach():
    split = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 bra $A; bar.sync 0; bar.sync 0; ret; $A: bar.sync 0; "
    with pytest.raises(PTXError, match="different barriers"):
        run(HEADER + split + "ret; }", [np.zeros(1), 0], (1,), (64,))


def test_sim_finds_shuffles_from_lanes_that_are_off():
    split = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 16; @%p1 shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1; ret; }"
    with pytest.raises(PTXError, match="shfl reads a lane that is not active"):
        run(HEADER + split, [np.zeros(1), 0], (1,), (32,))


def test_simulation_ends_with_its_context():
    x, out = torch.randn(10), torch.empty(10)
    with driver.simulated("sm_80"):
        add(x, x, out)
    with pytest.raises(RuntimeError, match="active drivers"):
        add(x, x, out)
