"""Where generated weights without a base start."""

from typing import Any

import torch
from torch import Tensor, nn

from slimkernels.elastic.trace import as_call
from slimkernels.hyper.generator import WeightGenerator

_LEAST = 1e-6


@torch.no_grad()
def match_outputs(generator: WeightGenerator, inputs: Any) -> dict[str, float]:
    """Scale generated weights so that every layer's output varies over a batch as much as the target's own, layer after
    layer at full width.

    Coordinate networks start as smooth functions: weights as large as trained ones, but with large sums, so that outputs
    explode or die from layer to layer where random weights would keep them.

    Args:
        inputs: a batch of real inputs.

    Returns: the factor of each layer.
    Raises: ValueError when the generator has a base, whose weights need no scaling.
    """
    if generator.base is not None:
        raise ValueError(f"match_outputs: expected a generator without base, got base={generator.base!r}")
    scales = {name: (part.scale, i) for part in generator._parts() for i, name in enumerate(part.names)}
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
