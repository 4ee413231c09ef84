"""One sandwich step (forward and backward of every width, the optimizer) against the usual slicing code.

Providers: ``slimkernels``; ``slice``: F.conv2d on sliced weights, channels-last; ``slice_nchw``: the same on contiguous
tensors; ``compile``: torch.compile of ``slice``; ``plain``: the sum of the steps of plain networks built at those widths,
channels-last. The cases ``random`` run one random width a step, a step for each of 30 widths. ``convolution-weights`` is the
weight side of ResNet-50 at .5 alone (``training_weights``). ``recompute`` is ours with that option.

``extra_mb`` is the peak of what a step holds in memory, gradients included, parameters and the optimizer's state left out
(``training_memory``); the note has what the process became resident with.
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness, training_memory, training_peers
from benchmarks.training_weights import WeightCase
from slimkernels import elastic
from slimkernels.models import cifar_resnet20
from slimkernels.models.mobilenet import MobileNetV2
from slimkernels.train import sandwich_step

WIDTHS = (1.0, 0.75, 0.5, 0.25)
RANDOM_STEPS = 30
NETS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # network, batch, divisor
    "resnet20": (cifar_resnet20, 64, 4),
    "mobilenetv2": (lambda: MobileNetV2(1.0, classes=10, dropout=0.0, stem_stride=1), 32, 8),
}
Step = Callable[[], object]


@dataclass
class StepCase:
    net: str
    workload: str  # "sandwich" or "random"
    dtype: torch.dtype
    providers: tuple[str, ...]
    width: str = "1/.75/.5/.25"
    modes: tuple[str, ...] = ("full",)
    count: int = 1
    note: str = ""
    shape: str = field(init=False)

    def __post_init__(self) -> None:
        self.shape = f"{self.workload}-N{NETS[self.net][1]}-32x32"


class Workbench:
    """The networks of a case, all with the same numbers."""

    def __init__(self, case: StepCase, batch: int | None = None) -> None:
        torch.manual_seed(0)
        make, full_batch, divisor = NETS[case.net]
        batch = batch or full_batch
        self.case, self.net = case, make()
        images = torch.randn(batch, 3, 32, 32)
        self.images, self.targets = images.contiguous(memory_format=torch.channels_last), torch.randint(0, 10, (batch,))
        generator = torch.Generator().manual_seed(0)
        drawn = (0.25 + 0.75 * torch.rand(RANDOM_STEPS, generator=generator)).tolist()
        # The widths of each step.
        self.steps = [list(WIDTHS)] if case.workload == "sandwich" else [[w] for w in drawn]
        self.ours = elastic.convert(self.net, images[:2], widths=(0.25, 1.0), divisor=divisor, sort=None, norm="shared")
        self.widths = {}
        for w in {w for step in self.steps for w in step}:
            elastic.set_width(self.ours, w)
            self.widths[w] = training_peers.widths_of(self.ours)
        elastic.set_width(self.ours, 1.0)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.case.dtype == torch.bfloat16)

    def passes(self, name: str) -> tuple[list[nn.Parameter], list[Callable[[], None]]]:
        """The parameters, and for each step what adds its gradients to them."""
        if name in ("slimkernels", "recompute"):
            model = copy.deepcopy(self.ours).to(memory_format=torch.channels_last)
            return trained(model), [self.our_step(model, step, name == "recompute") for step in self.steps]
        if name == "plain":
            nets = {w: training_peers.at_width(self.net, self.widths[w]) for w in self.widths}
            for w in nets:
                nets[w] = nets[w].to(memory_format=torch.channels_last)
            own = [p for net in nets.values() for p in trained(net)]
            return own, [self.step_of([(nets[w], None) for w in step], torch.channels_last) for step in self.steps]
        model = training_peers.sliced(self.net)
        if name != "slice_nchw":
            model = model.to(memory_format=torch.channels_last)
        layout = torch.contiguous_format if name == "slice_nchw" else torch.channels_last
        run: nn.Module = model
        if name == "compile":
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = 64
            torch._inductor.config.compile_threads = 1
            run = torch.compile(model, dynamic=False)  # type: ignore[assignment]
        return trained(model), [self.step_of([(run, self.widths[w]) for w in step], layout) for step in self.steps]

    def our_step(self, model: nn.Module, widths: list[float], recompute: bool) -> Callable[[], None]:
        amp = "bf16" if self.case.dtype == torch.bfloat16 else None
        options: dict[str, Any] = {"rule": "all", "distill": None, "amp": amp, "recompute": recompute}

        def step() -> None:
            sandwich_step(model, (self.images, self.targets), F.cross_entropy, None, widths=widths, **options)

        return step

    def step_of(
        self, nets: list[tuple[nn.Module, training_peers.Widths | None]], layout: torch.memory_format
    ) -> Callable[[], None]:
        def step() -> None:
            images = self.images.contiguous(memory_format=layout)
            for net, widths in nets:
                if widths is not None:
                    training_peers.set_widths(net, widths)
                with self.autocast():
                    loss = F.cross_entropy(net(images), self.targets)
                loss.backward()

        return step

    def provider(self, name: str) -> Step:
        parameters, passes = self.passes(name)
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

        def steps() -> None:
            for one in passes:
                optimizer.zero_grad()
                one()
                optimizer.step()

        return steps

    def gradients(self, name: str) -> list[Tensor]:
        """Of one step; those of the plain networks put back into the full shape."""
        parameters, passes = self.passes(name)
        passes[0]()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if name != "plain":
            return found
        full = [torch.zeros_like(p) for p in trained(self.net)]
        for i, grad in enumerate(found):
            full[i % len(full)][tuple(slice(0, size) for size in grad.shape)] += grad
        return full


def trained(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def gate(case: StepCase) -> dict[str, str]:
    """What is wrong with each provider, "" for nothing: the gradients of all parameters together, against float64."""
    bench = Workbench(case, batch=16)
    bench.case = StepCase(case.net, case.workload, torch.float32, ())
    exact_bench = Workbench(bench.case, batch=16)
    exact_bench.net.double()
    exact_bench.images = exact_bench.images.double()
    exact = flat(exact_bench.gradients("slice_nchw"))
    bench.case = case
    limit = 2 * max(harness.error(flat(bench.gradients(name)), exact) for name in ("slice_nchw", "slice"))
    verdict = {}
    for name in case.providers:
        off = harness.error(flat(bench.gradients(name)), exact)
        allowed = limit + harness.FLOOR[case.dtype]
        verdict[name] = "" if off <= allowed else f"error {off:.1e} against float64, allowed {allowed:.1e}"
    return verdict


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def peak(case: StepCase, name: str) -> training_memory.Peak:
    dtype = str(case.dtype).removeprefix("torch.")
    threads = str(torch.get_num_threads())
    return training_memory.of_process(
        "-m", "benchmarks.bench_training_step", case.net, case.workload, dtype, name, threads
    )


def print_peak(net: str, workload: str, dtype: str, name: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    bench = Workbench(StepCase(net, workload, getattr(torch, dtype), (name,)))
    parameters, passes = bench.passes(name)
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def step() -> None:
        passes[0]()
        optimizer.step()

    images, targets = bench.images, bench.targets
    if name != "compile":
        bench.images, bench.targets = images[:2].clone(memory_format=torch.preserve_format), targets[:2]
    step()
    optimizer.zero_grad()
    bench.images, bench.targets = images, targets
    training_memory.of_step(step)


def measure(case: StepCase | WeightCase, budget_s: float) -> Iterable[dict[str, object]]:
    """The rows of one case. A provider whose gate is red gets no times."""
    if isinstance(case, WeightCase):
        yield from case.measure(budget_s)
        return
    verdict = gate(case)
    bench = Workbench(case)
    calls = {name: bench.provider(name) for name in case.providers if not verdict[name]}
    samples = harness.interleaved(calls, budget_s)
    peaks = {name: peak(case, name) for name in calls if case.workload == "sandwich"}
    memory = {name: found.held_mb for name, found in peaks.items()}
    for row in harness.provider_rows(case, "full", verdict, samples, memory):
        if row["provider"] in peaks:
            row["note"] = peaks[str(row["provider"])].note()
        yield row


def cases(quick: bool) -> Iterator[StepCase | WeightCase]:
    everything = ("slimkernels", "plain", "slice", "slice_nchw", "recompute")
    yield WeightCase()
    for net in NETS:
        # Several minutes of compiling a network.
        compiled = () if quick else ("compile",)
        yield StepCase(net, "sandwich", torch.float32, (*everything, *compiled))
        if not quick:
            yield StepCase(net, "random", torch.float32, ("slimkernels", "slice", "slice_nchw"), width=".25 to 1")
            yield StepCase(net, "sandwich", torch.bfloat16, everything)


if __name__ == "__main__":
    print_peak(*sys.argv[1:])
