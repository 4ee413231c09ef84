"""The parts of the interpreter rung that need no Triton: rounding, and finding races and bounds."""

import numpy as np
import pytest
import torch

from tests.emulation.accesses import Launch, OutOfBounds, Race, spans_of
from tests.emulation.rounding import from_bfloat16, to_bfloat16, to_tf32

pytestmark = pytest.mark.interpreted


def test_rounding_of_ties_and_infinities():
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), -0.0, 3.3895e38])
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(x.numpy())), x.to(torch.bfloat16).float().numpy())
    assert np.isnan(from_bfloat16(to_bfloat16(np.array([np.nan], np.float32))))[0]
    assert to_tf32(np.array([1 + 2**-11, 1 + 2**-12], np.float32)).tolist() == [1 + 2**-10, 1.0]


def launch(*accesses):
    """Of a kernel with the memory from 1000 to 2000, that does ``accesses``: (program, kind, first, count)."""
    made = Launch("kernel", np.array([1000], np.uint64), np.array([2000], np.uint64))
    for program, kind, first, count in accesses:
        made.program = program
        made.touch(kind, first + 4 * np.arange(count, dtype=np.uint64), np.ones(count, bool), 4)
    return made


@pytest.mark.parametrize(
    "accesses",
    [
        [(0, "store", 1000, 4), (1, "store", 1016, 4)],
        [(0, "store", 1000, 4), (0, "store", 1000, 4), (0, "load", 1000, 4)],
        [(0, "load", 1000, 9), (1, "load", 1000, 9)],
        [(0, "atomic", 1000, 1), (1, "atomic", 1000, 1), (1, "store", 1004, 1)],
    ],
)
def test_launches_without_a_race(accesses):
    launch(*accesses).check_races()


@pytest.mark.parametrize(
    ("accesses", "found"),
    [
        ([(0, "store", 1000, 4), (1, "store", 1012, 4)], "1 addresses are stored by more than one program"),
        ([(0, "store", 1000, 4), (1, "load", 1008, 4)], "2 loads read an address that another program stores"),
        ([(0, "load", 1000, 4), (1, "load", 1000, 4), (1, "store", 1000, 4)], "4 loads read"),
        ([(0, "atomic", 1000, 1), (1, "store", 1000, 1)], "plain stores of another"),
        ([(0, "atomic", 1000, 1), (1, "load", 1000, 1)], "plain loads of another"),
    ],
)
def test_races_are_found(accesses, found):
    with pytest.raises(Race, match=found):
        launch(*accesses).check_races()


def test_out_of_bounds_is_found():
    launch((0, "load", 1000, 250))
    for first, count in [(996, 1), (1000, 251), (1998, 1), (5000, 1)]:
        with pytest.raises(OutOfBounds, match="1 of"):
            launch((0, "load", first, count))
    made = launch()
    made.touch("load", np.array([0], np.uint64), np.array([False]), 4)  # a lane that is off touches nothing
    with pytest.raises(OutOfBounds, match="no tensor argument"):
        Launch("kernel", np.zeros(0, np.uint64), np.zeros(0, np.uint64)).touch("load", np.ones(1), np.ones(1), 4)


def test_moved_bytes_count_sectors():
    made = launch((0, "load", 1024, 8), (0, "load", 1056, 1), (0, "store", 1504, 2))
    assert made.moved == {"load": 64, "store": 32, "atomic": 0}


def test_spans_are_those_of_the_views():
    base = torch.zeros(100)
    starts, ends = spans_of([base[10:20], base[15:30], base[50:].view(5, 10)[:, :3], torch.empty(0), 3])
    at = base.data_ptr()
    assert starts.tolist() == [at + 40, at + 200]
    assert ends.tolist() == [at + 120, at + 4 * (50 + 43)]
