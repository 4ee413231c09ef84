"""Which nodes of a graph ``deploy`` runs itself, and as what."""

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

IMAGE, LINE, ROWS = 4, 3, 0  # (n, c, h, w), (n, c, l), (*, c)
_END = 2**62


@dataclass
class Op:
    """One operation, with what was fused into it."""

    kind: str
    node: fx.Node  # whose value it computes
    inputs: list[fx.Node]
    rank: int | None = None  # of the output; None: that of the first input
    input_rank: int | None = None  # where only one will do
    numbers: list[int] = field(default_factory=list)
    module: str = ""  # with the weights
    norm: str = ""  # folded batch norm
    activation: str = "none"
    residual: fx.Node | None = None

    @property
    def reads(self) -> list[fx.Node]:
        return [*self.inputs, *([] if self.residual is None else [self.residual])]


_MODULE_ACTIVATIONS = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}
_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
}
_METHODS = {"relu": "relu", "relu_": "relu", "tanh": "tanh", "sigmoid": "sigmoid"}
_SKIPPED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def is_skipped(module: nn.Module) -> bool:
    """Whether a layer gives back its input in eval mode."""
    return type(module) in _SKIPPED and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def as_op(node: fx.Node, root: nn.Module) -> Op | None:
    """The node as an operation of ours; None when PyTorch runs it."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        single = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
        return _of_module(node, module) if single and not _hooked(module) else None
    if node.op == "call_function":
        return _of_function(node)
    if node.op == "call_method":
        return _of_method(node)
    return None


def _of_module(node: fx.Node, module: Any) -> Op | None:
    x, name = node.args[0], str(node.target)
    assert isinstance(x, fx.Node)
    kind = type(module)
    if activation := _activation_of(module):
        return Op("activation", node, [x], activation=activation)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        plain = module.padding_mode == "zeros" and symmetric_padding(module) is not None
        rank = LINE if isinstance(module, nn.Conv1d) else IMAGE
        return Op("conv", node, [x], rank, rank, module=name) if plain and _owns(module) else None
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        rank = LINE if isinstance(module, nn.ConvTranspose1d) else IMAGE
        return Op("conv", node, [x], rank, rank, module=name) if _owns(module) else None
    if isinstance(module, nn.Linear):
        return Op("linear", node, [x], ROWS, ROWS, module=name) if _owns(module) else None
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)):
        rank2 = IMAGE if isinstance(module, nn.BatchNorm2d) else None
        return Op("affine", node, [x], rank2, rank2, module=name) if module.running_mean is not None else None
    if kind is nn.Flatten and module.start_dim == 1 and module.end_dim == -1:
        return Op("flatten", node, [x], ROWS)
    return _of_pool(node, x, module)


def _owns(module: nn.Module) -> bool:
    """Whether the weight is a parameter, not something computed (weight norm, parametrization)."""
    return module._parameters.get("weight") is not None


def _activation_of(module: Any) -> str:
    kind = type(module)
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if kind is nn.ELU:
        return "elu" if module.alpha == 1 else ""
    return _MODULE_ACTIVATIONS.get(kind, "")


def _of_pool(node: fx.Node, x: fx.Node, module: Any) -> Op | None:
    if isinstance(module, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)):
        rank = LINE if isinstance(module, nn.AdaptiveAvgPool1d) else IMAGE
        size = module.output_size
        ones = size == 1 or (isinstance(size, (tuple, list)) and all(s == 1 for s in size))
        return Op("global_pool", node, [x], rank, rank) if ones else None
    d = 1 if isinstance(module, (nn.MaxPool1d, nn.AvgPool1d)) else 2
    rank = LINE if d == 1 else IMAGE
    lead = [1] if d == 1 else []
    if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d)):
        kernel, stride, padding, dilation = (
            _spread(v, d) for v in (module.kernel_size, module.stride, module.padding, module.dilation)
        )
        if module.return_indices:
            return None
        zero = [0] if d == 1 else []
        numbers = [*lead, *kernel, *lead, *stride, *zero, *padding, *lead, *dilation, int(module.ceil_mode), 1]
        return Op("max_pool", node, [x], rank, rank, numbers)
    if isinstance(module, (nn.AvgPool1d, nn.AvgPool2d)):
        if getattr(module, "divisor_override", None) is not None:
            return None
        kernel, stride, padding = (_spread(v, d) for v in (module.kernel_size, module.stride, module.padding))
        zero = [0] if d == 1 else []
        last = [1, 1, int(module.ceil_mode), int(module.count_include_pad)]
        return Op("avg_pool", node, [x], rank, rank, [*lead, *kernel, *lead, *stride, *zero, *padding, *last])
    return None


def _spread(value: Any, dimensions: int) -> list[int]:
    return [value] * dimensions if isinstance(value, int) else list(value)


def _of_function(node: fx.Node) -> Op | None:
    target, args, kwargs = node.target, node.args, node.kwargs
    first = args[0] if args else None
    if target in (operator.add, operator.iadd, torch.add) and len(args) == 2 and not kwargs:
        if all(isinstance(a, fx.Node) for a in args):
            return Op("add", node, [a for a in args if isinstance(a, fx.Node)])
        return None
    if target is F.gelu and isinstance(first, fx.Node) and len(args) == 1:
        approximate = kwargs.get("approximate", "none")
        return Op("activation", node, [first], activation="gelu" if approximate == "none" else "gelu_tanh")
    if target in _FUNCTIONS and isinstance(first, fx.Node) and set(kwargs) <= {"inplace"} and len(args) <= 2:
        return Op("activation", node, [first], activation=_FUNCTIONS[target])
    if target is torch.cat:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        if isinstance(first, (list, tuple)) and all(isinstance(a, fx.Node) for a in first) and isinstance(dim, int):
            return Op("cat", node, [a for a in first if isinstance(a, fx.Node)], numbers=[dim])
    if target is torch.flatten and isinstance(first, fx.Node) and args[1:] == (1,) and not kwargs:
        return Op("flatten", node, [first], ROWS)
    if target in (F.adaptive_avg_pool2d, F.adaptive_avg_pool1d) and isinstance(first, fx.Node):
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        rank = IMAGE if target is F.adaptive_avg_pool2d else LINE
        return Op("global_pool", node, [first], rank, rank) if size in (1, (1, 1), [1, 1]) else None
    if target is operator.getitem and isinstance(first, fx.Node) and isinstance(args[1], tuple):
        return _of_slice(node, first, args[1])
    return None


def _of_slice(node: fx.Node, x: fx.Node, index: tuple) -> Op | None:
    """``x[..., a:b]`` or ``x[:, :, a:b]`` of three dimensions."""
    *before, last = index
    whole = slice(None, None, None)
    if not (before == [Ellipsis] or before == [whole, whole]) or not isinstance(last, slice):
        return None
    ends = [last.start, last.stop]
    if last.step not in (None, 1) or any(not isinstance(e, (int, type(None))) for e in ends):
        return None
    numbers = [0 if last.start is None else last.start, _END if last.stop is None else last.stop]
    return Op("narrow", node, [x], LINE, LINE, numbers)


def _of_method(node: fx.Node) -> Op | None:
    x, *rest = node.args
    if not isinstance(x, fx.Node) or node.kwargs:
        return None
    if node.target in _METHODS and not rest:
        return Op("activation", node, [x], activation=_METHODS[str(node.target)])
    if node.target == "flatten" and rest == [1]:
        return Op("flatten", node, [x], ROWS)
    if node.target in ("add", "add_") and len(rest) == 1 and isinstance(rest[0], fx.Node):
        return Op("add", node, [x, rest[0]])
    return None


def symmetric_padding(conv: Any) -> list[int] | None:
    """Padding of both ends as one number a dimension; None when they differ (``same`` of an even kernel)."""
    if not isinstance(conv.padding, str):
        return list(conv.padding)
    if conv.padding == "valid":
        return [0] * len(conv.kernel_size)
    totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(total % 2 for total in totals) else [total // 2 for total in totals]
