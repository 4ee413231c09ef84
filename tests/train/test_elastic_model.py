"""The trainer on models of `elastic.convert`, batch norms of both kinds included."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from slimkernels import elastic
from slimkernels.train import SlimmableTrainer, evaluate, sandwich_step
from slimkernels.train.distill import kl


def plain(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 4),
        )


def stripes(n=64, seed=0):
    """Images of stripes in four directions and noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (n,), generator=generator)
    i, j = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    patterns = torch.stack([(k % 4 < 2).float() for k in (i, j, i + j, i - j)])
    return TensorDataset((patterns[y] + 0.3 * torch.randn(n, 8, 8, generator=generator)).unsqueeze(1), y)


def converted(widths):
    return elastic.convert(plain(), stripes(2).tensors[0], widths=widths)


def trainer(model, directory=None, **options):
    lines = []
    t = SlimmableTrainer(
        model,
        F.cross_entropy,
        torch.optim.Adam(model.parameters(), lr=0.01),
        train_loader=DataLoader(stripes(), 16, shuffle=True),
        val_loader=DataLoader(stripes(64, 1), 32),
        checkpoint_dir=directory,
        progress=False,
        on_step=lambda step, losses: lines.append((step, {w: loss.item() for w, loss in losses.items()})),
        **options,
    )
    return t, lines


@pytest.mark.parametrize("widths", [(0.25, 1.0), [0.25, 0.5, 1.0]], ids=["universal", "switchable"])
def test_every_width_learns_and_a_resumed_run_is_the_same(tmp_path, widths):
    options = {"ema": 0.9, "validate_every": 3, "checkpoint_every": 5}
    straight, expected = trainer(converted(widths), **options)
    rows = straight.fit(steps=40)
    assert straight.calibrate == isinstance(widths, tuple)
    last = {(row["weights"], row["width"]): row["accuracy"] for row in rows if row["step"] == 40}
    assert [w for kind, w in last if kind == "model"] == (
        [1.0, 0.75, 0.5, 0.25] if straight.calibrate else [1.0, 0.5, 0.25]
    )
    assert min(last.values()) > 0.9

    first, lines = trainer(converted(widths), tmp_path, **options)
    first.fit(steps=13)
    first.store.path(13).unlink()  # as if killed after step 13: goes on at 10
    second, more = trainer(converted(widths), tmp_path, **options)
    assert second.fit(steps=40, resume=True) == rows
    assert lines == expected[:13]
    assert more == expected[10:]


@pytest.mark.parametrize("widths", [(0.25, 1.0), [0.25, 0.5, 1.0]], ids=["universal", "switchable"])
def test_validation_with_calibration_leaves_training_alone(widths):
    runs = []
    for validate_every in (2, 100):
        t, lines = trainer(converted(widths), validate_every=validate_every)
        t.fit(steps=7)
        runs.append(lines)
    assert runs[0] == runs[1]


def test_gradients_are_the_sum_over_the_extracted_plain_networks():
    model = converted((0.25, 1.0))
    x, y = stripes(16).tensors
    widths = [1.0, 0.5, 0.25]
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    teacher, expected = None, {}
    for w in widths:
        alone = elastic.extract(copy.deepcopy(model), w).train()
        output = alone(x)
        loss = F.cross_entropy(output, y) if teacher is None else kl(output, teacher)
        teacher = output.detach() if teacher is None else teacher
        loss.backward()
        expected[w] = loss.detach()
        for name, p in alone.named_parameters():
            total[name][tuple(slice(0, n) for n in p.shape)] += p.grad
    losses = sandwich_step(model, (x, y), F.cross_entropy, None, widths=widths)
    for w in widths:
        torch.testing.assert_close(losses[w], expected[w])
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, total[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_illegal_widths_are_told_at_once():
    model = converted([0.25, 0.5, 1.0])
    with pytest.raises(ValueError, match=r"got 0\.3"):
        trainer(model, eval_widths=[0.3])
    with pytest.raises(ValueError, match=r"made by elastic\.convert"):
        trainer(plain())
    with pytest.raises(ValueError, match=r"made by elastic\.convert"):
        sandwich_step(plain(), stripes(4).tensors, F.cross_entropy, None)


def test_evaluate_equals_the_extracted_networks():
    model = converted((0.25, 1.0))
    t, _ = trainer(model)
    t.fit(steps=8)
    loader = DataLoader(stripes(50, 2), 16)
    found = evaluate(model, loader, [1.0, 0.5, 0.25])
    for w, row in found.items():
        alone = elastic.extract(model, w).eval()
        x, y = stripes(50, 2).tensors
        with torch.no_grad():
            assert row["accuracy"] == pytest.approx((alone(x).argmax(1) == y).float().mean().item())
