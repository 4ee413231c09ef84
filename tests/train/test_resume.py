import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from slimkernels.train import CheckpointError, CheckpointStore, SlimmableTrainer, TrainingError
from slimkernels.train import checkpoint as checkpoint_module
from slimkernels.train.checkpoint import read
from slimkernels.train.data import DataStream, rng_state, set_rng_state
from tests.train import stand_in
from tests.train.stand_in import TinyNet, data

pytestmark = pytest.mark.usefixtures("tiny_elastic")
ROOT = Path(__file__).parents[2]


def run(*args):
    command = [sys.executable, "-W", "error", "-m", "tests.train.killable", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def losses_by_step(path):
    found = {}
    for line in path.read_text().splitlines():
        step, rest = line.split(" ", 1)
        found[int(step)] = rest
    return found


def test_losses_after_kill_and_resume_are_those_of_an_uninterrupted_run(tmp_path):
    straight = run(tmp_path / "a", tmp_path / "a.log", "fresh")
    assert straight.returncode == 0, straight.stderr
    expected = losses_by_step(tmp_path / "a.log")
    assert sorted(expected) == list(range(1, 24))

    # Killed twice: in mid-epoch after a checkpoint of mid-epoch (7 batches an epoch), then again further on.
    for mode, kill_at in (("fresh", 8), ("resume", 18)):
        killed = run(tmp_path / "b", tmp_path / "b.log", mode, kill_at)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(tmp_path / "b", tmp_path / "b.log", "resume")
    assert resumed.returncode == 0, resumed.stderr

    lines = (tmp_path / "b.log").read_text().splitlines()
    assert [int(line.split()[0]) for line in lines] == [*range(1, 9), *range(6, 19), *range(16, 24)]
    for line in lines:  # also the steps that were done twice
        step, rest = line.split(" ", 1)
        assert rest == expected[int(step)], f"step {step}"
    last = [read(tmp_path / name / "step-00000023.pt") for name in "ab"]
    for part in ("model", "ema"):
        for name, value in last[0][part].items():
            assert torch.equal(value, last[1][part][name])
    assert last[0]["history"] == last[1]["history"]


def trainer(directory=None, model=None, **options):
    model = TinyNet(dropout=0.2) if model is None else model
    optimizer = options.pop("optimizer", None) or torch.optim.Adam(model.parameters(), lr=0.01)
    defaults = {"train_loader": DataLoader(data(24), batch_size=6, shuffle=True), "progress": False}
    return SlimmableTrainer(
        model, F.cross_entropy, optimizer, checkpoint_dir=directory, **{**defaults, **options}
    )  # fmt: skip


def recorded(t, **fit):
    lines = []
    t.on_step = lambda step, losses: lines.append((step, {w: loss.item() for w, loss in losses.items()}))
    t.fit(**fit)
    return lines


@pytest.mark.parametrize("rule", ["alternate", "random", "all"])
@pytest.mark.parametrize("stop", [3, 4, 5], ids=["mid-epoch", "epoch-end", "second-epoch"])
def test_resume_goes_on_exactly(tmp_path, rule, stop):
    expected = recorded(trainer(rule=rule), steps=9)
    first = recorded(trainer(tmp_path, rule=rule), steps=stop)
    torch.randn(5)
    second = recorded(trainer(tmp_path, rule=rule), steps=9, resume=True)
    assert first + second == expected


def test_accumulated_steps_resume_and_recover(tmp_path):
    """5 batches an epoch, 2 a step: the third step of an epoch has one batch."""

    def make(directory, fail_at=None):
        return trainer(directory, accumulate=2, train_loader=FailingLoader(fail_at), rule="random")

    expected = recorded(make(None), steps=8)
    t = make(None)
    t.fit(epochs=2)
    assert t.step == 6
    assert recorded(make(tmp_path), steps=4) + recorded(make(tmp_path), steps=8, resume=True) == expected
    # The loader fails in the second batch of step 2: step 2 begins again with its first.
    t = make(tmp_path / "failing", fail_at=3)
    with pytest.raises(TrainingError, match=r"at step 2 \(epoch 1, batch 4\).*The checkpoint of step 1 is"):
        t.fit(steps=8)
    assert recorded(make(tmp_path / "failing"), steps=8, resume=True) == expected[1:]
    t.data.loader.fail_at = None
    assert recorded(t, steps=8) == expected[1:]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of Python 3.12 on, about any worker process
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_resume_with_amp_workers_and_sampler_with_replacement(tmp_path, amp):
    def make(directory):
        generator = torch.Generator()
        sampler = torch.utils.data.RandomSampler(data(24), replacement=True, num_samples=40, generator=generator)
        train_loader = DataLoader(data(24), batch_size=6, sampler=sampler, num_workers=1, generator=generator)
        return trainer(directory, amp=amp, train_loader=train_loader)

    expected = recorded(make(None), steps=6)
    assert recorded(make(tmp_path), steps=4) + recorded(make(tmp_path), steps=6, resume=True) == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
            milestones=[3],
        ),
    ],
    ids=["multistep", "cosine", "lambda", "sequential"],
)
def test_schedulers_resume(tmp_path, make):
    def prepared(directory):
        model = TinyNet()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return trainer(directory, model, optimizer=optimizer, scheduler=make(optimizer))

    expected = recorded(prepared(None), steps=6)
    assert recorded(prepared(tmp_path), steps=3) + recorded(prepared(tmp_path), steps=6, resume=True) == expected


def test_resume_from_a_path_and_from_nothing(tmp_path):
    expected = recorded(trainer(tmp_path / "a"), steps=5)
    t = trainer()
    t.fit(steps=6, resume=tmp_path / "a" / "step-00000005.pt")
    assert t.step == 6
    assert recorded(trainer(tmp_path / "empty"), steps=5, resume=True) == expected


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path):
    trainer(tmp_path).fit(steps=3)
    t = trainer(tmp_path)
    with pytest.raises(
        ValueError, match=r"expected an empty checkpoint_dir for a new run, got .* of step 3; give resume=True"
    ):
        t.fit(steps=5)
    t.store.clear()
    t.fit(steps=5)
    assert t.store.steps() == [5, 4]  # the end and the end of the epoch


class FailingLoader:
    def __init__(self, fail_at):
        self.fail_at = fail_at

    def __iter__(self):
        x, y = data(30).tensors
        for i in range(5):
            if i == self.fail_at:
                raise OSError("disk on fire\nand more")
            noise = torch.randn(())
            yield x[6 * i : 6 * i + 6] + noise, y[6 * i : 6 * i + 6]


def test_a_loader_that_raises_in_mid_epoch(tmp_path):
    expected = recorded(trainer(train_loader=FailingLoader(None)), steps=7)
    t = trainer(tmp_path, train_loader=FailingLoader(3))
    lines = []
    t.on_step = lambda step, losses: lines.append((step, {w: loss.item() for w, loss in losses.items()}))
    with pytest.raises(TrainingError) as caught:
        t.fit(epochs=2)
    text = str(caught.value)
    assert text.startswith(
        "SlimmableTrainer: the training loader failed at step 4 (epoch 1, batch 4): OSError: disk on fire. "
        "The checkpoint of step 3 is "
    )
    assert "\n" not in text
    assert isinstance(caught.value.__cause__, OSError)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003.pt"]
    # Mended, the run goes on as if nothing had happened: resumed, or in the same trainer.
    resumed = recorded(trainer(tmp_path, train_loader=FailingLoader(None)), steps=7, resume=True)
    assert lines + resumed == expected
    t.data.loader.fail_at = None
    t.fit(steps=7)
    assert lines == expected


def test_a_loader_that_raises_without_checkpoints(tmp_path):
    with pytest.raises(TrainingError, match=r"at step 2 .*No checkpoint_dir was given: nothing is saved"):
        trainer(train_loader=FailingLoader(1)).fit(epochs=1)
    with pytest.raises(TrainingError, match=r"at step 1 .*There is no checkpoint\."):
        trainer(tmp_path, train_loader=FailingLoader(0)).fit(epochs=1)
    assert list(tmp_path.iterdir()) == []


def test_a_validation_that_raises(tmp_path):
    t = trainer(tmp_path, val_loader=FailingLoader(2), validate_every=3, checkpoint_every=2)
    with pytest.raises(
        TrainingError, match=r"the validation after step 3 failed: OSError: disk on fire\. The checkpoint of step 2"
    ):
        t.fit(steps=5)


def test_newest_checkpoints_are_kept(tmp_path):
    t = trainer(tmp_path, checkpoint_every=2, keep=2)
    t.fit(steps=7)
    assert t.store.steps() == [7, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000006.pt", "step-00000007.pt"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def foreign(path):
    torch.save({"weights": torch.ones(2)}, path)


def pickled(path):
    torch.save({"format": "slimkernels.train", "run": print}, path)


def text(path):
    path.write_text("not a checkpoint")


DAMAGE = {
    truncate: "is cut off or no checkpoint at all",
    flip: "is damaged|is cut off",
    foreign: "was not written by a slimkernels trainer",
    pickled: "cannot be loaded as plain data",
    text: "is cut off or no checkpoint at all",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_bad_checkpoint_is_told_and_the_one_before_is_used(tmp_path, damage, caplog):
    expected = recorded(trainer(), steps=6)
    trainer(tmp_path, checkpoint_every=2).fit(steps=4)
    damage(tmp_path / "step-00000004.pt")
    resumed = recorded(trainer(tmp_path), steps=6, resume=True)
    assert resumed == expected[2:]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "step-00000004.pt" in warning
    assert "falling back to" in warning
    assert "step-00000002.pt" in warning


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_bad_checkpoint_alone_is_an_error(tmp_path, damage):
    trainer(tmp_path).fit(steps=2)
    path = tmp_path / "step-00000002.pt"
    damage(path)
    with pytest.raises(CheckpointError, match=DAMAGE[damage]) as caught:
        trainer(tmp_path).fit(steps=3, resume=True)
    assert "no older checkpoint" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=DAMAGE[damage]):
        trainer().fit(steps=3, resume=path)


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a file, got .*gone\.pt, which does not exist"):
        trainer().fit(steps=3, resume=tmp_path / "gone.pt")


def test_checkpoints_of_something_else(tmp_path):
    trainer(tmp_path).fit(steps=2)
    with pytest.raises(CheckpointError, match="was written with seed 0, got 1"):
        trainer(tmp_path, seed=1).fit(steps=3, resume=True)
    with pytest.raises(CheckpointError, match="was written with no ema, got one now"):
        trainer(tmp_path, ema=0.9).fit(steps=3, resume=True)
    with pytest.raises(CheckpointError, match="belongs to another model or optimizer"):
        trainer(tmp_path, stand_in.OwnWidths()).fit(steps=3, resume=True)
    with pytest.raises(CheckpointError, match="expected a state of rule 'all', got 'sandwich'"):
        trainer(tmp_path, rule="all").fit(steps=3, resume=True)
    with pytest.raises(CheckpointError, match="at least 2 batches an epoch"):
        trainer(tmp_path, train_loader=DataLoader(data(6), 6)).fit(steps=3, resume=True)


def test_a_failed_write_leaves_the_old_checkpoints_and_nothing_half_written(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save({"value": torch.ones(3)}, 1)

    def full_disk(path, state):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint_module, "write_synced", full_disk)
    with pytest.raises(OSError, match="no space"):
        store.save({"value": torch.ones(3)}, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_leftovers_of_a_kill_during_a_write_are_cleared_and_never_read(tmp_path):
    (tmp_path / ".step-00000009.pt.tmp").write_bytes(b"half")
    store = CheckpointStore(tmp_path)
    assert store.latest() is None
    store.save({"value": 1}, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_a_state_that_could_not_be_loaded_again_is_refused_at_the_save(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be loaded as plain data"):
        CheckpointStore(tmp_path).save({"function": print}, 1)
    assert list(tmp_path.iterdir()) == []


def test_random_states_survive_a_checkpoint(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.randn(2).tolist()

    random.gauss(0, 1)
    path = CheckpointStore(tmp_path).save({"rng": rng_state()}, 1)
    expected = draw()
    draw()
    set_rng_state(read(path)["rng"])
    assert draw() == expected


def test_data_stream_tells_the_sampler_its_epoch():
    class Sampler(torch.utils.data.SequentialSampler):
        epochs = []  # noqa: RUF012

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    stream = DataStream(DataLoader(data(12), 6, sampler=Sampler(data(12))), seed=0)
    for _ in range(2):
        while stream.next_batch() is not None:
            pass
        assert stream.next_batch() is None
        stream.next_epoch()
    assert Sampler.epochs == [0, 1]
    assert len(stream) == 2
