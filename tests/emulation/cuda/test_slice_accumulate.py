"""Rung C2: the multi-tensor slice accumulate on CPU fibers, in three schedules, against PyTorch."""

import ctypes

import pytest
import torch
from torch import Tensor

from tests.emulation.cuda.library import DTYPES, SCHEDULES, EmulationError, Kernels, pointer, skip_unless_possible
from tests.helpers import dtype_id

STEMS = ("slice_accumulate",)
DIMS = 5
# full shape, slice
SLICES = [
    ((9, 7), (9, 7)),
    ((16, 16), (8, 8)),
    ((33, 21), (17, 13)),
    ((12,), (5,)),
    ((8, 6, 3, 3), (5, 4, 3, 3)),
    ((4, 3, 2, 2, 3), (2, 2, 2, 2, 3)),
    ((130, 72), (129, 64)),
    ((1, 1), (1, 1)),
    ((6, 6), (0, 6)),
    ((2, 5000), (1, 4999)),
]


class Slice(ctypes.Structure):
    """``SkSlice``."""

    _fields_ = [
        ("target", ctypes.c_void_p),
        ("source", ctypes.c_void_p),
        ("size", ctypes.c_int64 * DIMS),
        ("stride", ctypes.c_int64 * DIMS),
    ]


def accumulate(kernels: Kernels, targets: list[Tensor], sources: list[Tensor]) -> None:
    table = (Slice * len(targets))()
    for entry, target, source in zip(table, targets, sources, strict=True):
        rest = DIMS - source.dim()
        entry.target, entry.source = pointer(target), pointer(source)
        entry.size = (ctypes.c_int64 * DIMS)(*[1] * rest, *source.shape)
        entry.stride = (ctypes.c_int64 * DIMS)(*[0] * rest, *target.stride())
    kernels.launch("sk_slice_accumulate", table, len(targets), DTYPES[targets[0].dtype], DTYPES[sources[0].dtype])


def check(kernels, target_dtype, source_dtype, copies):
    full = [torch.randn(shape).to(target_dtype) for shape, _ in SLICES * copies]
    full[3] = torch.randn(24).to(target_dtype)[::2]
    full[4] = full[4].contiguous(memory_format=torch.channels_last)
    sources = [torch.randn(shape).to(source_dtype) for _, shape in SLICES * copies]
    expected = [t.clone() for t in full]
    for target, source in zip(expected, sources, strict=True):
        view = target[tuple(slice(0, n) for n in source.shape)]
        view.copy_(view.float() + source.float())
    accumulate(kernels, full, sources)
    for actual, want in zip(full, expected, strict=True):
        assert torch.equal(actual, want)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("target_dtype", "source_dtype"),
    [(torch.float32, d) for d in DTYPES] + [(torch.bfloat16,) * 2, (torch.float16,) * 2],
    ids=dtype_id,
)
def test_slice_accumulate_equals_pytorch(target_dtype, source_dtype, schedule):
    skip_unless_possible()
    check(Kernels(STEMS, schedule), target_dtype, source_dtype, 1)


def test_slice_accumulate_more_slices_than_one_table_holds():
    skip_unless_possible()
    check(Kernels(STEMS), torch.float32, torch.float32, 9)


BUGS = {
    "last number of a chunk": (
        "begin + kChunk < total ? begin + kChunk : total",
        "(begin + kChunk < total ? begin + kChunk : total) - 1",
    ),
    "neighbouring slice": ("table.first_chunk[middle] <= block", "table.first_chunk[middle] < block"),
    "place in the source": ("e.slice.source) + i * V, source", "e.slice.source) + i, source"),
    "rows that are no whole vectors": ("e.slice.size[last] % lanes == 0;", "true;"),
}


@pytest.mark.parametrize("name", BUGS)
def test_slice_accumulate_planted_bugs_are_found(name):
    skip_unless_possible()
    with pytest.raises((AssertionError, EmulationError)):
        check(Kernels(STEMS, 0, ("slice_accumulate.cu", *BUGS[name])), torch.float32, torch.float32, 1)
