"""Times one op against its peers: verify against float64 first, warm up, interleave, report quantiles.

A ``benchmarks/bench_<op>.py`` has a generator ``cases(quick)`` of ``Case``; ``Case.build()`` makes the ``Problem``: the
slimmable module set to a width, the plain PyTorch module built at that width, and the usual slicing code, with the same
numbers. From these come the providers ``slimkernels``, ``plain``, ``slice`` and ``compile`` (torch.compile of the
slicing code at that one width; frozen for inference). The parameters of all modules come in the same order;
gradients of full size are cut to the plain ones' by ``active``.
"""

import contextlib
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
MODES = ("forward", "backward", "full")  # inference; gradients of a kept graph; training forward and backward
SAMPLE_S = 200e-6  # a sample repeats its call until it lasts this long


def leading(full: Tensor, like: Tensor) -> Tensor:
    """The leading slice of ``full`` that has the shape of ``like``; block slices need their own rule."""
    return full[tuple(slice(0, size) for size in like.shape)]


@dataclass
class Problem:
    ours: nn.Module  # called like the others, with ``inputs``
    plain: nn.Module
    sliced: nn.Module | None
    inputs: tuple[Tensor, ...]
    active: Callable[[Tensor, Tensor], Tensor] = (
        leading  # (full-size gradient, plain gradient) -> the active part of the first
    )
    peers: dict[str, nn.Module] = field(default_factory=dict)  # further providers
    oracle: nn.Module | None = None  # float64; None: a copy of ``plain``
    inference_peers: dict[str, nn.Module] = field(default_factory=dict)  # further providers of the mode "forward"


@dataclass
class Case:
    net: str
    width: float
    shape: str  # like N6304-I384-O1536
    dtype: torch.dtype
    build: Callable[[], Problem]
    modes: tuple[str, ...] = MODES
    compile: bool = False  # also time torch.compile, which costs seconds a case
    count: int = 1  # times this layer occurs in the net
    note: str = ""  # what was reduced, and from what


@dataclass
class Provider:
    train: Callable
    infer: Callable
    module: nn.Module
    inputs: tuple[Tensor, ...]

    def leaves(self) -> list[Tensor]:
        return [t for t in (*self.inputs, *self.module.parameters()) if t.requires_grad]


class Frozen(nn.Module):
    """``module`` by torch.compile with its weights frozen, for inference.

    The option ``freezing`` of torch.compile is not enough (torch 2.13): it is read again after the options are gone, and
    then neither weights are packed nor additions fused. And it packs nothing in inference mode.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        torch._dynamo.reset()
        torch._inductor.config.compile_threads = 1
        self.module = module.eval()
        self.compiled = torch.compile(module, dynamic=False)
        self.made = False

    def forward(self, *args: Tensor) -> object:
        with torch.inference_mode(False), torch.no_grad():
            if self.made:
                return self.compiled(*args)
            with torch._inductor.config.patch(freezing=True):
                self.made = True
                return self.compiled(*args)


def outputs(value: object) -> list[Tensor]:
    found = [value] if isinstance(value, Tensor) else [t for item in value for t in outputs(item)]  # type: ignore[attr-defined]
    return [t for t in found if t.is_floating_point()]


def providers(problem: Problem, with_compile: bool) -> dict[str, Provider]:
    further = problem.peers | problem.inference_peers
    modules = {"slimkernels": problem.ours, "plain": problem.plain, "slice": problem.sliced, **further}
    found = {name: Provider(m, m, m, problem.inputs) for name, m in modules.items() if m is not None}
    if with_compile and problem.sliced is not None:
        torch._dynamo.reset()
        torch._inductor.config.compile_threads = 1
        torch._functorch.config.donated_buffer = False  # a kept graph is run backward several times
        train, frozen = copy.deepcopy(problem.sliced), copy.deepcopy(problem.sliced)
        found["compile"] = Provider(
            torch.compile(train, dynamic=False),
            Frozen(frozen),
            train,
            problem.inputs,
        )
    return found


def error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape or not torch.isfinite(actual).all():
        return float("inf")
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def energy(t: Tensor) -> float:
    return t.double().square().sum().item()


def results(provider: Provider, mode: str) -> list[Tensor | None]:
    """Outputs and, but for inference, gradients of the leaves for fixed random output gradients."""
    if mode == "forward":
        provider.module.eval()
        with torch.inference_mode():
            return [*outputs(provider.infer(*provider.inputs))]
    provider.module.train()
    out = [t for t in outputs(provider.train(*provider.inputs)) if t.requires_grad]
    return [*out, *torch.autograd.grad(out, provider.leaves(), [fixed(t) for t in out], allow_unused=True)]


def fixed(t: Tensor) -> Tensor:
    generator = torch.Generator(t.device).manual_seed(1)
    wide = torch.randn(t.shape, generator=generator, dtype=torch.float64, device=t.device)
    return wide.to(torch.bfloat16).to(t.dtype)


def gate(problem: Problem, candidates: dict[str, Provider], mode: str) -> dict[str, str]:
    """What is wrong with each provider, "" for nothing.

    Error against float64 at most twice the plain module's in the same dtype, plus a floor; nothing outside the slice.
    """
    plain = candidates["plain"]
    dtype = plain.inputs[0].dtype
    exact_module = copy.deepcopy(problem.oracle or problem.plain).double()
    exact_inputs = tuple(
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in problem.inputs
    )
    exact = results(Provider(exact_module, exact_module, exact_module, exact_inputs), mode)
    torchs = results(plain, mode)
    verdict = {}
    for name, provider in candidates.items():
        ours = results(provider, mode)
        bad = "" if len(ours) == len(exact) else f"{len(ours)} results, expected {len(exact)}"
        for i, (o, e, t) in enumerate(zip(ours, exact, torchs, strict=False)):
            if o is None or e is None or t is None:
                bad = bad or ("" if o is e else f"result {i}: a gradient is missing")
                continue
            limit = 2 * error(t, e) + FLOOR[dtype]
            off = error(o if o.shape == e.shape else problem.active(o, e), e)
            whole, part = energy(o), energy(o if o.shape == e.shape else problem.active(o, e))
            if off > limit or abs(whole - part) > 1e-6 * whole:
                bad = bad or f"result {i}: error {off:.1e} against float64, allowed {limit:.1e}"
        verdict[name] = bad
    return verdict


def caller(provider: Provider, mode: str) -> Callable[[], object]:
    """What is timed."""
    if mode == "forward":
        provider.module.eval()
        return lambda: provider.infer(*provider.inputs)
    provider.module.train()
    leaves = provider.leaves()
    kept = [t for t in outputs(provider.train(*provider.inputs)) if t.requires_grad]
    dys = [fixed(t) for t in kept]
    if mode == "backward":
        return lambda: torch.autograd.grad(kept, leaves, dys, retain_graph=True, allow_unused=True)

    def full():
        out = [t for t in outputs(provider.train(*provider.inputs)) if t.requires_grad]
        return torch.autograd.grad(out, leaves, dys, allow_unused=True)

    return full


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Drops what native code prints: some profiler builds report every start and stop."""
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def extra_bytes(call: Callable[[], object]) -> int:
    """Peak of what PyTorch's allocator hands out during one call, above what was there before (its result included)."""
    with quiet_stderr(), torch.profiler.profile(profile_memory=True) as profile:
        kept = call()
    del kept
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Of one call. On one thread: CPU time, which on an idle machine is the same and on a shared one leaves out the
    moments in which something else had the core."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def interleaved(calls: dict[str, Callable[[], object]], budget_s: float) -> dict[str, list[float]]:
    """Seconds a call, one sample of each provider a round, the first one rotating."""
    repeats = {}
    for name, call in calls.items():
        call()
        estimate = min(seconds(call, 1) for _ in range(3))
        repeats[name] = max(1, int(SAMPLE_S / max(estimate, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names, start, rounds = list(calls), time.perf_counter(), 0
    while rounds < 7 or (time.perf_counter() - start < budget_s * len(names) and rounds < 200):
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            samples[name].append(seconds(calls[name], repeats[name]))
        rounds += 1
    return samples


def measure(case: Case, budget_s: float) -> Iterable[dict[str, object]]:
    """The CSV rows of one case: one a mode and provider. A provider whose gate is red gets no times."""
    torch.manual_seed(0)
    problem = case.build()
    every = providers(problem, case.compile)
    for mode in case.modes:
        candidates = {n: p for n, p in every.items() if mode == "forward" or n not in problem.inference_peers}
        verdict = gate(problem, candidates, mode)
        with torch.inference_mode(mode == "forward"):
            calls = {name: caller(p, mode) for name, p in candidates.items() if not verdict[name]}
            memory = {name: extra_bytes(call) for name, call in calls.items()}
            samples = interleaved(calls, budget_s)
        yield from provider_rows(case, mode, verdict, samples, {n: bytes_ / 2**20 for n, bytes_ in memory.items()})


def provider_rows(
    case: Any, mode: str, verdict: dict[str, str], samples: dict[str, list[float]], memory: dict[str, float]
) -> Iterator[dict[str, object]]:
    """A row for each provider in ``verdict``; ``samples`` of one round stand at the same place, ``memory`` is in MiB."""
    ours = samples.get("slimkernels")
    for name in verdict:
        row: dict[str, object] = {
            "net": case.net,
            "width": case.width,
            "shape": case.shape,
            "dtype": str(case.dtype).removeprefix("torch."),
            "mode": mode,
            "provider": name,
            "gate": verdict[name] or "ok",
            "count": case.count,
            "note": case.note,
        }
        if name in samples:
            p20, p50, p80 = (t * 1e6 for t in quantiles(samples[name]))
            row |= {"p20_us": f"{p20:.1f}", "p50_us": f"{p50:.1f}", "p80_us": f"{p80:.1f}"}
            if name in memory:
                row["extra_mb"] = f"{memory[name]:.2f}"
            if ours:
                ratio = statistics.median(t / o for t, o in zip(samples[name], ours, strict=True))
                row["ratio"] = f"{ratio:.3f}"  # this provider's time over slimkernels' in the same round
        yield row


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    ordered = sorted(samples)
    return tuple(ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))  # type: ignore[return-value]


def one_thread_environment(threads: int) -> None:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.set_num_threads(threads)
