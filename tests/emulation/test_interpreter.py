"""The hardened interpreter itself: what it computes, and that it finds each planted bug."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")
libdevice = pytest.importorskip("triton.language.extra.libdevice")

pytestmark = pytest.mark.interpreted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@triton.jit
def _add_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    y = tl.load(y_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, x + y * y, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreter_arithmetic_rounds_like_pytorch(dtype):
    x, y, out = torch.randn(1003).to(dtype), torch.randn(1003).to(dtype), torch.full((1100,), 7.0, dtype=dtype)
    _add_kernel[(8,)](x, y, out[:1003], 1003, BLOCK=128)
    assert torch.equal(out[:1003], x + y * y)
    assert (out[1003:] == 7).all()


@triton.jit
def _cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_interpreter_casts_round_to_nearest(source, to):
    x, out = torch.randn(256).to(source), torch.empty(256, dtype=to)
    _cast_kernel[(1,)](x, out, BLOCK=256)
    assert torch.equal(out, x.to(to))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    at = offs[:, None] * BLOCK + offs[None, :]
    acc = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreter_dot_accumulates_in_float32(dtype):
    a, b, out = torch.randn(32, 32).to(dtype), torch.randn(32, 32).to(dtype), torch.empty(32, 32, dtype=dtype)
    _dot_kernel[(1,)](a, b, out, BLOCK=32, PRECISION="ieee")
    limit = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert (out.double() - a.double() @ b.double()).abs().max() < limit


def test_interpreter_dot_rounds_to_tf32_when_asked():
    a, out = torch.randn(32, 32), torch.empty(32, 32)
    _dot_kernel[(1,)](a, a, out, BLOCK=32, PRECISION="tf32")
    exact = a.double() @ a.double()
    assert 1e-5 < (out.double() - exact).norm() / exact.norm() < 1e-3


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr, tl.max(x, 0))
    tl.store(out_ptr + 1, tl.sum(x, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreter_reductions(dtype):
    x, out = torch.randn(64).to(dtype), torch.empty(2, dtype=dtype)
    _reduce_kernel[(1,)](x, out, BLOCK=64)
    assert out[0] == x.max()
    torch.testing.assert_close(out[1].float(), x.float().sum(), rtol=1e-2, atol=1e-2)


@triton.jit
def _libdevice_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, libdevice.tanh(tl.load(x_ptr + offs)))


def test_interpreter_libdevice():
    x, out = torch.randn(64), torch.empty(64)
    _libdevice_kernel[(1,)](x, out, BLOCK=64)
    torch.testing.assert_close(out, torch.tanh(x))


# What follows are planted bugs: each must be found.


@triton.jit
def _unmasked_load_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs), mask=offs < N)


def test_interpreter_finds_a_load_out_of_bounds():
    with pytest.raises(Exception, match=r"OutOfBounds.*load in _unmasked_load_kernel.*28 of 64 active lanes"):
        _unmasked_load_kernel[(2,)](torch.randn(300)[:100], torch.empty(100), 100, BLOCK=64)


@triton.jit
def _unmasked_store_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < N, other=0.0))


def test_interpreter_finds_a_store_out_of_bounds():
    with pytest.raises(Exception, match=r"OutOfBounds.*store"):
        _unmasked_store_kernel[(2,)](torch.randn(100), torch.empty(300)[:100], 100, BLOCK=64)


@triton.jit
def _no_other_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + offs, mask=offs < N), 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreter_poisons_masked_lanes(dtype):
    out = torch.zeros(1, dtype=dtype)
    _no_other_kernel[(1,)](torch.ones(50, dtype=dtype), out, 50, BLOCK=64)
    assert out.isnan().all()


@triton.jit
def _same_address_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + offs), 0))


def test_interpreter_finds_two_programs_that_store_to_one_address():
    with pytest.raises(AssertionError, match="1 addresses are stored by more than one program"):
        _same_address_kernel[(2,)](torch.randn(64), torch.empty(1), BLOCK=32)


@triton.jit
def _neighbour_kernel(x_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs + 1, mask=offs + 1 < N, other=0.0)
    tl.store(x_ptr + offs, x, mask=offs < N)


def test_interpreter_finds_a_load_of_what_another_program_stores():
    with pytest.raises(AssertionError, match="3 loads read an address that another program stores"):
        _neighbour_kernel[(4,)](torch.randn(128), 128, BLOCK=32)


@triton.jit
def _atomic_kernel(x_ptr, out_ptr, PLAIN: tl.constexpr):
    tl.atomic_add(out_ptr, tl.load(x_ptr + tl.program_id(0)))
    if PLAIN and tl.program_id(0) == 0:
        tl.store(out_ptr, 0.0)


def test_interpreter_finds_a_plain_store_beside_atomics():
    x, out = torch.randn(4), torch.zeros(1)
    _atomic_kernel[(4,)](x, out, PLAIN=False)
    torch.testing.assert_close(out[0], x.sum())
    with pytest.raises(AssertionError, match="updated by one program and plain stores of another"):
        _atomic_kernel[(4,)](x, out, PLAIN=True)


@triton.jit
def _order_kernel(order_ptr, seen_ptr):
    at = tl.atomic_add(seen_ptr, 1)
    tl.store(order_ptr + tl.program_id(0), at)


def test_interpreter_shuffles_programs():
    order = torch.empty(32, dtype=torch.int32)
    _order_kernel[(32,)](order, torch.zeros(1, dtype=torch.int32))
    assert sorted(order.tolist()) == list(range(32))
    assert order.tolist() != list(range(32))


def test_interpreter_counts_what_is_moved():
    from tests.emulation.interpreter import LAUNCHES

    x = torch.randn(1024)
    out = torch.empty(1024)
    _add_kernel[(8,)](x, x, out, 1024, BLOCK=128)
    launch = LAUNCHES[-1]
    assert (launch.name, launch.programs) == ("_add_kernel", 8)
    slack = 8 * 32  # tensors may begin inside a sector
    assert 2 * 4096 <= launch.moved["load"] <= 2 * (4096 + slack)
    assert 4096 <= launch.moved["store"] <= 4096 + slack
