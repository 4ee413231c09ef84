import pytest
import torch

from slimkernels.ops import slice_accumulate_
from tests.helpers import DTYPES, dtype_id

SHAPES = [
    ((9, 7), (9, 7)),
    ((33, 21), (17, 13)),
    ((12,), (5,)),
    ((8, 6, 3, 3), (5, 4, 3, 3)),
    ((6, 6), (0, 6)),
    ((), ()),
]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_id)
def test_slice_accumulate_equals_pytorch(dtype):
    targets = [torch.randn(full).to(dtype) for full, _ in SHAPES]
    targets[1] = torch.randn(21, 33).to(dtype).t()
    sources = [torch.randn(part).to(dtype) for _, part in SHAPES]
    expected = [t.clone() for t in targets]
    for target, source in zip(expected, sources, strict=True):
        target[tuple(slice(0, n) for n in source.shape)] += source
    assert slice_accumulate_(targets, sources) is None
    assert all(torch.equal(a, b) for a, b in zip(targets, expected, strict=True))


def test_slice_accumulate_half_gradients_into_float32():
    target = torch.randn(8, 8)
    expected = target.clone()
    source = torch.randn(5, 3).bfloat16()
    expected[:5, :3] += source.float()
    slice_accumulate_([target], [source])
    assert torch.equal(target, expected)


def test_slice_accumulate_of_nothing():
    slice_accumulate_([], [])


def test_slice_accumulate_opcheck():
    targets, sources = [torch.randn(4, 4), torch.randn(3)], [torch.randn(2, 3), torch.randn(3)]
    torch.library.opcheck(torch.ops.slimkernels.slice_accumulate_.default, (targets, sources))


@pytest.mark.parametrize(
    ("targets", "sources", "error", "message"),
    [
        ([torch.zeros(2)], [], ValueError, "expected sources of 1 tensors, got 0"),
        ([torch.zeros(2)], [torch.zeros(3)], ValueError, r"expected sources\[0\] of at most the shape \(2,\)"),
        ([torch.zeros(2)], [torch.zeros(1, 1)], ValueError, r"of its target, got \(1, 1\)"),
        ([torch.zeros(2).half()], [torch.zeros(2)], TypeError, "expected sources.0. of dtype torch.float16 like its"),
        ([torch.zeros(2).int()], [torch.zeros(2)], TypeError, "expected sources.0. of dtype torch.int32"),
        ([torch.zeros(2)], [torch.zeros(2, device="meta")], ValueError, "expected sources.0. on device cpu like its"),
    ],
)
def test_slice_accumulate_refuses(targets, sources, error, message):
    with pytest.raises(error, match=message):
        slice_accumulate_(targets, sources)
