"""The steps of ``make gpu`` that time: every op against its peers, networks, training, deployment, generated weights."""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness, run, shapes
from benchmarks.gpu import order
from benchmarks.gpu.session import Samples, Session, median
from slimkernels import elastic, models
from slimkernels.train import sandwich_step

WIDTHS = (0.25, 0.5, 0.75, 1.0)
GPU_MACS, GPU_ELEMENTS = 2**36, 2**28  # of one call: the batches of op-shapes.csv as they are
DRY_LIMITS, DRY_PARAMETERS = (2**16, 2**16), 2_000_000
BATCH = 64  # of the networks
CASE_S = 0.02  # of timing an op's provider: a long run is for more cases, and not for better numbers of the first
# Whole networks and steps have steps of their own here.
NOT_OPS = ("deploy", "training_step")
RECURRENT = ("slim_lstm", "slim_gru")  # PyTorch counts no operations of cuDNN's recurrent layers
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet50": (models.resnet50, (3, 224, 224)),
    "mobilenet_v2": (models.mobilenet_v2, (3, 224, 224)),
    "vit_small": (models.vit_small, (3, 224, 224)),
}
DRY_NETWORK: tuple[Callable[[], nn.Module], tuple[int, ...]] = (models.cifar_resnet20, (3, 16, 16))


def ops() -> list[str]:
    return [op for op in run.ops() if op not in NOT_OPS]


def to_device(problem: harness.Problem, device: torch.device) -> harness.Problem:
    """All but the peers of inference, which are the CPU's (oneDNN's packed layers)."""
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
    """FLOPs of the plain module, and the least bytes: forward reads inputs and parameters and writes outputs; backward
    reads those and the outputs' gradients and writes the gradients of inputs and parameters."""
    module = copy.deepcopy(provider.module).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = harness.outputs(module(*(t.detach() for t in provider.inputs)))

    def count(tensors: list[Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    read, written = count([*provider.inputs, *module.parameters()]), count(out)
    if mode == "forward":
        return counter.get_total_flops(), read + written
    return 3 * counter.get_total_flops(), 3 * read + 2 * written


@contextlib.contextmanager
def limits(macs: int, elements: int) -> Iterator[None]:
    """Within it the batches of the shapes are cut to these, and not to those of a CPU."""
    kept = shapes.MAX_MACS, shapes.MAX_ELEMENTS
    shapes.MAX_MACS, shapes.MAX_ELEMENTS = macs, elements
    try:
        yield
    finally:
        shapes.MAX_MACS, shapes.MAX_ELEMENTS = kept


def small_enough(problem: harness.Problem) -> bool:
    """For a dry run: tiny parameters and inputs."""
    tensors = [*problem.inputs, *problem.ours.parameters()]
    return sum(t.numel() for t in tensors) < DRY_PARAMETERS


def precision(op: str, dtype: torch.dtype) -> str:
    """In which precision the products of this op are done: what PyTorch's switches say."""
    if dtype != torch.float32:
        return str(dtype).removeprefix("torch.")
    cudnn: Any = torch.backends.cudnn
    switch = cudnn.conv if "conv" in op else cudnn.rnn if op in RECURRENT else torch.backends.cuda.matmul
    return "tf32" if switch.fp32_precision == "tf32" else "float32"


def time_ops(session: Session) -> str:
    """All ops at the shapes of op-shapes.csv and the INR workloads, the most telling first; a provider whose numbers are
    wrong gets no time. Dry: one small case of each op."""
    if session.part[1] == 1 and not (session.out / "plan.csv").exists():
        with limits(GPU_MACS, GPU_ELEMENTS):
            counts = Counter((item.op, item.compiled) for item in order.items(ops()))
        for op in ops():
            session.row("plan", op=op, cases=counts[op, False], compiled=counts[op, True])
    with limits(*DRY_LIMITS) if session.dry else limits(GPU_MACS, GPU_ELEMENTS):
        number, parts = session.part
        done = set[str]()
        for item in order.items(ops())[number::parts]:
            if session.left() <= 0:
                return f"cut: no time for {item.name} and what follows"
            if session.dry and (item.compiled or item.op in done):
                continue
            if not session.todo(item.name):
                done.add(item.op)
                continue
            if session.dry and not small_enough(item.case.build()):
                continue
            with session.item(item.name):
                time_item(session, item)
            done.add(item.op)
            if not session.dry:
                torch.cuda.empty_cache()
    return ""


def time_item(session: Session, item: order.Item) -> None:
    """The rows of one case. An error where a result of ours is wrong."""
    case, op = item.case, item.op
    torch.manual_seed(0)
    with torch.device(session.device):  # numbers are drawn there: gigabytes would take seconds on the CPU
        problem = to_device(case.build(), session.device)
    candidates = harness.providers(problem, False)
    timed = list(candidates)
    if item.compiled:
        assert problem.sliced is not None
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(problem.sliced), dynamic=False)
        candidates["compile"] = harness.Provider(compiled, compiled, compiled, problem.inputs)
        timed = ["slimkernels", "compile"]  # ours once more: a ratio is of one moment
    products = precision(op, case.dtype)
    wrong, rows = [], []
    for mode in ("forward", "full"):
        if mode not in case.modes:
            continue
        with tf32_floor(products):
            warm = session.how == "warm"
            verdict = dict.fromkeys(candidates, "") if warm else harness.gate(problem, candidates, mode)
        bound = session.bound(*work(candidates["plain"], mode), products) if op not in RECURRENT else float("nan")
        times = in_turns(session, {name: candidates[name] for name in timed if not verdict[name]}, mode)
        if verdict["slimkernels"]:
            wrong.append(f"{mode}: {verdict['slimkernels']}")
        ours = times.get("slimkernels")
        for name in ["compile"] if item.compiled else timed:
            own = times.get(name)
            rows.append(
                dict(
                    op=op,
                    net=case.net,
                    width=case.width,
                    shape=case.shape,
                    dtype=str(case.dtype).removeprefix("torch."),
                    products=products,
                    mode=mode,
                    provider=name,
                    gate=verdict[name] or "ok",
                    ms=shown(session, own and own[0]),
                    over_ours=ratio(own and own[0], ours and ours[0]),
                    back_to_back_ms=shown(session, own and own[1]),
                    back_to_back_over_ours=ratio(own and own[1], ours and ours[1]),
                    roofline=ratio(bound, own and own[0]),
                )
            )
    for row in rows:  # at once: a case that was cut off has none, and is timed again
        session.row("ops", **row)
    if wrong:
        raise ArithmeticError("; ".join(wrong))


def in_turns(session: Session, providers: dict[str, harness.Provider], mode: str) -> dict[str, tuple[float, float]]:
    """Medians of each, of half the samples from there to here and of the others back: a GPU's clock needs a while."""
    found: dict[str, Samples] = {name: ([], []) for name in providers}
    with torch.inference_mode(mode == "forward"):
        calls = {name: harness.caller(provider, mode) for name, provider in providers.items()}
        for name in [*calls, *reversed(calls)] if session.how == "timed" else calls:
            for kept, new in zip(found[name], session.samples(calls[name], CASE_S / 2), strict=True):
                kept += new
    return {name: (median(cold), median(behind)) for name, (cold, behind) in found.items()}


@contextlib.contextmanager
def tf32_floor(products: str) -> Iterator[None]:
    """Products in tf32 have ten bits, whichever of them PyTorch does exactly."""
    kept = harness.FLOOR[torch.float32]
    harness.FLOOR[torch.float32] = 1e-3 if products == "tf32" else kept
    try:
        yield
    finally:
        harness.FLOOR[torch.float32] = kept


def shown(session: Session, ms: float | None) -> str:
    return "" if ms is None else "dry" if session.dry else f"{ms:.4f}"


def ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.3f}" if a is not None and b is not None and a == a and b == b else ""


def network(session: Session, name: str) -> tuple[nn.Module, Tensor]:
    """An elastic network on the device, and a batch for it, both channels-last."""
    made, size = DRY_NETWORK if session.dry else NETWORKS[name]
    batch = 2 if session.dry else BATCH
    torch.manual_seed(0)
    model = elastic.convert(made(), torch.randn(2, *size), widths=list(WIDTHS))
    x = torch.randn(batch, *size, device=session.device)
    layout = torch.channels_last
    return model.to(session.device, memory_format=layout), x.to(memory_format=layout)


def time_network(session: Session, name: str) -> str:
    """Inference at each width: elastic, deployed, and the extracted plain network eager and compiled."""
    dtype = torch.float32 if session.dry else torch.bfloat16
    model, x = network(session, name)
    model, x = model.eval().to(dtype), x.to(dtype)
    for width in WIDTHS:
        if session.todo(str(width)):
            with session.item(str(width)):
                time_network_at(session, name, model, x, width)
        if not session.dry and session.todo(f"{width} in a graph"):
            with session.item(f"{width} in a graph"):
                time_graph(session, name, model, x, width)
    return ""


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` in a CUDA graph, which repeats what the GPU did without the CPU's part. It ran before on another stream, as
    PyTorch asks for; the result is the same tensors each time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def time_graph(session: Session, name: str, model: nn.Module, x: Tensor, width: float) -> None:
    """The elastic network in a CUDA graph, which must give what it gives without."""
    elastic.set_width(model, width)
    with torch.inference_mode():
        expected, replay = model(x).double(), captured(partial(model, x))
        off = harness.error(replay(), expected)
        ms = session.milliseconds(replay)
    values = {"net": name, "width": width, "batch": len(x), "provider": "elastic, in a graph"}
    session.row("networks", **values, apart_from_plain="", ms=shown(session, ms), over_elastic="")
    if not off < 1e-3:
        raise ArithmeticError(f"{off:.1e} apart from the same network outside a graph")


def time_network_at(session: Session, name: str, model: nn.Module, x: Tensor, width: float) -> None:
    elastic.set_width(model, width)
    plain = elastic.extract(model, width).eval().to(memory_format=torch.channels_last)
    calls: dict[str, Any] = {"elastic": model, "plain": plain, "deployed": elastic.deploy(model, widths=[width])}
    if not session.dry:
        torch._dynamo.reset()
        calls["compile"] = torch.compile(plain, dynamic=False)
    with torch.inference_mode():
        expected = plain(x).double()
        off, times = {}, {}
        for provider, call in calls.items():
            off[provider] = harness.error(call(x), expected)
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


def time_training(session: Session) -> str:
    """A slimmable training step in bfloat16 against plain steps of the same widths, one after another."""
    name = next(iter(NETWORKS))
    model, x = network(session, name)
    with torch.no_grad():
        classes = model(x).shape[1]
    target = torch.randint(classes, (len(x),), device=session.device)
    loss = nn.functional.cross_entropy
    amp = None if session.dry else "bf16"

    def plain_step(net: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        with torch.autocast(session.device.type, torch.bfloat16, enabled=amp is not None):
            value = loss(net(x), target)
        value.backward()
        optimizer.step()

    def separately(name: str, compiled: bool) -> Callable[[], None]:
        plains = [elastic.extract(model, width).to(memory_format=torch.channels_last) for width in WIDTHS]
        optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3) for net in plains]
        called = [torch.compile(net, dynamic=False) if compiled else net for net in plains]
        for net, optimizer in zip(called, optimizers, strict=True):
            plain_step(net, optimizer)
            session.progress.start(name)  # a sign of life: each is compiled in a minute or so

        def steps() -> None:
            for net, optimizer in zip(called, optimizers, strict=True):
                plain_step(net, optimizer)

        return steps

    def slimmable() -> Callable[[], None]:
        own = torch.optim.SGD(model.parameters(), lr=1e-3)
        return lambda: sandwich_step(model, (x, target), loss, own, widths=list(WIDTHS), distill=None, amp=amp) and None

    providers = {"slimmable step, four widths": slimmable}
    for provider, compiled in {"four plain steps": False, "four plain steps, compiled": True}.items():
        if not (session.dry and compiled):
            providers[provider] = partial(separately, provider, compiled)
    for provider, make in providers.items():
        if session.todo(provider):
            with session.item(provider):
                torch._dynamo.reset()
                call = make()
                call()  # allocates what the optimizers keep
                ms, mib = session.milliseconds(call, 2.0), session.memory(call)
                memory = "dry" if session.dry else f"{mib:.0f}"
                session.row(
                    "training", net=name, batch=len(x), provider=provider, ms=shown(session, ms), extra_mib=memory
                )
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
        if session.todo(name):
            with session.item(name):
                ms, mib = session.milliseconds(call, 1.0), session.memory(call)
                memory = "dry" if session.dry else f"{mib:.0f}"
                session.row("generation", what=name, tensors=len(tensors), ms=shown(session, ms), extra_mib=memory)
    return f"{len(tensors)} tensors"
