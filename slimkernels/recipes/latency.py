"""Latency of one width four ways in turns: deployed, the elastic model itself, the usual slicing code, a plain network."""

import copy
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROVIDERS = ("deployed", "slimkernels", "slicing", "plain")


@dataclass
class Timing:
    """Milliseconds of one call."""

    p20: float
    p50: float
    p80: float


class SlicedLinear(nn.Module):
    """What slimmable code does without a library: full weights, sliced anew in every call."""

    def __init__(self, full: nn.Linear, out_features: int):
        super().__init__()
        self.weight, self.bias, self.out_features = full.weight, full.bias, out_features

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[: self.out_features]
        return F.linear(x, self.weight[: self.out_features, : x.shape[-1]], bias)


class SlicedConv2d(nn.Module):
    def __init__(self, full: nn.Conv2d, out_channels: int):
        super().__init__()
        self.weight, self.bias, self.out_channels = full.weight, full.bias, out_channels
        self.stride, self.padding, self.dilation = full.stride, full.padding, full.dilation

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[: self.out_channels]
        weight = self.weight[: self.out_channels, : x.shape[1]]
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)


class SlicedBatchNorm2d(nn.Module):
    """Full-size statistics and parameters, of which the first are those of ``active``."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, full: nn.BatchNorm2d, active: nn.BatchNorm2d):
        super().__init__()
        self.eps = full.eps
        for name in ("running_mean", "running_var", "weight", "bias"):
            whole = getattr(full, name).detach().clone()
            whole[: active.num_features] = getattr(active, name).detach()
            self.register_buffer(name, whole)

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        mean, var = self.running_mean[:c], self.running_var[:c]
        return F.batch_norm(x, mean, var, self.weight[:c], self.bias[:c], eps=self.eps)


def slicing_network(full: nn.Module, active: nn.Module) -> nn.Module:
    """The plain full-width network ``full`` with layers that slice their weights to the sizes of ``active``."""
    made = copy.deepcopy(full)
    for name, module in list(made.named_modules()):
        target = active.get_submodule(name)
        sliced: nn.Module
        if isinstance(module, nn.Linear) and isinstance(target, nn.Linear):
            sliced = SlicedLinear(module, target.out_features)
        elif isinstance(module, nn.Conv2d) and isinstance(target, nn.Conv2d) and module.groups == 1:
            sliced = SlicedConv2d(module, target.out_channels)
        elif isinstance(module, nn.BatchNorm2d) and isinstance(target, nn.BatchNorm2d):
            sliced = SlicedBatchNorm2d(module, target)
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"slicing_network: expected Linear, Conv2d and BatchNorm2d layers, got {type(module).__name__}"
            )
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(made.get_submodule(parent), child, sliced)
    return made.eval()


def check_same(networks: Mapping[str, nn.Module], x: Tensor) -> None:
    """All networks give the same output on ``x``: only then is comparing their times fair.

    Raises: RuntimeError when they do not.
    """
    with torch.inference_mode():
        outputs = {name: network(x) for name, network in networks.items()}
    expected = outputs["plain"].double()
    for name, output in outputs.items():
        difference = ((output.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
        if not difference < 1e-4:
            raise RuntimeError(
                f"latency: expected {name} to compute what the plain network does, got a difference of {difference:.2e}"
            )


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(
    networks: Mapping[float, Mapping[str, nn.Module]],  # width -> provider -> network
    inputs: Mapping[int, Tensor],  # batch size -> input
    budget: float = 6.0,  # seconds of measuring a batch size
) -> dict[tuple[float, str, int], Timing]:
    """Every network on every input, one thread: all are warmed up first, then they take turns, round by round.

    A sample is one call, or as many as fill 0.2 ms: short enough that another program's time slice spoils few of them.
    """
    found: dict[tuple[float, str, int], Timing] = {}
    with one_thread(), torch.inference_mode():
        for batch, x in inputs.items():
            cases = {(w, name): network for w, by_name in networks.items() for name, network in by_name.items()}
            once = {case: min(_seconds(network, x, 1) for _ in range(5)) for case, network in cases.items()}
            calls = {case: max(1, round(2e-4 / seconds)) for case, seconds in once.items()}
            rounds = int(budget / sum(calls[case] * once[case] for case in cases))
            samples: dict[tuple[float, str], list[float]] = {case: [] for case in cases}
            for _ in range(min(max(rounds, 11), 500)):
                for case, network in cases.items():
                    samples[case].append(_seconds(network, x, calls[case]))
            for (w, name), values in samples.items():
                p20, _, _, p80 = statistics.quantiles(values, n=5)
                found[w, name, batch] = Timing(1e3 * p20, 1e3 * statistics.median(values), 1e3 * p80)
    return found


def _seconds(network: nn.Module, x: Tensor, calls: int) -> float:
    """CPU time of a call: on one thread that of an idle machine, also when something else takes the core now and then."""
    start = time.process_time()
    for _ in range(calls):
        network(x)
    return (time.process_time() - start) / calls
