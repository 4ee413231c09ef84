"""Training with elastic depth: what the rules draw, progressive shrinking, the step, the trainer and exact resume."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from slimkernels import elastic
from slimkernels.train import SlimmableTrainer, WidthSampler, evaluate, sandwich_step

LISTED, DEPTHS = [0.25, 0.5, 1.0], [1 / 3, 2 / 3, 1.0]


class Block(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(n, n), nn.BatchNorm1d(n), nn.Linear(n, n)

    def forward(self, x):
        return x + self.b(self.norm(self.a(x)).relu())


def net(depth=True, widths=(0.25, 1.0)):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(6, 32), *(Block(32) for _ in range(3)), nn.ReLU(), nn.Linear(32, 4))
    return elastic.convert(plain, torch.zeros(2, 6) + torch.arange(6), depth=depth, widths=widths)


def data(n=32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator)
    return TensorDataset(x, (x @ torch.randn(6, 4, generator=generator)).argmax(1))


@pytest.mark.parametrize("choices", [LISTED, (0.25, 1.0)])
def test_sandwich_draws_pairs(choices):
    sampler = WidthSampler(choices, "sandwich", 4, depths=DEPTHS)
    steps = [sampler.sample() for _ in range(60)]
    assert all(s[:2] == [(1.0, 1.0), (0.25, 1 / 3)] and len(set(s)) == 4 for s in steps)
    assert {d for s in steps for _, d in s[2:]} == set(DEPTHS)
    assert sampler.ends == ((1.0, 1.0), (0.25, 1 / 3))


def test_random_accumulates_k_pairs_and_all_and_alternate_take_every_pair():
    every = {(w, d) for w in LISTED for d in DEPTHS}
    steps = [WidthSampler(LISTED, "random", 3, depths=DEPTHS, seed=s).sample() for s in range(60)]
    assert all(len(set(s)) == 3 for s in steps)
    assert {p for s in steps for p in s} == every
    assert set(WidthSampler(LISTED, "all", depths=DEPTHS).sample()) == every
    alternate = WidthSampler(LISTED, "alternate", depths=DEPTHS)
    assert {alternate.sample()[0] for _ in range(9)} == every


def test_depths_do_not_change_what_is_drawn_without_them():
    assert WidthSampler((0.25, 1.0), seed=3).sample()[:2] == [1.0, 0.25]
    assert all(isinstance(w, float) for w in WidthSampler(LISTED, "random", 2).sample())


def test_progressive_opens_widths_then_depths():
    sampler = WidthSampler(LISTED, "progressive", 9, depths=DEPTHS, schedule=(2, 6, 10))
    steps = [sampler.sample() for _ in range(12)]
    assert all(s[0] == (1.0, 1.0) for s in steps)
    widths = [{w for w, _ in s} for s in steps]
    depths = [{d for _, d in s} for s in steps]
    assert widths == [{1.0}] * 2 + [{1.0, 0.5}] * 2 + [set(LISTED)] * 8
    assert depths == [{1.0}] * 6 + [{1.0, 2 / 3}] * 2 + [set(DEPTHS)] * 4
    assert sampler.teaches


def test_progressive_of_a_range_lowers_its_end():
    sampler = WidthSampler((1 / 3, 1.0), "progressive", 20, schedule=(1, 5))
    steps = [sampler.sample() for _ in range(8)]
    assert steps[0] == [1.0]
    lowest = [min(s) for s in steps]
    assert lowest[1] >= 1 - (2 / 3) / 4 - 1e-4
    assert 1 / 3 <= min(lowest[4:]) < 0.5 < min(lowest[:3])


def test_sampler_state_resumes_exactly():
    def make():
        return WidthSampler((0.25, 1.0), "progressive", 3, depths=DEPTHS, schedule=(2, 6, 10), seed=5)

    one, two = make(), make()
    for _ in range(5):
        one.sample()
    two.load_state_dict(one.state_dict())
    assert [one.sample() for _ in range(8)] == [two.sample() for _ in range(8)]


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"rule": "progressive"}, r"expected schedule to be ascending numbers of steps \(a, b\) .* got None"),
        ({"rule": "progressive", "schedule": (3, 1)}, r"expected schedule .* steps \(a, b\) .* got \(3, 1\)"),
        (
            {"rule": "progressive", "schedule": (1, 3), "depths": [1.0]},
            r"expected schedule .* steps \(a, b, c\) .* got \(1, 3\)",
        ),
        ({"rule": "progressive", "schedule": (1, 3), "count": 1}, "expected count of at least 2"),
        ({"schedule": (1, 3)}, "expected a schedule with rule 'progressive' only, got 'sandwich'"),
        ({"depths": [2.0]}, r"expected depths in \(0, 1\], got 2.0"),
        ({"depths": []}, "expected at least one depth, got none"),
    ],
)
def test_wrong_arguments(kwargs, text):
    with pytest.raises(ValueError, match=f"WidthSampler: {text}"):
        WidthSampler(LISTED, **kwargs)


@pytest.mark.parametrize("depth", [True, False])
def test_step_keys_are_pairs_only_where_the_depth_is_elastic(depth):
    model = net(depth)
    batch = data().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = sandwich_step(model, batch, F.cross_entropy, optimizer, widths=3)
    assert len(losses) == 3
    assert next(iter(losses)) == ((1.0, 1.0) if depth else 1.0)
    assert all(isinstance(key, tuple) is depth for key in losses)
    assert elastic.plan(model).current_depth is None


def test_step_adds_the_gradients_of_the_pairs():
    model, batch = net(), data().tensors
    alone = copy.deepcopy(model)
    losses = sandwich_step(model, batch, F.cross_entropy, None, rule="random", widths=2, distill=None)
    for width, depth in losses:
        with elastic.width(alone, width, depth):
            F.cross_entropy(alone(batch[0]), batch[1]).backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def trainer(model, directory=None, **options):
    torch.manual_seed(0)
    return SlimmableTrainer(
        model,
        F.cross_entropy,
        torch.optim.SGD(model.parameters(), lr=0.05),
        train_loader=DataLoader(data(), 8, shuffle=True),
        val_loader=DataLoader(data(), 16),
        checkpoint_dir=directory,
        progress=False,
        **options,
    )


def test_trainer_validates_every_depth_with_statistics_of_its_own():
    model = net()
    t = trainer(model, eval_widths=[0.5, 1.0])
    t.fit(epochs=2)
    rows = [{k: row[k] for k in ("width", "depth")} for row in t.history[-4:]]
    assert rows == [{"width": w, "depth": d} for d in (1.0, 1 / 3) for w in (0.5, 1.0)]
    again = evaluate(model, DataLoader(data(), 16), [(1.0, 1.0)])
    assert again[1.0, 1.0]["accuracy"] == t.history[-3]["accuracy"]


def test_resume_is_exact(tmp_path):
    def sampler():
        return WidthSampler((0.25, 1.0), "progressive", 3, depths=DEPTHS, schedule=(2, 5, 7), seed=1)

    whole = net()
    trainer(whole, rule=sampler()).fit(epochs=3)
    part = net()
    trainer(part, tmp_path, rule=sampler()).fit(epochs=2)
    resumed = net()
    trainer(resumed, tmp_path, rule=sampler()).fit(epochs=3, resume=True)
    for p, q in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q)
