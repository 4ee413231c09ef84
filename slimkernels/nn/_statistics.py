"""The state that the batch norm modes ``switchable`` and ``universal`` add: one set per width."""

import torch
from torch import Tensor, nn


class BatchNormEntry(nn.Module):
    """Affine parameters and statistics of one width (mode ``switchable``), of full size: all widths look alike."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        for name in ("weight", "bias"):
            parameter = getattr(base, name)
            self.register_parameter(
                name,
                None if parameter is None else nn.Parameter(parameter.detach().clone(), parameter.requires_grad),
            )
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = getattr(base, name)
            self.register_buffer(name, None if buffer is None else buffer.clone())


class CalibratedStatistics(nn.Module):
    """Statistics of the calibrated ratios, one row each, in rising order of ratio (mode ``universal``)."""

    ratios: Tensor  # (R,) float64
    active: Tensor  # (R, C) bool: the channels that this ratio has
    mean: Tensor  # (R, C)
    var: Tensor  # (R, C)
    batches: Tensor  # (R,) int64: batches averaged so far

    def __init__(self, running: Tensor) -> None:
        super().__init__()
        channels = running.shape[0]
        self.register_buffer("ratios", torch.empty(0, dtype=torch.float64, device=running.device))
        self.register_buffer("active", torch.empty(0, channels, dtype=torch.bool, device=running.device))
        self.register_buffer("mean", running.new_empty(0, channels))
        self.register_buffer("var", running.new_empty(0, channels))
        self.register_buffer("batches", torch.empty(0, dtype=torch.int64, device=running.device))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.ratios = self.ratios.double()  # .half() must not round the keys
        return self

    def row(self, ratio: float) -> int | None:
        near = [i for i, known in enumerate(self.ratios.tolist()) if abs(known - ratio) < 1e-6]
        return near[0] if near else None

    def add(self, ratio: float) -> None:
        """Rows for ``ratio``, empty: replaces those it had."""
        i, channels = self.row(ratio), self.mean.shape[1]
        if i is None:
            ratios = torch.cat([self.ratios, self.ratios.new_tensor([ratio])])
            order = ratios.argsort()
            self.ratios = ratios[order]
            self.active = torch.cat([self.active, self.active.new_zeros(1, channels)])[order]
            self.mean = torch.cat([self.mean, self.mean.new_zeros(1, channels)])[order]
            self.var = torch.cat([self.var, self.var.new_ones(1, channels)])[order]
            self.batches = torch.cat([self.batches, self.batches.new_zeros(1)])[order]
        else:
            self.active[i], self.mean[i], self.var[i], self.batches[i] = False, 0, 1, 0

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        ratios = state_dict.get(prefix + "ratios")
        if ratios is None:
            # A plain checkpoint: what was calibrated belonged to other weights.
            for name, own in self._buffers.items():
                assert own is not None
                setattr(self, name, own[:0].clone())
                state_dict[prefix + name] = own[:0].clone()
        elif ratios.dim() == 1 and ratios.shape != self.ratios.shape:
            rows = ratios.shape[0]
            for name, own in self._buffers.items():
                assert own is not None
                setattr(self, name, own.new_empty(rows, *own.shape[1:]))
        super()._load_from_state_dict(state_dict, prefix, *args)


def forget(norm: nn.Module) -> None:
    """Running statistics as in a new batch norm."""
    for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
        norm.get_buffer(name).fill_(value)
