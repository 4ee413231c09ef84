"""What the converter knows of each torch layer: which of its dimensions can be sliced, and which tensors have them.

A *side* names a sliced dimension of a module: ``in`` and ``out`` of the layers that mix channels, ``ch`` of those that
keep them (norms, PReLU), ``param:<axis>:<name>`` of a plain parameter, ``number:<name>`` of a size that a module keeps;
those of recurrent layers are in ``recurrent.py``, those of attention layers in ``attention.py``.
"""

from dataclasses import dataclass
from functools import cache

from torch import nn

from slimkernels import nn as slim
from slimkernels.elastic import attention, recurrent


@dataclass(frozen=True)
class LayerKind:
    """One torch class: its sides and, per parameter or buffer, the side that each of its axes belongs to."""

    torch_class: type[nn.Module]
    sizes: dict[str, str]  # side -> attribute with its full size
    axes: dict[str, dict[int, str]]  # tensor name -> {axis: side}
    slim_name: str = ""  # class in slimkernels.nn that runs it at any width; "" when only its tensors are sliced

    @property
    def sides(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @property
    def mixes(self) -> bool:
        """Whether the layer multiplies by a weight matrix (and so ends one group of channels and starts another)."""
        return "out" in self.sizes and "in" in self.sizes


_LINEAR = {"in": "in_features", "out": "out_features"}
_CONV = {"in": "in_channels", "out": "out_channels"}
_CHANNELS = {"weight": {0: "ch"}, "bias": {0: "ch"}}
_STATISTICS = {"running_mean": {0: "ch"}, "running_var": {0: "ch"}}


@cache
def kinds() -> tuple[LayerKind, ...]:
    """Every layer that can be slimmed, most derived class first."""
    found = [LayerKind(nn.Linear, _LINEAR, {"weight": {0: "out", 1: "in"}, "bias": {0: "out"}}, "SlimLinear")]
    for d in (1, 2, 3):
        conv, transposed, norm = (getattr(nn, f"{name}{d}d") for name in ("Conv", "ConvTranspose", "BatchNorm"))
        found.append(LayerKind(conv, _CONV, {"weight": {0: "out", 1: "in"}, "bias": {0: "out"}}, f"SlimConv{d}d"))
        found.append(
            LayerKind(transposed, _CONV, {"weight": {0: "in", 1: "out"}, "bias": {0: "out"}}, f"SlimConvTranspose{d}d")
        )
        found.append(LayerKind(norm, {"ch": "num_features"}, _CHANNELS | _STATISTICS, f"SlimBatchNorm{d}d"))
        instance = getattr(nn, f"InstanceNorm{d}d")
        found.append(LayerKind(instance, {"ch": "num_features"}, _CHANNELS, f"SlimInstanceNorm{d}d"))
    found.append(LayerKind(nn.SyncBatchNorm, {"ch": "num_features"}, _CHANNELS | _STATISTICS, "SlimSyncBatchNorm"))
    found.append(LayerKind(nn.LayerNorm, {"ch": "normalized_shape"}, _CHANNELS, "SlimLayerNorm"))
    found.append(LayerKind(nn.RMSNorm, {"ch": "normalized_shape"}, {"weight": {0: "ch"}}, "SlimRMSNorm"))
    found.append(LayerKind(nn.GroupNorm, {"ch": "num_channels"}, _CHANNELS, "SlimGroupNorm"))
    found.append(LayerKind(nn.Embedding, {"out": "embedding_dim"}, {"weight": {1: "out"}}, "SlimEmbedding"))
    for layer in (*recurrent.LAYERS, *recurrent.CELLS):
        found.append(LayerKind(layer, recurrent.SIDES, {}, f"Slim{layer.__name__}"))
    found.append(LayerKind(nn.LSTM, recurrent.PROJECTED, {}, "SlimLSTM"))
    found.append(LayerKind(nn.MultiheadAttention, attention.SIDES, {}, "SlimMultiheadAttention"))
    found.append(LayerKind(nn.PReLU, {"ch": "num_parameters"}, {"weight": {0: "ch"}}))
    return tuple(found)


NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
CONVS = (nn.modules.conv._ConvNd,)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
TAKES_IN = ("in", "key", "value", "state", "next", "cell")  # sides whose inactive entries have to see zeros
TRANSPOSED = (nn.modules.conv._ConvTransposeNd,)


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a module, a user's subclass included; None when it cannot be sliced."""
    projected = isinstance(module, RECURRENT) and recurrent.projection(module) > 0
    for kind in kinds():
        if ("cell" in kind.sizes) != projected:
            continue
        if isinstance(module, kind.torch_class):
            return kind
        # These extend torch's base class only.
        if isinstance(module, (*RECURRENT, slim.SlimSyncBatchNorm)) and isinstance(module, slim_class(kind) or ()):
            return kind
    return None


def full_size(module: nn.Module, kind: LayerKind, side: str) -> int:
    if isinstance(module, RECURRENT):
        return recurrent.size_of(module, side)
    if isinstance(module, attention.ATTENTION):
        return attention.size_of(module, side)
    size = getattr(module, kind.sizes[side])
    return size[0] if isinstance(size, tuple) else size


def tensor_axes(module: nn.Module, kind: LayerKind) -> dict[str, dict[int, str]]:
    """Tensor name -> {axis: side} of this very module: a grouped convolution's inner axis is never cut."""
    if isinstance(module, RECURRENT):
        return recurrent.axes_of(module)
    if isinstance(module, attention.ATTENTION):
        return attention.axes_of(module)
    if getattr(module, "groups", 1) > 1:
        outer = "in" if isinstance(module, TRANSPOSED) else "out"
        return {"weight": {0: outer}, "bias": {0: "out"}}
    return kind.axes


def slim_class(kind: LayerKind) -> type | None:
    """The slimmable class, or None where there is none (yet)."""
    return getattr(slim, kind.slim_name, None) if kind.slim_name else None


def reason_not_slimmable(module: nn.Module) -> str | None:
    """Why this one layer cannot run at another width, or None when it can."""
    kind = kind_of(module)
    if kind is None:
        return f"{type(module).__name__} layers are not sliced"
    cls = type(module)
    if kind.slim_name and slim_class(kind) is None:
        return f"there is no slimmable {kind.torch_class.__name__}"
    if cls is not kind.torch_class:
        for method in ("forward", "_conv_forward", "__call__"):
            if getattr(cls, method, None) is not getattr(kind.torch_class, method, None):
                return f"{cls.__name__} has a {method} of its own"
    for name in tensor_axes(module, kind):
        if getattr(module, name, None) is not None and name not in module._parameters and name not in module._buffers:
            return f"its {name} is computed (call remove_parametrizations or remove_weight_norm before convert)"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
        return "it keeps running statistics"
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) != 1:
        return "it normalises over several dimensions"
    if isinstance(module, attention.ATTENTION) and (reason := reason_not_slimmable(module.out_proj)) is not None:
        return f"of its out_proj: {reason}"
    return None
