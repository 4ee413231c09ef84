"""Rung C3: the PTX that nvcc makes of the CUDA sources, executed on the CPU, against PyTorch; its warps also run apart."""

import re

import pytest
import torch

from tests.emulation.cuda import depthwise
from tests.emulation.cuda.compiled import skip_without_nvcc
from tests.emulation.cuda.simulated import Simulated
from tests.emulation.cuda.test_depthwise import close, convolve, sample
from tests.emulation.cuda.test_slice_accumulate import accumulate
from tests.emulation.ptx_parse import PTXError
from tests.emulation.ptx_sim import ORDERS
from tests.helpers import dtype_id

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# The 16-bit types differ from float32 in their loads and stores only.
RUNS = [*((F32, order) for order in ORDERS), (BF16, "behind"), (F16, "ahead")]
NAMES = {F32: ("float", 4), BF16: ("__nv_bfloat16", 8), F16: ("__half", 8)}  # in C++, and how many are 16 bytes


@pytest.fixture(autouse=True)
def needs_nvcc():
    skip_without_nvcc()


def edited(pattern: str, replacement: str):
    """An edit of the PTX that must change it."""

    def edit(ptx: str) -> str:
        changed, times = re.subn(pattern, replacement, ptx)
        if not times:
            raise ValueError(f"no {pattern} in the PTX")
        return changed

    return edit


# full shape, slice: rows of whole vectors and not, more than one chunk, five dimensions, nothing
SLICES = [
    ((9, 7), (9, 7)),
    ((16, 16), (8, 8)),
    ((33, 21), (17, 13)),
    ((4, 3, 2, 2, 3), (2, 2, 2, 2, 3)),
    ((1, 1), (1, 1)),
    ((6, 6), (0, 6)),
    ((2, 4200), (1, 4199)),
]


def check_slices(order, target_dtype, source_dtype, edit=None):
    torch.manual_seed(0)
    full = [torch.randn(shape).to(target_dtype) for shape, _ in SLICES]
    sources = [torch.randn(shape).to(source_dtype) for _, shape in SLICES]
    views = [t[tuple(slice(0, n) for n in s.shape)] for t, s in zip(full, sources, strict=True)]
    expected = [t.clone() for t in full]
    for target, source in zip(expected, sources, strict=True):
        part = target[tuple(slice(0, n) for n in source.shape)]
        part.copy_(part.float() + source.float())
    kernels = Simulated("slice_accumulate", order, edit).allow(*views, *sources)
    accumulate(kernels, full, sources)
    for actual, want in zip(full, expected, strict=True):
        assert torch.equal(actual, want)
    return kernels.launches


@pytest.mark.parametrize(
    ("target_dtype", "source_dtype", "order"),
    [*((dtype, dtype, order) for dtype, order in RUNS), (F32, BF16, "ahead"), (F32, F16, "behind")],
    ids=lambda v: dtype_id(v) or v,
)
def test_slice_accumulate_simulated(target_dtype, source_dtype, order):
    (launch,) = check_slices(order, target_dtype, source_dtype)
    assert launch.blocks >= 7
    names = NAMES[target_dtype][0], NAMES[source_dtype][0]
    assert launch.kernel == "slice_accumulate_kernel<{}, {}>".format(*names)


def test_slice_accumulate_simulated_finds_a_neighbouring_slice():
    with pytest.raises((AssertionError, PTXError)):
        check_slices("together", F32, F32, edited(r"setp\.le\.s32", "setp.lt.s32"))


# case of test_depthwise, channels last, activation, kernel that runs
DEPTHWISE = {
    "planes": ("3x3", False, "none", "depthwise_planes_kernel<{}>"),
    "planes-strided": ("c5-3x3-s2", False, "silu", "depthwise_planes_kernel<{}>"),
    "rows": ("3x3", True, "gelu", "depthwise_rows_kernel<{}, {}>"),
    "rows-odd": ("c3-m2", True, "none", "depthwise_rows_kernel<{}, 1>"),
}  # fmt: skip


def check_depthwise(name, order, dtype, edit=None):
    torch.manual_seed(0)
    case, channels_last, activation, kernel = DEPTHWISE[name]
    x, weight, bias, residual, dy, geometry, n = sample(case, dtype, channels_last)
    kernels = Simulated("slim_conv_depthwise", order, edit)
    y = torch.full_like(dy, float("nan"))
    depthwise.forward(
        kernels.allow(x, weight[:n], bias[:n], residual, y), x, weight, bias, residual, y, geometry, activation
    )
    close(y, dtype, convolve(x, weight, bias, residual, geometry, n, activation))
    stride, padding, dilation = geometry
    dx = torch.full_like(x, float("nan"))
    depthwise.input_gradient(kernels.allow(dy, weight[:n], dx), dy, weight, dx, geometry)
    exact = torch.ops.aten.convolution_backward(
        dy.double(), x.double(), weight[:n].double(), None, stride, padding, dilation, False, [0, 0], x.shape[1],
        [True, False, False],
    )  # fmt: skip
    close(dx, dtype, exact[0])
    assert kernels.launches[0].kernel == kernel.format(*NAMES[dtype])
    assert len(kernels.launches) == 2


# case of test_depthwise, channels last, numbers in a vector (None: 16 bytes)
GRADIENTS = {"planes": ("3x3", False, 1), "rows": ("3x3", True, None), "rows-odd": ("c3-m2", True, 1)}


def check_weight_gradient(name, order, dtype, edit=None):
    torch.manual_seed(0)
    case, channels_last, vector = GRADIENTS[name]
    x, weight, _, _, dy, (stride, padding, dilation), n = sample(case, dtype, channels_last)
    kernels = Simulated("slim_conv_depthwise_gradient", order, edit)
    dw = depthwise.weight_gradient(kernels, dy, x, weight, (stride, padding, dilation))
    exact = torch.ops.aten.convolution_backward(
        dy.double(), x.double(), weight[:n].double(), None, stride, padding, dilation, False, [0, 0], x.shape[1],
        [False, True, False],
    )  # fmt: skip
    close(dw[:n], dtype, exact[1])
    assert not dw[n:].any()
    storage, lanes = NAMES[dtype]
    assert [launch.kernel for launch in kernels.launches] == [
        f"depthwise_gradient_kernel<{storage}, {vector or lanes}>", f"depthwise_gradient_sum_kernel<{storage}>",
    ]  # fmt: skip


def runs_of(names):
    for name in names:
        for dtype, order in RUNS:
            slow = order == "together" or (name == "planes-strided" and dtype != F32)
            marks = [pytest.mark.slow_emulation] if slow else []
            yield pytest.param(name, dtype, order, marks=marks, id=f"{name}-{dtype_id(dtype)}-{order}")


@pytest.mark.parametrize(("name", "dtype", "order"), list(runs_of(DEPTHWISE)))
def test_depthwise_simulated(name, dtype, order):
    check_depthwise(name, order, dtype)


@pytest.mark.parametrize(("name", "dtype", "order"), list(runs_of(GRADIENTS)))
def test_depthwise_weight_gradient_simulated(name, dtype, order):
    check_weight_gradient(name, order, dtype)


@pytest.mark.parametrize(
    ("name", "check"), [("planes", check_depthwise), ("rows", check_depthwise), ("rows", check_weight_gradient)]
)
def test_depthwise_simulated_finds_a_missing_barrier(name, check):
    found = []
    for order in ORDERS:
        try:
            check(name, order, torch.float32, edited(r"bar\.sync\s+0;", ""))
        except (AssertionError, PTXError):
            found.append(order)
    assert found
