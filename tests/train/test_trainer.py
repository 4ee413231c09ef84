import itertools
import math
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from slimkernels import elastic
from slimkernels.train import SlimmableTrainer, accuracy, evaluate
from slimkernels.train.ema import Ema
from tests.train import stand_in
from tests.train.stand_in import TinyNet, data

pytestmark = pytest.mark.usefixtures("tiny_elastic")


def loader(n=24, seed=0, **options):
    return DataLoader(data(n, seed), batch_size=6, **options)


def trainer(model=None, **options):
    model = TinyNet() if model is None else model
    defaults = {"train_loader": loader(shuffle=True), "progress": False}
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return SlimmableTrainer(model, options.pop("loss_fn", F.cross_entropy), optimizer, **{**defaults, **options})


class Recorder:
    """``on_step`` that keeps every loss exactly."""

    def __init__(self):
        self.lines = []

    def __call__(self, step, losses):
        self.lines.append((step, {w: loss.item() for w, loss in losses.items()}))


def test_epochs_and_steps_count_what_they_say():
    t = trainer()
    t.fit(epochs=2)
    assert (t.step, t.data.epoch) == (8, 2)
    t.fit(steps=11)
    assert (t.step, t.data.epoch, t.data.position) == (11, 2, 3)


def test_same_seed_same_losses_another_seed_others():
    runs = []
    for seed in (0, 0, 1):
        record = Recorder()
        trainer(TinyNet(dropout=0.3), on_step=record, seed=seed).fit(epochs=2)
        runs.append(record.lines)
        torch.randn(3)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("own_generator", [False, True])
def test_every_epoch_has_another_order(own_generator):
    seen = []

    def loss_fn(output, targets):
        seen.append(targets.tolist())
        return F.cross_entropy(output, targets)

    generator = torch.Generator().manual_seed(5) if own_generator else None
    train_loader = loader(shuffle=True, generator=generator)
    trainer(train_loader=train_loader, loss_fn=loss_fn, rule="all", widths=[1.0]).fit(epochs=2)
    first, second = seen[:4], seen[4:]
    assert first != second
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second))


def test_training_improves_validation_of_every_width():
    t = trainer(val_loader=loader(96), train_loader=loader(96, shuffle=True), validate_every="epoch")
    rows = t.fit(epochs=25)
    assert [row["width"] for row in rows[:4]] == [1.0, 0.75, 0.5, 0.25]
    first = {row["width"]: row["accuracy"] for row in rows[:4]}
    last = {row["width"]: row["accuracy"] for row in rows[-4:]}
    assert last[1.0] > 0.85 > first[1.0]
    assert all(last[w] > first[w] for w in last)


def test_validation_changes_nothing_in_training():
    runs = []
    for validate in (False, True):
        record = Recorder()
        options = {"val_loader": loader(12, 1, shuffle=True), "validate_every": 3} if validate else {}
        trainer(TinyNet(dropout=0.3), on_step=record, train_loader=loader(shuffle=True), **options).fit(steps=10)
        runs.append(record.lines)
    assert runs[0] == runs[1]


def test_validation_restores_modes_and_width():
    model = TinyNet(dropout=0.3)
    model.fc1.set_width(7)
    t = trainer(model, val_loader=loader(12), validate_every=2)
    model.dropout.eval()
    seen = []
    model.register_forward_hook(lambda m, *_: seen.append((m.training, m.dropout.training)))
    t.fit(steps=4)
    assert set(seen) == {(True, False), (False, False)}
    assert model.training
    assert not model.dropout.training
    assert model.fc1.width == 7


def test_a_model_in_eval_mode_is_trained_in_training_mode():
    model = TinyNet().eval()
    trainer(model).fit(steps=1)
    assert model.training


def test_accumulated_batches_step_like_one_large_batch():
    one, many = TinyNet(), TinyNet()
    options = {"rule": "all", "widths": [1.0, 0.5], "distill": "kl"}
    sgd = {"one": torch.optim.SGD(one.parameters(), lr=0.1), "many": torch.optim.SGD(many.parameters(), lr=0.1)}
    big = [data(24).tensors]
    small = [tuple(t[6 * i : 6 * i + 6] for t in data(24).tensors) for i in range(4)]
    a, b = Recorder(), Recorder()
    trainer(one, optimizer=sgd["one"], train_loader=big, on_step=a, **options).fit(steps=3)
    trainer(many, optimizer=sgd["many"], train_loader=small, accumulate=4, on_step=b, **options).fit(steps=3)
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for (_, x), (_, y) in zip(a.lines, b.lines, strict=True):
        assert x == pytest.approx(y, rel=1e-5)


def test_ema_follows_the_formula_and_is_validated():
    model = TinyNet()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}

    def follow(step, losses):
        for name, p in model.named_parameters():
            expected[name] = 0.8 * expected[name] + 0.2 * p.detach()

    t = trainer(model, ema=0.8, on_step=follow, val_loader=loader(12), eval_widths=[1.0])
    rows = t.fit(steps=6)
    for name, p in t.ema.module.named_parameters():
        torch.testing.assert_close(p, expected[name])
        assert not p.requires_grad
    assert torch.equal(t.ema.module.calls, model.calls)
    assert [row["weights"] for row in rows[-2:]] == ["model", "ema"]
    averaged = evaluate(t.ema.module, loader(12), [1.0])[1.0]["accuracy"]
    assert rows[-1]["accuracy"] == averaged
    with pytest.raises(ValueError, match=r"Ema: expected decay between 0 and 1, got 1\.0"):
        Ema(model, 1.0)


def test_scheduler_steps_each_step_or_epoch():
    for interval, expected in (("step", 0.05 * 0.5**8), ("epoch", 0.05 * 0.5**2)):
        model = TinyNet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        trainer(model, optimizer=optimizer, scheduler=scheduler, scheduler_interval=interval).fit(epochs=2)
        assert math.isclose(optimizer.param_groups[0]["lr"], expected)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp(amp):
    model = TinyNet()
    seen = set()
    model.fc2.register_forward_hook(lambda m, args, out: seen.add(out.dtype))
    t = trainer(model, amp=amp, clip_grad=1.0, val_loader=loader(12))
    t.fit(steps=3)
    assert seen == {torch.bfloat16 if amp == "bf16" else torch.float16}
    assert (t.scaler is not None) == (amp == "fp16")


def test_a_step_that_the_scaler_skips_moves_neither_scheduler_nor_ema():
    model = TinyNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    t = trainer(
        model, optimizer=optimizer, scheduler=scheduler, amp="fp16", ema=0.5,
        loss_fn=lambda o, y: F.cross_entropy(o, y) * float("inf"), distill=None,
    )  # fmt: skip
    before = [p.clone() for p in model.parameters()]
    t.fit(steps=2)
    assert optimizer.param_groups[0]["lr"] == 0.05
    for p, q, average in zip(model.parameters(), before, t.ema.module.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(average, q)


def test_clip_bounds_the_update():
    model = TinyNet()
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    trainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), clip_grad=0.01).fit(steps=1)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    assert 0.009 < moved.norm() <= 0.0101


def test_metrics_are_means_over_samples_and_per_width():
    model, dataset = TinyNet(), data(20)
    metrics = {"accuracy": accuracy, "loss": F.cross_entropy}
    found = evaluate(model, DataLoader(dataset, 6), [1.0, 0.5], metrics)  # last batch of 2
    x, y = dataset.tensors
    for w in (1.0, 0.5):
        with stand_in.width(model, w), torch.no_grad():
            output = model(x)
        assert math.isclose(found[w]["accuracy"], (output.argmax(1) == y).float().mean().item(), rel_tol=1e-6)
        assert math.isclose(found[w]["loss"], F.cross_entropy(output, y).item(), rel_tol=1e-5)
    assert evaluate(model, DataLoader(dataset, 6), [None])[None].keys() == {"accuracy"}


def test_metric_objects_are_copied_per_width():
    class Count:
        def __init__(self):
            self.n = 100

        def reset(self):
            self.n = 0

        def update(self, output, targets):
            self.n += len(targets)

        def compute(self):
            return torch.tensor(self.n)

    metric = Count()
    assert evaluate(TinyNet(), loader(10), [1.0, 0.5], {"n": metric}) == {1.0: {"n": 10.0}, 0.5: {"n": 10.0}}
    assert metric.n == 100
    with pytest.raises(ValueError, match="evaluate: expected metrics to be functions or torchmetrics objects, got int"):
        evaluate(TinyNet(), loader(10), [1.0], {"n": 3})
    with pytest.raises(ValueError, match="evaluate: expected a loader with at least one batch, got none"):
        evaluate(TinyNet(), [], [1.0])


def test_calibration_runs_before_validation_for_model_and_ema(monkeypatch):
    calls = []

    def calibrate(model, batches, widths, depth=None):
        calls.append((model, [tuple(x.shape) for x, _ in batches], list(widths)))

    monkeypatch.setattr(elastic, "calibrate", calibrate, raising=False)
    t = trainer(val_loader=loader(12), calibrate=True, calibration_batches=2, eval_widths=[1.0, 0.5], ema=0.9)
    t.fit(steps=2)
    assert calls == [(m, [(6, 8), (6, 8)], [1.0, 0.5]) for m in (t.model, t.ema.module)]
    assert not trainer(val_loader=loader(12)).calibrate  # the stand-in has no statistics


def test_tensorboard_gets_losses_and_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(log_dir=tmp_path, log_every=2, val_loader=loader(12), eval_widths=[1.0, 0.5]).fit(steps=4)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"lr", "loss/1", "loss/0.25", "loss/between", "val/accuracy/1", "val/accuracy/0.5"} <= set(
        events.Tags()["scalars"]
    )
    assert [e.step for e in events.Scalars("lr")] == [2, 4]


def test_progress_shows_bar_and_table(capsys):
    trainer(progress=True, val_loader=loader(12), log_every=1).fit(steps=4)
    shown = capsys.readouterr().err
    assert "validation at step 4" in shown
    assert "accuracy" in shown
    assert "4/4" in shown


def test_interrupt_saves_and_stops(tmp_path):
    def interrupt(step, losses):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    t = trainer(on_step=interrupt, checkpoint_dir=tmp_path)
    t.fit(steps=100)
    assert t.stopped
    assert t.step == 3
    assert t.store.steps() == [3]
    assert signal.getsignal(signal.SIGINT) is before
    t.on_step = None
    t.fit(steps=6)
    assert t.step == 6
    assert not t.stopped


def test_interrupt_that_also_kills_the_loader_saves_and_stops(tmp_path):
    """Ctrl-C reaches worker processes too, and the loader then complains about them."""

    class Loader:
        def __iter__(self):
            yield from [data(6).tensors] * 2
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("DataLoader worker exited unexpectedly")

    t = trainer(train_loader=Loader(), checkpoint_dir=tmp_path)
    t.fit(steps=9)
    assert t.stopped
    assert t.store.steps() == [2]


def test_second_interrupt_stops_at_once(tmp_path):
    def interrupt(step, losses):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer(on_step=interrupt, checkpoint_dir=tmp_path).fit(steps=100)


def test_runs_outside_the_main_thread():
    t = trainer()
    thread = threading.Thread(target=t.fit, kwargs={"steps": 2})
    thread.start()
    thread.join()
    assert t.step == 2


def test_global_generators_are_seeded_alike_each_epoch():
    drawn = []

    def draw(step, losses):
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))

    trainer(on_step=draw).fit(steps=5)
    first, drawn[:] = list(drawn), []
    trainer(on_step=draw).fit(steps=5)
    assert drawn == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validate_every": 0}, "expected validate_every to be a number of steps or 'epoch', got 0"),
        ({"checkpoint_every": "day"}, "expected checkpoint_every to be a number of steps or 'epoch', got 'day'"),
        ({"scheduler_interval": "day"}, "expected scheduler_interval 'step' or 'epoch', got 'day'"),
        ({"accumulate": 0}, "expected accumulate to be a number of batches, got 0"),
        ({"amp": "int8"}, "expected amp to be 'bf16', 'fp16' or None, got 'int8'"),
        (
            {"train_loader": iter([1])},
            "expected a train_loader that can be iterated again every epoch, got a list_iterator",
        ),
        ({"rule": "best"}, "expected rule in"),
        ({"keep": 1, "checkpoint_dir": "x"}, "expected keep of at least 2"),
        ({"distill": "l2"}, "distill: expected one of"),
        (
            {"calibrate": True, "val_loader": [1], "calibration_loader": iter([1])},
            "expected a calibration_loader that can be iterated every time, got a list_iterator",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        trainer(**options)


def test_widths_that_the_model_does_not_take_are_told_at_once(monkeypatch):
    def width(model, w):
        if w == 0.3:
            raise ValueError("expected width one of 0.25, 1, got 0.3")
        return stand_in.width(model, w)

    monkeypatch.setattr(elastic, "width", width)
    for options in ({"widths": [1.0, 0.3]}, {"eval_widths": [0.3], "val_loader": loader(6)}):
        with pytest.raises(ValueError, match=r"got 0\.3"):
            trainer(**options)


def test_errors_of_fit(tmp_path):
    with pytest.raises(ValueError, match="expected either epochs or steps, got None and None"):
        trainer().fit()
    with pytest.raises(ValueError, match="expected checkpoint_dir to resume from, got None"):
        trainer().fit(steps=1, resume=True)
    with pytest.raises(ValueError, match="expected a train_loader with at least one batch an epoch, got none"):
        trainer(train_loader=[], checkpoint_dir=tmp_path).fit(steps=1)
    optimizer = torch.optim.SGD(TinyNet().parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(ValueError, match="expected a scheduler that needs no metric, got ReduceLROnPlateau"):
        trainer(scheduler=plateau)
