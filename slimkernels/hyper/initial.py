"""Where generated weights without a base start."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.elastic.trace import as_call
from slimkernels.hyper.generator import WeightGenerator, full_units

_LEAST = 1e-6


def reconstruct(
    generator: WeightGenerator, steps: int = 600, lr: float = 6e-3, *, block: int | None = None
) -> dict[str, float]:
    """Fit the coordinate networks to the target's own weights at full width, before any other training.

    Trained weights look like noise along their channels. A coordinate network learns them in hundreds of steps or not at
    all: a loss that asks for them beside the task finds its minimum at weights of zero first, and a residual branch that
    gives zero is hard to leave.

    Args:
        steps: of Adam, on all coordinates, without noise; the rate rises for a twentieth of them and falls as a cosine.
        block: of the generator's ``blocks``, the one to fit; None: all.

    Returns: by tensor, the squared distance to the target's weight over its squared norm; 1 is what zeros give.
    Raises: ValueError when the generator has a base, which holds those weights, or standardized weights.
    """
    if generator.base is not None or generator.standardized:
        what = "base='residual'" if generator.base is not None else "standardized weights"
        raise ValueError(f"reconstruct: expected a generator without base and not standardized, got {what}")
    parts = [generator._parts()[block]] if block is not None else generator._parts()
    originals = {name: w.detach().float() for name, w in generator.originals().items()}
    units = full_units(generator)
    optimizer = torch.optim.Adam([p for part in parts for p in part.parameters()], lr=lr)
    distances: dict[str, Tensor] = {}
    with torch.enable_grad():
        for step in range(steps + 1):
            distances = {}
            for part in parts:
                dtypes = [torch.float32] * len(part.names)
                made = part(units, None, dtypes, noise="none", seed=None, samples=1, first_sample=0)
                for name, w in made.items():
                    size = originals[name].square().sum().clamp(min=_LEAST)
                    distances[name] = (w - originals[name]).square().sum() / size
            if step == steps:
                break
            rate = min(1.0, (step + 1) / (0.05 * steps)) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(distances.values())).mean().backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {name: float(distance.detach()) for name, distance in distances.items()}


@torch.no_grad()
def match_outputs(generator: WeightGenerator, inputs: Any, last: float | None = None) -> dict[str, float]:
    """Scale generated weights so that every layer's output varies over a batch as much as the target's own, layer after
    layer at full width.

    Coordinate networks start as smooth functions: weights as large as trained ones, but with large sums (or, standardized,
    in step with their inputs), so that outputs explode or die from layer to layer where random weights would keep them.

    Args:
        inputs: a batch of real inputs.
        last: how much the output of the last layer that ran varies instead: little (0.25), so that a network trained from
            scratch is not sure of wrong answers at the start. None: as the target's.

    Returns: the factor of each layer.
    Raises: ValueError when the generator has a base, whose weights need no scaling.
    """
    if generator.base is not None:
        raise ValueError(f"match_outputs: expected a generator without base, got base={generator.base!r}")
    scales = {name: (part.factors(i), i) for part in generator._parts() for i, name in enumerate(part.names)}
    wanted: dict[str, float] = {}
    factors: dict[str, float] = {}

    def note(name: str, module: Any, output: Tensor) -> None:
        wanted[name] = _variation(output)

    def correct(name: str, module: Any, output: Tensor) -> Tensor:
        factor = wanted[name] / max(_variation(output), _LEAST)
        factors[name] = factor
        scale, i = scales[f"{name}.weight"]
        scale[i] *= factor
        if module.bias is None:
            return output * factor
        bias = module.bias.view(-1, *[1] * (module.weight.dim() - 2))
        if f"{name}.bias" in scales:
            scale, i = scales[f"{name}.bias"]
            scale[i] *= factor
            return output * factor
        return (output - bias) * factor + bias

    _run(generator.target, inputs, scales, note)
    if last is not None:
        wanted[list(wanted)[-1]] = last
    _run(generator.materialize(1.0), inputs, scales, correct)
    return factors


def _variation(output: Tensor) -> float:
    return float(output.float().std(0).mean())


def _run(model: nn.Module, inputs: Any, scales: dict[str, Any], call: Any) -> None:
    hooks = []
    for name, module in model.named_modules():
        if f"{name}.weight" in scales:
            hooks.append(module.register_forward_hook(lambda m, _, output, name=name: call(name, m, output)))
    args, kwargs = as_call(inputs)
    try:
        model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
