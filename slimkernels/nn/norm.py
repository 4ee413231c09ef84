"""Slimmable layer, RMS and group norm; batch norm is in ``batch_norm.py``."""

import math

import torch.nn.functional as F
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


class _SlimInstanceNorm(SlimModule, nn.modules.instancenorm._InstanceNorm):
    """An instance norm on as many leading channels as its input has. No running statistics."""

    def __init__(self, num_features: int, *args, **kwargs) -> None:
        super().__init__(num_features, *args, **kwargs)
        if self.track_running_stats:
            raise ValueError(f"{type(self).__name__}: expected track_running_stats to be False, got True")
        self._init_slim()

    def _init_slim(self) -> None:
        self._init_width(self.num_features)

    def forward(self, x: Tensor) -> Tensor:  # (N, c, *) or (c, *) -> the same
        self._check_input_dim(x)
        unbatched = x.dim() == self._get_no_batch_dim()
        weight, bias = (
            p if p is None or self.in_index is None else p.index_select(0, self.in_index)
            for p in (self.weight, self.bias)
        )
        c = x.shape[0 if unbatched else 1]
        if c > self.num_features or (weight is not None and c > weight.shape[0]):
            raise ValueError(f"{type(self).__name__}: expected x with at most {self.num_features} channels, got {c}")
        if weight is not None:
            weight, bias = weight[:c], bias[:c]
        y = F.instance_norm(x.unsqueeze(0) if unbatched else x, None, None, weight, bias, True, 0.0, self.eps)
        return y.squeeze(0) if unbatched else y


class SlimInstanceNorm1d(_SlimInstanceNorm, nn.InstanceNorm1d):
    """``nn.InstanceNorm1d`` on its first channels; without running statistics."""


class SlimInstanceNorm2d(_SlimInstanceNorm, nn.InstanceNorm2d):
    """``nn.InstanceNorm2d`` on its first channels; without running statistics."""


class SlimInstanceNorm3d(_SlimInstanceNorm, nn.InstanceNorm3d):
    """``nn.InstanceNorm3d`` on its first channels; without running statistics."""
