"""Metrics of every width over a data loader."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.train._common import autocast, batch_size, call, device_of, eval_mode, move, split_batch, unwrap

Metric = Any  # (output, targets) -> Tensor, or an object with update, compute and reset as torchmetrics has


def accuracy(
    output: Tensor,  # (N, C, *) logits
    targets: Tensor,  # (N, *) class indices
) -> Tensor:  # (N, *) 1 where the most likely class is the target
    """Top-1 accuracy of a classifier, per sample (or per position)."""
    return (output.argmax(1) == targets).float()


class _Mean:
    """Mean of a function's values over all samples: a batch counts by its size."""

    def __init__(self, fn: Callable[[Any, Any], Tensor]) -> None:
        self.fn, self.total, self.count = fn, 0.0, 0

    def update(self, output: Any, targets: Any) -> None:
        n = batch_size(targets)
        self.total += self.fn(output, targets).double().mean().item() * n
        self.count += n

    def compute(self) -> float:
        total = torch.tensor([self.total, self.count], dtype=torch.float64)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # MPS aside, every backend's tensors take float64; NCCL wants them on its device.
            on = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            total = total.to(on)
            torch.distributed.all_reduce(total)
        return (total[0] / total[1]).item() if total[1] else float("nan")


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    widths: Sequence[Any],
    metrics: Mapping[str, Metric] | None = None,
    *,
    amp: str | None = None,
) -> dict[Any, dict[str, float]]:
    """Every metric at every width, in one pass over the loader, in evaluation mode.

    The model's width and every module's mode are the same afterwards. In a process group the sums are over all ranks.

    Args:
        loader: gives (inputs, targets).
        widths: for example ``[1.0, 0.5]``, or pairs (width, depth); None stands for the model as it is (it need not
            be elastic then).
        metrics: name -> function (output, targets) -> values, averaged over all samples, or a torchmetrics object (a
            copy of it per width is updated). None: top-1 accuracy.

    Raises: ValueError when the loader gave no batch.
    """
    from slimkernels import elastic

    inner = unwrap(model)
    metrics = {"accuracy": accuracy} if metrics is None else metrics
    device = device_of(inner)
    meters = {w: {name: _meter(metric, device) for name, metric in metrics.items()} for w in widths}
    batches = 0
    with eval_mode(inner), torch.no_grad():
        for batch in loader:
            inputs, targets = move(split_batch(batch), device)
            for w in widths:
                if w is None:
                    output = _forward(inner, inputs, amp)
                else:
                    with elastic.width(inner, *(w if isinstance(w, tuple) else (w,))):
                        output = _forward(inner, inputs, amp)
                for meter in meters[w].values():
                    meter.update(output, targets)
            batches += 1
    if batches == 0:
        raise ValueError("evaluate: expected a loader with at least one batch, got none")
    return {w: {name: float(meter.compute()) for name, meter in row.items()} for w, row in meters.items()}


def _forward(model: nn.Module, inputs: Any, amp: str | None) -> Any:
    with autocast(model, amp):
        return call(model, inputs)


def _meter(metric: Metric, device: torch.device) -> Any:
    if hasattr(metric, "update") and hasattr(metric, "compute"):
        meter = copy.deepcopy(metric)
        meter.reset()
        return meter.to(device) if hasattr(meter, "to") else meter
    if not callable(metric):
        raise ValueError(
            f"evaluate: expected metrics to be functions or torchmetrics objects, got {type(metric).__name__}"
        )
    return _Mean(metric)
