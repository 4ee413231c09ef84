"""Slimmable layer, RMS and group norm; batch norm is in ``batch_norm.py``."""

import math

from torch import Tensor, nn

from slimkernels.nn._base import SlimModule
from slimkernels.ops._common import check_activation
from slimkernels.ops.slim_group_norm import slim_group_norm
from slimkernels.ops.slim_layer_norm import slim_layer_norm
from slimkernels.ops.slim_rms_norm import slim_rms_norm


class _Norm(SlimModule):
    """A norm on as many leading features as its input has; ``set_width`` only tells others the width."""

    def _init_norm(self, features: int, activation: str) -> None:
        check_activation(type(self).__name__, activation)
        self.activation = activation
        self._init_width(features)

    def _active(self, parameter: Tensor | None) -> Tensor | None:
        """The parameter, gathered when the active features are no leading slice (``in_index``)."""
        if parameter is None or self.in_index is None:
            return parameter
        return parameter.index_select(0, self.in_index)


def _one_dimension(name: str, shape: int | list[int] | tuple[int, ...]) -> int:
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if len(sizes) != 1:
        raise ValueError(f"{name}: expected normalized_shape of one dimension, got {sizes}")
    return math.prod(sizes)


class SlimLayerNorm(_Norm, nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension, on its first features; see ``slimkernels.ops.slim_layer_norm``.

    Args:
        activation: name of a fused activation, applied last; ``forward(x, residual)`` adds the residual before it.
    """

    def __init__(self, normalized_shape, *args, activation: str = "none", **kwargs) -> None:
        features = _one_dimension("SlimLayerNorm", normalized_shape)
        super().__init__(normalized_shape, *args, **kwargs)
        self._init_norm(features, activation)

    def forward(
        self,
        x: Tensor,  # (*, c)
        residual: Tensor | None = None,  # (*, c)
    ) -> Tensor:  # (*, c)
        weight, bias = self._active(self.weight), self._active(self.bias)
        return slim_layer_norm(x, weight, bias, eps=self.eps, activation=self.activation, residual=residual)


class SlimRMSNorm(_Norm, nn.RMSNorm):
    """``nn.RMSNorm`` over the last dimension, on its first features; see ``slimkernels.ops.slim_rms_norm``.

    Args:
        activation: name of a fused activation, applied last; ``forward(x, residual)`` adds the residual before it.
    """

    def __init__(self, normalized_shape, *args, activation: str = "none", **kwargs) -> None:
        features = _one_dimension("SlimRMSNorm", normalized_shape)
        super().__init__(normalized_shape, *args, **kwargs)
        self._init_norm(features, activation)

    def forward(
        self,
        x: Tensor,  # (*, c)
        residual: Tensor | None = None,  # (*, c)
    ) -> Tensor:  # (*, c)
        weight = self._active(self.weight)
        return slim_rms_norm(x, weight, eps=self.eps, activation=self.activation, residual=residual)


class SlimGroupNorm(_Norm, nn.GroupNorm):
    """``nn.GroupNorm`` that keeps the size of its groups: fewer channels, fewer groups; see ``slim_group_norm``.

    Args:
        activation: name of a fused activation, applied last; ``forward(x, residual)`` adds the residual before it.
    """

    def __init__(self, num_groups: int, num_channels: int, *args, activation: str = "none", **kwargs) -> None:
        super().__init__(num_groups, num_channels, *args, **kwargs)
        self._init_norm(num_channels, activation)

    @property
    def group_size(self) -> int:
        return self.num_channels // self.num_groups

    def forward(
        self,
        x: Tensor,  # (N, c, *)
        residual: Tensor | None = None,  # (N, c, *)
    ) -> Tensor:  # (N, c, *)
        return slim_group_norm(
            x,
            self._active(self.weight),
            self._active(self.bias),
            group_size=self.group_size,
            eps=self.eps,
            activation=self.activation,
            residual=residual,
        )
