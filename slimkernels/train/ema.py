"""Exponential moving average of a model's weights."""

from typing import Any

import torch
from torch import nn

from slimkernels._copy import deep_copy


class Ema:
    """A copy of the model whose weights follow the model's: ``average = decay * average + (1 - decay) * weight`` each
    step.

    Unlike ``torch.optim.swa_utils.AveragedModel`` it lets the copy keep buffers of its own: calibrated batch-norm
    statistics, whose number differs between the model and the copy until both are calibrated. Other buffers are copied.

    Args:
        model: the model itself, not in a DistributedDataParallel or torch.compile wrapper.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"Ema: expected decay between 0 and 1, got {decay}")
        self.decay = decay
        self.module = deep_copy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step of the average."""
        weights = dict(model.named_parameters())
        pairs = [(average, weights[name].detach()) for name, average in self.module.named_parameters()]
        if pairs:
            averages, current = zip(*pairs, strict=True)
            torch._foreach_lerp_(averages, current, 1 - self.decay)
        own = dict(self.module.named_buffers())
        for name, buffer in model.named_buffers():
            if name in own and own[name].shape == buffer.shape:
                own[name].copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state)
