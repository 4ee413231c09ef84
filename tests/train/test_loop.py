"""The loop by itself: any trainer that says what a step is gets the rest."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from slimkernels.train import Trainer, evaluate
from tests.train.stand_in import data


class PlainTrainer(Trainer):
    """Ordinary training with label noise from a generator of its own."""

    def __init__(self, model, **options):
        super().__init__(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **options)
        self.generator = torch.Generator().manual_seed(1)

    def training_step(self, batches):
        self.optimizer.zero_grad()
        ((x, y),) = batches
        flip = torch.rand(y.shape, generator=self.generator) < 0.1
        loss = F.cross_entropy(self.model(x), torch.where(flip, 3 - y, y))
        loss.backward()
        self.finish_step()
        return {"task": loss.detach()}

    def validate(self, model):
        return [{"width": None, **evaluate(model, self.val_loader, [None])[None]}]

    def extra_state(self):
        return {"noise": self.generator.get_state()}

    def load_extra_state(self, state):
        self.generator.set_state(state["noise"])


def make(directory=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 4))
    lines = []
    trainer = PlainTrainer(
        model,
        train_loader=DataLoader(data(24), 6, shuffle=True),
        val_loader=DataLoader(data(12, 1), 6),
        checkpoint_dir=directory,
        progress=False,
        on_step=lambda step, losses: lines.append((step, losses["task"].item())),
    )
    return trainer, lines


def test_a_trainer_of_ones_own_trains_validates_and_resumes(tmp_path):
    straight, expected = make()
    history = straight.fit(epochs=3)
    assert [row["step"] for row in history] == [4, 8, 12]
    assert history[0].keys() == {"step", "weights", "width", "accuracy"}

    first, lines = make(tmp_path)
    first.fit(steps=8)
    second, more = make(tmp_path)
    assert second.fit(epochs=3, resume=True) == history
    assert lines + more == expected


def test_what_a_trainer_has_to_say():
    with pytest.raises(NotImplementedError, match="Trainer has no training_step"):
        Trainer(nn.Linear(8, 4), None, train_loader=DataLoader(data(6), 6), progress=False).fit(steps=1)
    optimizer = torch.optim.SGD(nn.Linear(8, 4).parameters(), lr=0.1)
    with pytest.raises(NotImplementedError, match="Trainer has no validate"):
        Trainer(nn.Linear(8, 4), optimizer, train_loader=[1], progress=False).validate(nn.Linear(8, 4))
