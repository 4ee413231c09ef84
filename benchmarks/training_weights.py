"""The weight side of a training step alone: from a gradient of the active slice to the sum for the whole parameter.

ResNet-50's convolutions at width .5, with a sum from an earlier width already there. ``slice``: autograd through
``weight[:n, :c].contiguous()`` (OFA's way: zeros of full size, twice, and their addition). ``mask``: through boolean masks
(mmrazor's). ``floor``: PyTorch adds the gradient to the slice of a buffer. ``slimkernels``: what the ops do inside
``sandwich_step``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import harness
from slimkernels.models import resnet50
from slimkernels.ops._slots import gradient_slots, stand_in

PROVIDERS = ("slimkernels", "slice", "mask", "floor")


@dataclass
class WeightCase:
    net: str = "resnet50"
    width: str = "0.5"
    shape: str = "convolution-weights"
    dtype: torch.dtype = torch.float32
    count: int = 1
    note: str = ""

    def measure(self, budget_s: float) -> Iterator[dict[str, object]]:
        torch.manual_seed(0)
        full, half = (
            [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (resnet50(1.0), resnet50(0.5))
        )
        parts = [torch.randn_like(w) for w in half]
        before = [torch.randn_like(w) for w in full]
        expected = [b.double() for b in before]
        for total, part in zip(expected, parts, strict=True):
            total[: part.shape[0], : part.shape[1]] += part
        samples, verdict = {}, {}
        with gradient_slots([nn.Parameter(w.detach().clone()) for w in full]) as slots:
            runs: dict[str, tuple[Callable[[], None], Callable[[], list[Tensor]]]] = {}
            for slot, start in zip(slots, before, strict=True):
                slot.total = start.clone()
            runs["slimkernels"] = (lambda: ours(slots, parts), lambda: [s.total for s in slots if s.total is not None])
            for name in ("slice", "mask"):
                weights = [nn.Parameter(w.detach().clone()) for w in full]
                for weight, start in zip(weights, before, strict=True):
                    weight.grad = start.clone()
                cut = by_slice if name == "slice" else by_mask
                runs[name] = (
                    lambda weights=weights, cut=cut: through_autograd(weights, parts, cut),
                    lambda weights=weights: [w.grad for w in weights if w.grad is not None],
                )
            totals = [b.clone() for b in before]
            runs["floor"] = (lambda: floor(totals, parts), lambda: totals)
            for name, (run, result) in runs.items():
                run()
                off = max(harness.error(a, e) for a, e in zip(result(), expected, strict=True))
                verdict[name] = "" if off < harness.FLOOR[self.dtype] else f"error {off:.1e}"
            samples = harness.interleaved({n: run for n, (run, _) in runs.items() if not verdict[n]}, budget_s)
        yield from harness.provider_rows(self, "backward", verdict, samples, {})


def ours(slots: list, parts: list[Tensor]) -> None:
    for slot, part in zip(slots, parts, strict=True):
        stand_in(slot.parameter)
        slot.add(part)


def by_slice(weight: Tensor, n: int, c: int) -> Tensor:
    return weight[:n, :c].contiguous()


def by_mask(weight: Tensor, n: int, c: int) -> Tensor:
    out, into = torch.arange(weight.shape[0]) < n, torch.arange(weight.shape[1]) < c
    return weight[out][:, into]


def through_autograd(
    weights: list[nn.Parameter], parts: list[Tensor], cut: Callable[[Tensor, int, int], Tensor]
) -> None:
    for weight, part in zip(weights, parts, strict=True):
        cut(weight, part.shape[0], part.shape[1]).backward(part)


def floor(totals: list[Tensor], parts: list[Tensor]) -> None:
    for total, part in zip(totals, parts, strict=True):
        total[: part.shape[0], : part.shape[1]].add_(part)
