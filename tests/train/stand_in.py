"""A small elastic network without `elastic.convert`, so that the training tests stay about training."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import nn

from slimkernels import elastic
from slimkernels.nn import SlimLinear

FULL = 16


class TinyNet(nn.Module):
    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.fc1, self.fc2, self.head = SlimLinear(8, FULL), SlimLinear(FULL, FULL), SlimLinear(FULL, 4)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.calls += 1
        x = self.dropout(self.fc1(x).relu())
        return self.head(self.fc2(x).relu())


class OwnWidths(nn.Module):
    """Like a switchable norm: a parameter per width, so that some stay unused in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyNet()
        self.scales = nn.ParameterDict({str(n): nn.Parameter(torch.ones(4)) for n in (4, 8, 16)})

    def forward(self, x):
        return self.net(x) * self.scales[str(self.net.fc1.width)]


def tiny(model: nn.Module) -> TinyNet:
    return model.net if isinstance(model, OwnWidths) else model


@contextmanager
def width(model: nn.Module, w: float):
    net = tiny(model)
    before = net.fc1.width
    try:
        for layer in (net.fc1, net.fc2):
            layer.set_width(round(FULL * w))
        yield model
    finally:
        for layer in (net.fc1, net.fc2):
            layer.set_width(before)


def plan(model: nn.Module):
    return SimpleNamespace(widths=(0.25, 1.0), listed=False, norm="shared", stages={})


def install() -> None:
    """For subprocesses; tests use monkeypatch."""
    elastic.width, elastic.plan = width, plan


def data(n: int = 24, seed: int = 0) -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator)
    return torch.utils.data.TensorDataset(x, (x @ torch.randn(8, 4, generator=generator)).argmax(1))


def batch(n: int = 12, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = data(n, seed).tensors
    return x, y
