"""Batch norms folded into the layers before them, or replaced in residual branches: generated weights need no
statistics then."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from slimkernels._copy import deep_copy
from slimkernels.elastic.trace import as_call

STRATEGIES = ("fold", "skipinit", "scaled_sum", "learned_scalar", "keep")
_FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BatchNorm = nn.modules.batchnorm._BatchNorm


class Scale(nn.Module):
    """Multiplies by one number, learned or fixed."""

    def __init__(self, value: float, learned: bool = True) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(value)), requires_grad=learned)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha

    def extra_repr(self) -> str:
        return f"{self.alpha.item():g}, learned={self.alpha.requires_grad}"


def fold_batch_norm(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A copy of ``model`` that computes in evaluation mode what ``model`` does, with batch norms folded into the layers
    whose output they take.

    A folded batch norm becomes ``nn.Identity``. One that follows no Linear or convolution stays.

    Raises: ValueError when the model is elastic, has no batch norm to fold, or computes something else when folded.
    """
    return replace_batch_norm(model, example_inputs, "fold")


@torch.no_grad()
def replace_batch_norm(
    model: nn.Module, example_inputs: Any, strategy: str = "fold", *, value: float | None = None
) -> nn.Module:
    """A copy of ``model`` without the batch norms that can be folded, its residual sums kept in bounds another way.

    | strategy         | the end of a residual branch f(x) becomes |
    |------------------|-------------------------------------------|
    | `fold`           | f(x): the function of ``model`` in evaluation mode |
    | `skipinit`       | alpha f(x), alpha learned and 0 at the start |
    | `learned_scalar` | alpha f(x), alpha learned and 1 at the start |
    | `scaled_sum`     | (x + f(x)) / sqrt(2) |
    | `keep`           | nothing is changed |

    Args:
        example_inputs: as for ``elastic.convert``: what the model is run on to see which layer feeds which.
        value: alpha at the start, instead of the table's.

    Raises: ValueError when the strategy is unknown, the model is elastic, there is nothing to fold, the folded model
        computes something else, or a strategy for residual sums finds none that it can change.
    Source: De and Smith, Batch Normalization Biases Residual Blocks (arXiv 2002.10444); arXiv 2505.05510.
    """
    if strategy not in STRATEGIES:
        raise ValueError(
            f"replace_batch_norm: expected strategy to be one of {', '.join(STRATEGIES)}, got {strategy!r}"
        )
    if "_elastic" in model.__dict__:
        raise ValueError(
            "replace_batch_norm: expected a plain model (replace batch norms before convert), got an elastic one"
        )
    made = deep_copy(model)
    if strategy == "keep":
        return made
    modes = {name: module.training for name, module in made.named_modules()}
    made.eval()
    flow = _Flow(made)
    args, kwargs = as_call(example_inputs)
    expected = flow.run(args, kwargs)
    pairs = flow.pairs
    if not pairs:
        raise ValueError(
            "replace_batch_norm: expected a model with batch norms after Linear or convolution layers, got none of them"
        )
    for norm, layer in pairs.items():
        _fold(made, norm, layer)
    _check_same(expected, made(*args, **kwargs))
    if strategy != "fold":
        _residual_ends(made, flow, strategy, value)
    for name, module in made.named_modules():
        module.training = modes.get(name, modes[""])
    return made


def _fold(model: nn.Module, norm_name: str, layer_name: str) -> None:
    norm: Any = model.get_submodule(norm_name)
    layer: Any = model.get_submodule(layer_name)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double() * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    if layer.bias is not None:
        bias = bias + layer.bias.double() * scale
    weight = layer.weight
    if isinstance(layer, _TRANSPOSED):  # (in, out / groups, ...)
        shaped = scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight.copy_((weight.double().unflatten(0, (layer.groups, -1)) * shaped).flatten(0, 1))
    else:
        weight.copy_(weight.double() * scale.view(-1, *[1] * (weight.dim() - 1)))
    layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)
    _replace(model, norm_name, nn.Identity())


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def _residual_ends(model: nn.Module, flow: "_Flow", strategy: str, value: float | None) -> None:
    ends = [end for end in flow.sums if end[0] in flow.pairs]
    if not ends:
        raise ValueError(
            f"replace_batch_norm: expected residual branches that end in a batch norm for {strategy!r}, got none"
        )
    for branch, shortcut in ends:
        if strategy != "scaled_sum":
            start = (0.0 if strategy == "skipinit" else 1.0) if value is None else value
            _replace(model, branch, Scale(start))
            continue
        if shortcut is None:
            raise ValueError(
                f"replace_batch_norm: expected a module for the shortcut beside {branch!r} with 'scaled_sum', got a plain"
                " tensor; use 'skipinit' or 'learned_scalar'"
            )
        half = 1 / math.sqrt(2) if value is None else value
        _replace(model, branch, Scale(half, learned=False))
        kept = model.get_submodule(shortcut)
        scale = Scale(half, learned=False)
        _replace(model, shortcut, scale if isinstance(kept, nn.Identity) else nn.Sequential(kept, scale))


class _Flow(TorchFunctionMode):
    """Runs a model once and notes which layer's output a batch norm takes, and which tensors are added."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.pairs: dict[str, str] = {}  # batch norm -> the layer before it
        self.sums: list[tuple[str, str | None]] = []  # batch norm at the end of a branch, module of the shortcut
        self._kept: list[Any] = []  # tensors stay alive, so that an id means one tensor
        self._layer: dict[int, str] = {}  # id of a tensor -> the layer that made it
        self._norm: dict[int, str] = {}  # ... -> the batch norm that made it
        self._made_by: dict[int, list[str]] = {}  # ... -> modules whose output it is
        self._depth: dict[int, int] = {}  # ... -> layers on the longest way to it

    def run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        hooks = [module.register_forward_hook(self._hook(name)) for name, module in self.model.named_modules()]
        try:
            with self:
                return self.model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            self._kept.append(output)
            self._made_by.setdefault(id(output), []).append(name)
            if isinstance(module, (*_FOLDABLE, *_TRANSPOSED)):
                self._layer[id(output)] = name
            elif isinstance(module, _BatchNorm):
                layer = self._layer.get(id(inputs[0]))
                if layer is not None and module.running_mean is not None and layer not in self.pairs.values():
                    self.pairs[name] = layer
                self._norm[id(output)] = name

        return hook

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        inputs = [a for a in args if isinstance(a, Tensor)]
        if not isinstance(output, Tensor) or not inputs:
            return output
        name = getattr(func, "__name__", "")
        if name in ("add", "add_", "__add__", "__iadd__", "__radd__") and len(inputs) == 2:
            self._note_sum(*inputs)
        self._kept += [output, *inputs]
        depth = max(self._depth.get(id(t), 0) for t in inputs)
        mixes = name.startswith("conv") or name == "linear"
        self._depth[id(output)] = depth + 1 if mixes else depth
        return output

    def _note_sum(self, a: Tensor, b: Tensor) -> None:
        if self._depth.get(id(b), 0) > self._depth.get(id(a), 0):
            a, b = b, a
        branch = self._norm.get(id(a))
        if branch is None:
            return
        block = branch.rpartition(".")[0]
        inside = [name for name in self._made_by.get(id(b), []) if name.startswith(block + ".")]
        # The outermost module inside the block whose output it is: of a Sequential, not its last layer.
        self.sums.append((branch, min(inside, key=lambda n: n.count("."), default=None)))


def _check_same(expected: Any, actual: Any) -> None:
    for a, b in zip(_tensors(expected), _tensors(actual), strict=True):
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max())):
            raise ValueError(
                "replace_batch_norm: expected the folded model to compute the same, got another output: a layer before a"
                " batch norm is used in another place too"
            )


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]
