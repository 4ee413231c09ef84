"""The trainer of weight generators: modes, losses, unseen widths, exact resume."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from slimkernels import elastic, hyper
from slimkernels.train import CheckpointError, HypernetTrainer, WidthSampler, fuse, hypernet
from slimkernels.train.distill import kl

WIDTHS = [1.0, 0.5, 0.25]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x):
        return torch.relu(x + self.bn(self.conv1(x)))


def plain(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
        return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), Residual(), Residual(), *head)


def stripes(n=64, seed=0):
    """Images of stripes in four directions and noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(4, (n,), generator=generator)
    i, j = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    patterns = torch.stack([(k % 4 < 2).float() for k in (i, j, i + j, i - j)])
    return TensorDataset((patterns[y] + 0.3 * torch.randn(n, 8, 8, generator=generator)).unsqueeze(1), y)


@functools.cache
def trained():
    """The plain network after a second of training: good at full width only."""
    net = plain()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        x, y = stripes(256, 2).tensors
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval()


def generator(folded=True, net=None, train_base=False, **options):
    x = stripes(2).tensors[0]
    net = plain().eval() if net is None else net
    net = hyper.fold_batch_norm(net, x) if folded else net
    model = elastic.convert(net, x, divisor=1, norm="shared")
    torch.manual_seed(1)
    gen = hyper.WeightGenerator(model, **{"hidden": 16, "layers": 3, **options})
    if train_base:
        gen.train_base()
    return gen


def trainer(gen, directory=None, **options):
    lines = []
    t = HypernetTrainer(
        gen,
        F.cross_entropy,
        torch.optim.Adam([*gen.networks.parameters(), *gen.extras()], lr=0.01),
        **{
            "train_loader": DataLoader(stripes(), 16, shuffle=True),
            "val_loader": DataLoader(stripes(64, 1), 32),
            "widths": WIDTHS,
            "checkpoint_dir": directory,
            "progress": False,
            "on_step": lambda step, losses: lines.append((step, {w: loss.item() for w, loss in losses.items()})),
            **options,
        },
    )
    return t, lines


MODES = {
    "residual": ({}, {"mode": "residual"}),
    "trained base": ({"train_base": True}, {"mode": "residual"}),
    "neumeta": ({"base": None, "tensors": "3.*", "noise": "element"}, {"mode": "neumeta"}),
    "blockwise": ({"tensors": ["2", "3"], "blocks": ["2", "3"]}, {"mode": "blockwise", "steps_per_block": 5}),
    "fitted": ({"base": None, "tensors": "3.*"}, {"mode": "neumeta", "reconstruction_steps": 2}),
    "fitted blocks": (
        {"base": None, "tensors": ["2", "3"], "blocks": ["2", "3"]},
        {"mode": "blockwise", "steps_per_block": 5, "reconstruction_steps": 2},
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("at", [4, 5, 7])  # before, between and inside the second of two blocks
def test_resume_goes_on_exactly(tmp_path, mode, ema, at):
    made, options = MODES[mode]
    options = {**options, "ema": ema, "eval_samples": 2, "checkpoint_every": 1}
    whole, expected = trainer(generator(**made), tmp_path / "whole", **options)
    whole.fit(steps=9)
    first, head = trainer(generator(**made), tmp_path / "parts", **options)
    first.fit(steps=at)
    torch.manual_seed(99)
    second, tail = trainer(generator(**made), tmp_path / "parts", **options)
    second.fit(steps=9, resume=True)
    assert head + tail == expected
    assert second.history[-len(whole.eval_widths) :] == whole.history[-len(whole.eval_widths) :]
    ours, theirs = second.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items() if isinstance(v, torch.Tensor))


@torch.no_grad()
def accuracies(gen, widths):
    x, y = stripes(64, 1).tensors
    return [(gen.materialize(w)(x).argmax(1) == y).float().mean().item() for w in widths]


def test_a_fitted_block_is_as_good_as_the_targets_own_and_training_keeps_it_alive():
    """The known failure of generated blocks is that they learn to give zero, at every width."""
    gen = generator(net=trained(), base=None, tensors="3.*", noise="none", hidden=48, layers=4)
    x, y = stripes(256, 3).tensors
    with torch.no_grad():
        own = (trained()(x).argmax(1) == y).float().mean()
    t, _ = trainer(
        gen, mode="neumeta", reconstruction_steps=150, reconstruction_lr=0.01, rule="sandwich", val_loader=None
    )
    t._reconstruct(None)
    with torch.no_grad():
        fitted = (gen.eval().materialize()(x).argmax(1) == y).float().mean()
        assert abs(fitted - own) <= 0.01, (fitted, own)
    gen.train()
    t.reconstruction_steps = 0
    t.fit(steps=10)
    with torch.no_grad():
        weights = gen.eval()(0.5)
        assert all(w.norm() > 0.3 * gen.originals()[k][: w.shape[0]].norm() for k, w in weights.items() if w.dim() > 1)


def test_residual_training_lifts_seen_and_unseen_widths():
    gen = generator(net=trained(), bands=2, size_bands=None)
    widths = [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25]
    before = accuracies(gen, widths)
    t, _ = trainer(
        gen,
        train_loader=DataLoader(stripes(256, 2), 16, shuffle=True),
        eval_widths=widths,
        widths=None,
        rule=WidthSampler([w for w in widths if w != 0.75], "sandwich", 3),
    )
    t.fit(steps=120)
    rows = t.history[-7:]
    assert [row["width"] for row in rows] == widths
    assert [row["seen"] for row in rows] == [w != 0.75 for w in widths]
    after = [row["accuracy"] for row in rows]
    assert after == pytest.approx(accuracies(gen.eval(), widths))
    assert min(before) < 0.6
    assert min(after[:-1]) > 0.9, (before, after)  # the last has four channels
    assert after[-1] > before[-1] + 0.1, (before, after)


def test_neumeta_reconstructs_the_trained_network():
    gen = generator(base=None, net=trained(), hidden=32)
    t, _ = trainer(gen, mode="neumeta", rule=WidthSampler([1.0], "random"), widths=None, reconstruction=10.0)

    def distance():
        originals = gen.originals()
        return sum(float((w - originals[k]).detach().square().sum()) for k, w in gen.eval()(1.0).items())

    before = distance()
    gen.train()
    t.fit(steps=60)
    assert distance() < 0.6 * before


def test_losses_are_those_of_the_formulas():
    gen = generator(base=None, noise="none")
    batch = next(iter(DataLoader(stripes(), 16)))
    sampler = WidthSampler([1.0, 0.5], "all")
    t, _ = trainer(gen, mode="neumeta", rule=sampler, widths=None, distill="kl", weight_norm=0.1, reconstruction=2.0)
    losses = t.training_step([batch])
    found = {name: p.grad.clone() for name, p in gen.networks.named_parameters()}

    gen = generator(base=None, noise="none")
    full, half = gen(1.0), gen(0.5)
    output = gen.call(batch[0], 1.0, full)
    originals = gen.originals()
    task = F.cross_entropy(output, batch[1])
    distilled = kl(gen.call(batch[0], 0.5, half), output.detach())
    norm = 0.1 * sum(w.norm() for w in (*full.values(), *half.values()))
    distance = sum((w - originals[name]).square().sum() for name, w in full.items())
    rebuilt = 2.0 * distance / sum(originals[name].square().sum() for name in full)
    (task + distilled + norm + rebuilt).backward()
    torch.testing.assert_close(losses[1.0], task.detach())
    torch.testing.assert_close(losses[0.5], distilled.detach())
    for name, p in gen.networks.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("teacher", ["full", "pretrained"])
def test_a_teacher_for_rules_without_the_full_width(teacher):
    gen = generator(noise="none")
    with torch.no_grad():
        gen.networks[0].b_out.add_(0.5)
    batch = next(iter(DataLoader(stripes(), 16)))
    t, _ = trainer(gen, rule=WidthSampler([0.5], "random"), widths=None, teacher=teacher)
    with torch.no_grad():
        taught = gen.call(batch[0], 1.0) if teacher == "full" else gen.target(batch[0])
        expected = kl(gen.call(batch[0], 0.5), taught)
    torch.testing.assert_close(t.training_step([batch])[0.5], expected)


def test_the_pretrained_teacher_stays_as_it_is():
    gen = generator(folded=False, tensors="[23].conv1.weight", train_base=True)
    gen.train_extras("[23].bn.*")
    x = stripes(8, 3).tensors[0]
    with elastic.width(gen.target.eval(), 1.0):
        expected = gen.target(x).detach()
    gen.target.train()
    t, _ = trainer(gen, teacher="pretrained")
    t.fit(steps=3)
    torch.testing.assert_close(t._teach(x), expected)


@pytest.mark.parametrize("base", [None, "residual"])
def test_blocks_are_trained_one_after_another(base):
    gen = generator(tensors=["2", "3"], blocks=["2", "3"], base=base)
    before = [[p.clone() for p in part.parameters()] for part in gen.networks]
    t, _ = trainer(gen, mode="blockwise", steps_per_block=3, ema=0.9)
    t.fit(steps=3)
    first = [p.clone() for p in gen.networks[0].parameters()]
    assert not torch.equal(first[5], before[0][5])
    assert all(torch.equal(p, old) for p, old in zip(gen.networks[1].parameters(), before[1], strict=True))
    t.fit(steps=4)
    assert all(torch.equal(p, old) for p, old in zip(gen.networks[0].parameters(), first, strict=True))
    if base is not None:  # its output starts at zero, its scale is its own
        first[5:8] = [torch.zeros_like(first[5]), torch.zeros_like(first[6]), before[1][7]]
    moved = [(p - start).detach() for p, start in zip(gen.networks[1].parameters(), first, strict=True)]
    assert 0 < max(float(m.abs().max()) for m in moved) < 0.05  # one step away from the copy


def test_blocks_before_can_go_on_being_trained():
    gen = generator(tensors=["2", "3"], blocks=["2", "3"])
    t, _ = trainer(gen, mode="blockwise", steps_per_block=2, train_previous=True)
    t.fit(steps=2)
    before = [p.clone() for p in gen.networks[0].parameters()]
    t.fit(steps=4)
    assert not torch.equal(gen.networks[0].w_out, before[5])


def test_blocks_to_come_run_in_full_with_their_own_weights():
    gen = generator(tensors=["2", "3"], blocks=["2", "3"], noise="none")
    t, _ = trainer(
        gen, mode="blockwise", steps_per_block=3, rule=WidthSampler([0.5], "random"), widths=None, distill=None
    )
    group = gen.targets[0].dims[0].groups
    batch = next(iter(DataLoader(stripes(), 16)))
    with elastic.width(gen.target, dict.fromkeys(group, 0.5)):
        expected = torch.nn.functional.cross_entropy(gen.target(batch[0]), batch[1])
    torch.testing.assert_close(t.training_step([batch])[0.5], expected.detach())  # a residual starts as the slice
    assert t.width_of(0.5) == dict.fromkeys(group, 0.5)
    t.block = 1
    assert t.width_of(0.5) == 0.5


def test_batch_norms_are_kept_and_calibrated_for_validation():
    gen = generator(folded=False, net=trained())
    t, _ = trainer(gen)
    state = torch.get_rng_state()
    t.fit(steps=20)
    assert [row["width"] for row in t.history[-5:]] == [1.0, 0.75, 0.5, 0.375, 0.25]
    assert all(row["accuracy"] > 0.6 for row in t.history[-5:]), [row["accuracy"] for row in t.history[-5:]]
    assert not torch.equal(state, torch.get_rng_state())


def test_tensorboard_gets_the_losses_of_widths_and_the_accuracy_of_unseen_ones(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(generator(), log_dir=tmp_path, log_every=2, widths=[1.0, 0.5])[0].fit(steps=4)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"loss/1", "loss/0.5", "val/accuracy/1", "val/accuracy/0.5"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("loss/0.5")] == [2, 4]


@pytest.mark.parametrize("amp", ["bf16"])
def test_mixed_precision(amp):
    gen = generator()
    t, lines = trainer(gen, amp=amp, accumulate=2)
    t.fit(steps=4)
    assert all(0 < loss < 10 for _, losses in lines for loss in losses.values())
    assert all(p.dtype == torch.float32 for p in gen.parameters())


def test_a_checkpoint_of_another_target(tmp_path):
    trainer(generator(), tmp_path)[0].fit(steps=1)
    t, _ = trainer(generator(tensors=["0", "2"]), tmp_path)
    with pytest.raises(CheckpointError, match=r"belongs to another model .*the state is of another target"):
        t.fit(steps=2, resume=True)


@pytest.mark.parametrize(
    ("made", "options", "text"),
    [
        ({}, {"mode": "hyper"}, "expected mode to be one of neumeta, blockwise, residual, got 'hyper'"),
        ({}, {"mode": "neumeta"}, "expected a generator with base=None for mode 'neumeta', got base='residual'"),
        ({"base": None}, {}, "expected a generator with base='residual' for mode 'residual', got base=None"),
        ({}, {"mode": "blockwise"}, "expected a generator with blocks for mode 'blockwise', got one without"),
        ({"blocks": ["0", "2", "3", "6"]}, {"mode": "blockwise"}, "expected steps_per_block for mode 'blockwise'"),
        ({}, {"steps_per_block": 3}, "expected no steps_per_block with mode 'residual', got 3"),
        ({}, {"teacher": "me"}, "expected teacher to be one of full, pretrained, got 'me'"),
        ({}, {"samples": 0}, "expected samples to be a positive integer, got 0"),
        ({}, {"widths": [1.0, 0.1]}, "HypernetTrainer: expected width between 0.25 and 1, got 0.1"),
        ({}, {"eval_widths": [0.2]}, "HypernetTrainer: expected width between 0.25 and 1, got 0.2"),
    ],
)
def test_errors(made, options, text):
    with pytest.raises(ValueError, match=text):
        trainer(generator(**made), **options)


def test_a_model_that_is_no_generator():
    net = plain()
    with pytest.raises(ValueError, match=r"expected a hyper\.WeightGenerator as it is, got a Sequential"):
        HypernetTrainer(net, F.cross_entropy, torch.optim.SGD(net.parameters(), 0.1), train_loader=[])


def test_reconstruction_steps_that_do_not_fit():
    with pytest.raises(ValueError, match=r"expected reconstruction_steps to be an integer of at least 0, got -1"):
        trainer(generator(base=None, tensors="3.*"), mode="neumeta", reconstruction_steps=-1)
    with pytest.raises(ValueError, match=r"that has no base and no standardized weights, got 5"):
        trainer(generator(), reconstruction_steps=5)


def test_a_step_runs_the_fused_forward(monkeypatch):
    """With norms in the target: as slimmable training does, and with the same losses and gradients as without."""
    found, ran = {}, []
    for fused in (True, False):
        gen = generator(folded=False, tensors="[23].conv1.weight", noise="none", train_base=True)
        gen.train_extras("[23].bn.*")
        t, _ = trainer(gen)
        if fused:
            run = fuse.run_conv_norm
            monkeypatch.setattr(fuse, "run_conv_norm", lambda *a, run=run: ran.append(a) or run(*a))
        else:
            monkeypatch.setattr(hypernet, "fused_forward", lambda _: contextlib.nullcontext())
        t.generator.train()
        losses = t._passes(next(iter(DataLoader(stripes(), 16))), 1.0)
        found[fused] = losses, [p.grad for p in gen.trained_parameters() if p.grad is not None]
    assert len(ran) in (0, 2 * len(WIDTHS))
    for w, loss in found[True][0].items():
        torch.testing.assert_close(loss, found[False][0][w])
    for ours, theirs in zip(found[True][1], found[False][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
