import pytest
import torch

from slimkernels.train import WidthSampler

LISTED = [0.25, 0.5, 0.75, 1.0]


def drawn(sampler, steps=40):
    return [sampler.sample() for _ in range(steps)]


def test_sandwich_draws_max_min_and_random_ones_between():
    steps = drawn(WidthSampler((0.25, 1.0), "sandwich", 4))
    assert all(s[:2] == [1.0, 0.25] and len(set(s)) == 4 for s in steps)
    between = [w for s in steps for w in s[2:]]
    assert all(0.25 < w < 1 for w in between)
    assert min(between) < 0.4 < 0.85 < max(between)
    assert len(set(between)) > 70  # random, not a fixed grid


def test_sandwich_of_a_list_draws_listed_widths_only():
    steps = drawn(WidthSampler([0.2, 0.4, 0.6, 0.8, 1.0], "sandwich", 3))
    assert all(s[:2] == [1.0, 0.2] for s in steps)
    assert {s[2] for s in steps} == {0.4, 0.6, 0.8}


@pytest.mark.parametrize(("count", "expected"), [(1, [1.0]), (2, [1.0, 0.25]), (9, [1.0, 0.25, 0.5, 0.75])])
def test_sandwich_with_few_or_too_many_passes(count, expected):
    step = WidthSampler(LISTED, "sandwich", count).sample()
    assert step[:2] == expected[:2]
    assert sorted(step) == sorted(expected)


def test_range_of_one_width_and_narrow_range():
    assert WidthSampler((0.5, 0.5), "sandwich", 4).sample() == [0.5]
    assert WidthSampler((0.5, 0.5001), "sandwich", 4).sample() == [0.5001, 0.5]


def test_all_is_every_listed_width_widest_first():
    assert drawn(WidthSampler([0.5, 1.0, 0.25], "all"), 2) == [[1.0, 0.5, 0.25]] * 2
    assert WidthSampler((0.25, 1.0), "all").sample() == [1.0, 0.75, 0.5, 0.25]


def test_random_draws_every_width_one_a_step():
    steps = drawn(WidthSampler(LISTED, "random"))
    assert all(len(s) == 1 for s in steps)
    assert {s[0] for s in steps} == set(LISTED)
    assert all(len(set(s)) == 2 for s in drawn(WidthSampler((0.25, 1.0), "random", 2)))


def test_alternate_alternates():
    assert drawn(WidthSampler((0.25, 1.0), "alternate"), 5) == [[1.0], [0.25], [1.0], [0.25], [1.0]]
    assert drawn(WidthSampler([0.25, 0.5, 1.0], "alternate"), 4) == [[1.0], [0.5], [0.25], [1.0]]


@pytest.mark.parametrize("rule", ["all", "sandwich", "random", "alternate"])
def test_same_seed_same_widths_whatever_the_global_state(rule):
    first = drawn(WidthSampler((0.25, 1.0), rule, seed=3))
    torch.manual_seed(99)
    second = WidthSampler((0.25, 1.0), rule, seed=3)
    before = torch.get_rng_state()
    assert drawn(second) == first
    assert torch.equal(torch.get_rng_state(), before), "drew from the global generator"
    if rule in ("sandwich", "random"):
        assert drawn(WidthSampler((0.25, 1.0), rule, seed=4)) != first


@pytest.mark.parametrize("rule", ["sandwich", "random", "alternate"])
def test_a_saved_sampler_goes_on_where_it_stopped(rule):
    sampler = WidthSampler((0.25, 1.0), rule, seed=5)
    drawn(sampler, 7)
    state = sampler.state_dict()
    expected = drawn(sampler, 9)
    other = WidthSampler((0.25, 1.0), rule, seed=0)
    other.load_state_dict(state)
    assert drawn(other, 9) == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([1.0], "best"), r"expected rule in .*, got 'best'"),
        (([], "all"), "expected at least one width, got none"),
        (([0.5, 1.5], "all"), r"expected widths in \(0, 1\], got 1.5"),
        (([0.5, "1"], "all"), r"expected widths in \(0, 1\], got '1'"),
        (((1.0, 0.5), "all"), r"expected a range \(low, high\) with low <= high, got \(1.0, 0.5\)"),
        (([0.5, 1.0], "sandwich", 0), "expected count to be a positive integer or None, got 0"),
        (([0.5, 1.0], "alternate", 3), "expected no count with rule 'alternate'"),
        (([0.5, 1.0], "all", 3), "expected no count with rule 'all' and 2 listed widths, got 3"),
    ],
)
def test_errors(args, message):
    with pytest.raises(ValueError, match=message):
        WidthSampler(*args)


def test_state_of_another_rule():
    with pytest.raises(ValueError, match="expected a state of rule 'all', got 'random'"):
        WidthSampler([1.0], "all").load_state_dict(WidthSampler([1.0], "random").state_dict())
