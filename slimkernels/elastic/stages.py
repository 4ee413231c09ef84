"""Which runs of blocks are stages of elastic depth. Every one is tried out on the example before it is believed."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels._copy import deep_copy
from slimkernels.elastic.attention import inference_path_off
from slimkernels.elastic.depth import make_skippable, remove, renumber, skip
from slimkernels.elastic.graph import Analysis
from slimkernels.elastic.layers import kind_of
from slimkernels.elastic.plan import Stage
from slimkernels.elastic.probe import Prober
from slimkernels.elastic.trace import one_line, run


class _Calls:
    """What went into each module and came out of it while the model ran on the example."""

    def __init__(self, model: nn.Module, example_inputs: Any, modules: Iterable[nn.Module]) -> None:
        self.of: dict[int, list[tuple[tuple, dict, Any]]] = {}

        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self.of.setdefault(id(module), []).append((args, kwargs, output))

        hooks = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
        try:
            with torch.no_grad(), inference_path_off():
                run(model, example_inputs)
        finally:
            for hook in hooks:
                hook.remove()

    def outputs(self, module: nn.Module) -> list[Any]:
        return [output for _, _, output in self.of.get(id(module), [])]

    def inputs(self, module: nn.Module) -> list[Any]:
        return [args[0] if args else None for args, _, _ in self.of.get(id(module), [])]

    def feeds(self, first: nn.Module, second: nn.Module) -> bool:
        """Whether what the first returns is what the second takes, every time."""
        given, taken = self.outputs(first), self.inputs(second)
        return bool(given) and len(given) == len(taken) and all(a is b for a, b in zip(given, taken, strict=True))

    def keeps_shape(self, module: nn.Module) -> bool:
        pairs = list(zip(self.inputs(module), self.outputs(module), strict=True))
        return bool(pairs) and all(
            isinstance(x, Tensor) and isinstance(y, Tensor) and (x.shape, x.dtype) == (y.shape, y.dtype)
            for x, y in pairs
        )

    def single_argument(self, module: nn.Module) -> bool:
        return all(len(args) == 1 and not kwargs for args, kwargs, _ in self.of.get(id(module), []))


@torch.no_grad()
def _is_residual(block: nn.Module, calls: _Calls) -> bool:
    """Whether the output follows the input when all weights are zero: there is a way around them."""
    if not calls.keeps_shape(block) or not any(p.dim() > 1 for p in block.parameters()):
        return False
    args, kwargs, _ = calls.of[id(block)][0]
    if not args[0].is_floating_point():
        return False
    block = deep_copy(block)
    for p in block.parameters():
        if p.dim() > 1:
            p.zero_()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(args[0].shape, generator=generator).to(args[0])
    try:
        outputs = [block(x, *args[1:], **kwargs) for x in (args[0].clone(), args[0] + noise)]
    except Exception:
        return False
    return not torch.equal(*outputs)


def find_stages(model: nn.Module, example_inputs: Any, ignored: Collection[str]) -> list[Stage]:
    """Runs of residual blocks of one class in the Sequentials and ModuleLists of an analysis copy, outermost first."""
    blocks = [child for container in model.modules() if _is_container(container) for child in container.children()]
    calls = _Calls(model, example_inputs, blocks)
    residual = {id(block): _is_residual(block, calls) for block in blocks if kind_of(block) is None}
    stages: list[Stage] = []
    _search(model, "", calls, residual, ignored, stages)
    return stages


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList))


def _search(
    module: nn.Module, name: str, calls: _Calls, residual: dict[int, bool], ignored: Collection[str], found: list[Stage]
) -> None:
    inside: set[str] = set()  # blocks of the stages of this container
    if _is_container(module):
        runs = _runs(module, calls, residual, {k for k in module._modules if _join(name, k) in ignored})
        for keys in runs:
            blocks = tuple(_join(name, key) for key in keys)
            found.append(Stage(name if len(runs) == 1 and name else blocks[0], blocks))
            inside.update(keys)
    for key, child in module.named_children():
        if key not in inside:
            _search(child, _join(name, key), calls, residual, ignored, found)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _runs(container: nn.Module, calls: _Calls, residual: dict[int, bool], ignored: set[str]) -> list[list[str]]:
    """Keys of the blocks of every stage: one of any kind of the same class, then residual ones, each fed by the last."""
    runs: list[list[str]] = []
    previous: nn.Module | None = None
    current: list[str] = []
    modules = {key: module for key, module in container._modules.items() if module is not None}
    shared = len({id(module) for module in modules.values()}) < len(modules)
    for key, block in modules.items() if not shared else ():
        # A Sequential of residual blocks is a stage, or a part of the network, and no block.
        nested = type(block) is nn.Sequential and any(residual.get(id(child), False) for child in block.children())
        fits = residual.get(id(block), False) and not nested and key not in ignored
        if not (fits and previous is not None and type(previous) is type(block) and calls.feeds(previous, block)):
            runs.append(current)
            current = []
        current.append(key)
        previous = block
    return [keys for keys in [*runs, current] if len(keys) > 1]


def usable_stages(
    model: nn.Module, example_inputs: Any, analysis: Analysis, stages: list[Stage]
) -> tuple[list[Stage], list[str]]:
    """The stages whose blocks can be skipped at the example input, at full and at reduced widths; and notes on the
    others."""
    calls = _Calls(model, example_inputs, [model.get_submodule(name) for stage in stages for name in stage.blocks])
    with torch.no_grad():
        full = run(model, example_inputs)
    accepted: list[Stage] = []
    notes: list[str] = []
    for stage in stages:
        candidate = _with_removal(model, example_inputs, stage, calls)
        if isinstance(candidate, Stage):
            candidate = _tried([*accepted, candidate], model, example_inputs, analysis, full) or candidate
        if isinstance(candidate, Stage):
            accepted.append(candidate)
        else:
            notes.append(f"the depth of {stage.name} stays: {candidate}")
    return accepted, notes


def _tried(
    stages: list[Stage], model: nn.Module, example_inputs: Any, analysis: Analysis, full: list[Tensor]
) -> str | None:
    """Why the last stage cannot be skipped together with those before, or None."""
    prober = Prober(model, example_inputs, analysis, permutes=True)
    pair = prober.single
    pair.plain = deep_copy(model)  # the analysis copy itself gets no switches
    for twin in (pair.plain, pair.elastic):
        make_skippable(twin, stages)
    for some in ([stages[-1]], stages):
        for keep in (1, 2):
            skipped = {name for stage in some for name in stage.blocks[keep:]}
            for twin in (pair.plain, pair.elastic):
                skip(twin, stages, skipped)
            prober.__dict__.pop("double", None)
            try:
                with torch.no_grad():
                    pair.full = run(pair.plain, example_inputs)
            except Exception as error:
                return f"the network does not run without its blocks ({one_line(error)})"
            if [y.shape for y in pair.full] != [y.shape for y in full]:
                return "the output has another shape without its blocks"
            for fractions in ((0.5,), (0.25, 0.75), (0.75, 0.5, 0.25)):
                reason = prober._wrong(list(analysis.groups), fractions)
                if reason is not None:
                    return reason
    return None


@torch.no_grad()
def _with_removal(model: nn.Module, example_inputs: Any, stage: Stage, calls: _Calls) -> Stage | str:
    """The stage, with the way in which ``extract`` takes its blocks out; or why there is none."""
    skipped = stage.blocks[1:]
    twin = deep_copy(model)
    make_skippable(twin, [stage])
    skip(twin, [stage], skipped)
    try:
        expected = run(twin, example_inputs)
        twin = deep_copy(model)
        remove(twin, [stage], skipped)
        renumber(twin, [stage])
        actual = run(twin, example_inputs)
        if len(actual) == len(expected) and all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)):
            return stage
    except Exception as error:
        reason = one_line(error)
    else:
        reason = "without them the network computes something else"
    if all(calls.single_argument(model.get_submodule(name)) for name in skipped):
        return Stage(stage.name, stage.blocks, removable=False)
    return f"its blocks cannot be taken out ({reason})"
