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
    """Statistics of the calibrated ratios, one row each, in rising order of ratio (mode ``universal``).

    Which row is whose is known to Python too, and read back from the buffers only after these were loaded or measured:
    a width is set without waiting for a GPU. ``places`` holds the statistics in use of the listed and the calibrated
    ratios, always the same tensors for a ratio: a CUDA graph of one width stays right while another one is set.
    """

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
        self.places: dict[float, tuple[Tensor, Tensor]] = {}
        self._keys: tuple[float, ...] = ()
        self._measured: tuple[bool, ...] | None = ()  # has the row seen a batch; None: to be read back

    def _apply(self, fn, recurse=True):
        ratios, _ = self.ratios, self.measured()
        super()._apply(fn, recurse)
        # .half() must not round the keys. What comes from the device meta has no values to keep.
        self.ratios = self.ratios.double() if ratios.is_meta else ratios.to(self.ratios.device)
        self.places.clear()
        return self

    def row(self, ratio: float) -> int | None:
        near = [i for i, known in enumerate(self._keys) if abs(known - ratio) < 1e-6]
        return near[0] if near else None

    def measured(self) -> list[tuple[int, float]]:
        """Rows that have seen a batch, with their ratios, which rise."""
        if self._measured is None and self.batches.is_meta:
            return []
        if self._measured is None:
            self._measured = tuple(n > 0 for n in self.batches.tolist())
        return [(i, ratio) for i, (ratio, seen) in enumerate(zip(self._keys, self._measured, strict=True)) if seen]

    def changed(self) -> None:
        """Rows were filled: which, the next question about them reads back, once."""
        self._measured = None

    def place(self, ratio: float, like: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """Two tensors to write the statistics of ``ratio`` to; ``keep``: the same ones each time."""
        found = self.places.get(ratio)
        if found is None or found[0].dtype != like.dtype or found[0].device != like.device:
            with torch.inference_mode(False):  # else neither autograd nor a later write would take them
                found = torch.empty_like(like), torch.empty_like(like)
            if keep:
                self.places[ratio] = found
        return found

    def add(self, ratio: float) -> None:
        """Rows for ``ratio``, empty: replaces those it had."""
        i, channels = self.row(ratio), self.mean.shape[1]
        self.changed()
        if i is None:
            at = sum(known < ratio for known in self._keys)
            self._keys = (*self._keys[:at], float(ratio), *self._keys[at:])

            def insert(rows: Tensor, new: Tensor) -> Tensor:
                return torch.cat([rows[:at], new, rows[at:]])

            self.ratios = insert(self.ratios, self.ratios.new_full((1,), ratio))
            self.active = insert(self.active, self.active.new_zeros(1, channels))
            self.mean = insert(self.mean, self.mean.new_zeros(1, channels))
            self.var = insert(self.var, self.var.new_ones(1, channels))
            self.batches = insert(self.batches, self.batches.new_zeros(1))
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
        self.read_back()

    def read_back(self) -> None:
        """After the buffers were replaced: what Python knows of them."""
        if not self.ratios.is_meta:
            self._keys, self._measured = tuple(self.ratios.tolist()), None


def forget(norm: nn.Module) -> None:
    """Running statistics as in a new batch norm."""
    for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
        norm.get_buffer(name).fill_(value)
