"""The steps of ``make gpu`` that time: every op against its peers, networks, training, deployment, generated weights."""

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness, shapes
from benchmarks.gpu.session import Session
from benchmarks.run import ops as all_ops
from slimkernels import elastic, models
from slimkernels.train import sandwich_step

WIDTHS = (0.25, 0.5, 0.75, 1.0)
GPU_MACS, GPU_ELEMENTS = 2**36, 2**28  # of one call: the batches of op-shapes.csv as they are
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet50": (models.resnet50, (3, 224, 224)),
    "mobilenet_v2": (models.mobilenet_v2, (3, 224, 224)),
    "vit_small": (models.vit_small, (3, 224, 224)),
}
DRY_NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cifar_resnet20": (models.cifar_resnet20, (3, 16, 16))
}


def to_device(problem: harness.Problem, device: torch.device) -> harness.Problem:
    moved = {name: module.to(device) for name, module in problem.peers.items()}
    return harness.Problem(
        problem.ours.to(device),
        problem.plain.to(device),
        None if problem.sliced is None else problem.sliced.to(device),
        tuple(t.detach().to(device).requires_grad_(t.requires_grad) for t in problem.inputs),
        problem.active,
        moved,
        None if problem.oracle is None else problem.oracle.to(device),
    )


def work(provider: harness.Provider, mode: str) -> tuple[float, float]:
    """FLOPs of the plain module, and the bytes of its inputs, parameters and outputs; three times that where it trains."""
    with FlopCounterMode(display=False) as counter:
        out = harness.outputs(provider.module(*(t.detach() for t in provider.inputs)))
    touched = [*provider.inputs, *provider.module.parameters(), *out]
    times = 1 if mode == "forward" else 3
    return times * counter.get_total_flops(), times * sum(t.numel() * t.element_size() for t in touched)


@contextlib.contextmanager
def gpu_limits(session: Session) -> Iterator[None]:
    """Within it the shapes keep their batch, which on a CPU is cut; dry: they are cut further."""
    kept = shapes.MAX_MACS, shapes.MAX_ELEMENTS
    shapes.MAX_MACS, shapes.MAX_ELEMENTS = (2**16, 2**16) if session.dry else (GPU_MACS, GPU_ELEMENTS)
    try:
        yield
    finally:
        shapes.MAX_MACS, shapes.MAX_ELEMENTS = kept


def small_enough(problem: harness.Problem) -> bool:
    """For a dry run: tiny parameters and inputs."""
    tensors = [*problem.inputs, *problem.ours.parameters()]
    return sum(t.numel() for t in tensors) < 2_000_000


def time_ops(session: Session) -> str:
    """Every op at the shapes of op-shapes.csv and the INR workloads; a provider whose numbers are wrong gets no time."""
    done = red = 0
    with gpu_limits(session):
        benches = {op: importlib.import_module(f"benchmarks.bench_{op}") for op in all_ops()}
        # A bench with a measure of its own times whole steps on the CPU.
        queues = {op: bench.cases(True) for op, bench in benches.items() if not hasattr(bench, "measure")}
        while queues:  # one case of each op in turn, so that a cut leaves some of each
            for op in list(queues):
                case = next(queues[op], None)
                if case is None or session.left() <= 0:
                    del queues[op]
                    continue
                torch.manual_seed(0)
                problem = case.build()
                if session.dry:
                    if not small_enough(problem):
                        continue
                    del queues[op]
                done += 1
                red += time_case(session, op, case, to_device(problem, session.device))
    return f"{'red: ' if red else ''}{done} cases of {len(all_ops())} ops, {red} wrong results"


def time_case(session: Session, op: str, case: harness.Case, problem: harness.Problem) -> int:
    """The rows of one case; how many results of ours are wrong."""
    candidates = harness.providers(problem, False)
    if case.compile and not session.dry and problem.sliced is not None:
        compiled = torch.compile(copy.deepcopy(problem.sliced), dynamic=False)
        candidates["compile"] = harness.Provider(compiled, compiled, compiled, problem.inputs)
    red = 0
    for mode in ("forward", "full"):
        if mode not in case.modes:
            continue
        verdict = harness.gate(problem, candidates, mode)
        red += bool(verdict["slimkernels"])
        bound = session.bound(*work(candidates["plain"], mode), case.dtype)
        with torch.inference_mode(mode == "forward"):
            times = {
                name: session.milliseconds(harness.caller(p, mode))
                for name, p in candidates.items()
                if not verdict[name]
            }
        for name in candidates:
            ms = times.get(name)
            session.row(
                "ops",
                op=op,
                net=case.net,
                width=case.width,
                shape=case.shape,
                dtype=str(case.dtype).removeprefix("torch."),
                mode=mode,
                provider=name,
                gate=verdict[name] or "ok",
                ms=shown(session, ms),
                over_ours=ratio(ms, times.get("slimkernels")),
                roofline=ratio(bound, ms),
            )
    return red


def shown(session: Session, ms: float | None) -> str:
    return "" if ms is None else "dry" if session.dry else f"{ms:.4f}"


def ratio(a: float | None, b: float | None) -> str:
    known = a is not None and b is not None and a == a and b == b
    return f"{a / b:.3f}" if known else ""  # type: ignore[operator]


def network(session: Session, name: str) -> tuple[nn.Module, Tensor]:
    """An elastic network on the device, and a batch for it."""
    made, size = (DRY_NETWORKS if session.dry else NETWORKS)[name]
    batch = 2 if session.dry else 64
    torch.manual_seed(0)
    model = elastic.convert(made(), torch.randn(2, *size), widths=list(WIDTHS))
    return model.to(session.device), torch.randn(batch, *size, device=session.device)


def time_networks(session: Session) -> str:
    """Inference at each width: elastic, deployed, and the extracted plain network eager and compiled."""
    names = DRY_NETWORKS if session.dry else NETWORKS
    dtype = torch.float32 if session.dry else torch.bfloat16
    done = 0
    for name in names:
        model, x = network(session, name)
        model, x = model.eval().to(dtype), x.to(dtype).to(memory_format=torch.channels_last)
        for width in WIDTHS:
            if session.left() <= 0:
                break
            elastic.set_width(model, width)
            plain = elastic.extract(model, width).eval().to(memory_format=torch.channels_last)
            calls: dict[str, Any] = {"elastic": model, "plain": plain}
            calls["deployed"] = elastic.deploy(model, widths=[width])
            if not session.dry:
                calls["compile"] = torch.compile(plain, dynamic=False)
            with torch.inference_mode():
                expected = plain(x).float()
                times, off = {}, {}
                for provider, call in calls.items():
                    off[provider] = harness.error(call(x).float(), expected.double())
                    times[provider] = session.milliseconds(partial(call, x))
            for provider in calls:
                session.row(
                    "networks",
                    net=name,
                    width=width,
                    batch=len(x),
                    provider=provider,
                    apart_from_plain=f"{off[provider]:.1e}",
                    ms=shown(session, times[provider]),
                    over_elastic=ratio(times[provider], times["elastic"]),
                )
            done += 1
    return f"{done} networks and widths"


def time_training(session: Session) -> str:
    """A slimmable training step in bfloat16 against plain steps of the same widths, one after another."""
    name = next(iter(DRY_NETWORKS if session.dry else NETWORKS))
    model, x = network(session, name)
    with torch.no_grad():
        classes = model(x).shape[1]
    target = torch.randint(classes, (len(x),), device=session.device)
    loss = nn.functional.cross_entropy
    x = x.to(memory_format=torch.channels_last)
    amp = None if session.dry else "bf16"

    def plain_step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        with torch.autocast(session.device.type, torch.bfloat16, enabled=amp is not None):
            value = loss(net(x), target)
        value.backward()
        optimizer.step()

    plains = [elastic.extract(model, width).to(memory_format=torch.channels_last) for width in WIDTHS]
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3) for net in plains]
    own = torch.optim.SGD(model.parameters(), lr=1e-3)

    def slimmable() -> None:
        sandwich_step(model, (x, target), loss, own, widths=list(WIDTHS), distill=None, amp=amp)

    def separately() -> None:
        for net, optimizer in zip(plains, optimizers, strict=True):
            plain_step(net, optimizer)

    for provider, call in {"slimmable step, four widths": slimmable, "four plain steps": separately}.items():
        ms, mib = session.milliseconds(call, 3.0), session.memory(call)
        memory = "dry" if session.dry else f"{mib:.0f}"
        session.row("training", net=name, batch=len(x), provider=provider, ms=shown(session, ms), extra_mib=memory)
    return f"{name}, batch {len(x)}"


def time_generation(session: Session) -> str:
    """Every tensor of ResNet-50 generated in one call, with backward: time and memory."""
    from benchmarks import inr_resnet50 as inr
    from slimkernels.ops import InrParameters, inr_weights

    tensors, active = inr.target()
    hidden = 16 if session.dry else 256
    if session.dry:
        tensors, active = tensors[:2], active[:2]
    dtype = torch.float32 if session.dry else torch.bfloat16
    made = inr.parameters(len(tensors), 49, dtype, hidden)
    p = InrParameters(*(t.detach().to(session.device).requires_grad_() for t in made))

    def forward() -> list[Tensor]:
        return list(inr_weights(p, tensors, active, norm=2048.0, save="recompute", dtype=torch.float32))

    def both() -> None:
        weights = forward()
        torch.autograd.grad(weights, list(p), [torch.ones_like(w) for w in weights])

    for name, call in {"forward": forward, "forward and backward": both}.items():
        ms, mib = session.milliseconds(call, 2.0), session.memory(call)
        memory = "dry" if session.dry else f"{mib:.0f}"
        session.row("generation", what=name, tensors=len(tensors), ms=shown(session, ms), extra_mib=memory)
    return f"{len(tensors)} tensors"
