"""Slimmable convolutions and transposed convolutions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkernels.nn._base import SlimModule
from slimkernels.ops import slim_conv, slim_conv_transpose
from slimkernels.ops._common import check_activation


def on_gpu(weight: Tensor) -> bool:
    return weight.is_cuda


class _SlimConvBase(SlimModule, nn.modules.conv._ConvNd):
    """What convolution and transposed convolution share: widths, groups and the gather of active inputs.

    The active number of groups follows from the input: its channels over the channels of one group. Outputs follow
    group by group, so with groups the width must be those groups' outputs.
    """

    def __init__(self, *args, activation: str = "none", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._init_slim(activation)

    def _init_slim(self, activation: str = "none") -> None:
        """What the constructor adds to torch's; call it too when turning a torch module into this class in place."""
        check_activation(type(self).__name__, activation)
        self.activation = activation
        self._init_width(self.out_channels)
        self._lie_on_gpu()

    def _apply(self, fn, recurse=True):
        before = self.weight.device.type
        super()._apply(fn, recurse)
        if before != self.weight.device.type:
            self._lie_on_gpu()
        return self

    def _lie_on_gpu(self) -> None:
        """Made on, converted on or moved to a GPU, a 2d weight lies channels-last there: its kernels load 16 bytes at once,
        and outputs are channels-last from then on. Another memory format can be asked for afterwards."""
        weight = self.weight
        if on_gpu(weight) and weight.dim() == 4 and weight.shape[1] > 1 and type(weight) is nn.Parameter:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def _check_width(self, n: int) -> None:
        super()._check_width(n)
        per_group = self.out_channels // self.groups
        if self.groups > 1 and n % per_group:
            raise ValueError(
                f"{type(self).__name__}: expected a width that is a whole number of groups,"
                f" each with {per_group} outputs, got {n}"
            )

    def _active_groups(self, channels: int) -> int:
        """Groups that an input of ``channels`` channels fills."""
        if self.groups == 1:
            return 1
        per_group = self.in_channels // self.groups
        if channels % per_group:
            raise ValueError(
                f"{type(self).__name__}: expected x to have a whole number of groups, each with {per_group} channels,"
                f" got {channels} channels"
            )
        groups = channels // per_group
        outputs = groups * (self.out_channels // self.groups)
        if outputs != self.width:
            raise ValueError(
                f"{type(self).__name__}: expected width {outputs}, the outputs of the {groups} groups that"
                f" x's {channels} channels fill, got {self.width}"
            )
        return groups

    def _group_outputs(self, in_index: Tensor) -> Tensor:
        """Positions of the outputs of the groups whose inputs are ``in_index`` (whole groups)."""
        per_in, per_out = self.in_channels // self.groups, self.out_channels // self.groups
        first = in_index[::per_in].div(per_in, rounding_mode="floor") * per_out
        return (first.unsqueeze(1) + torch.arange(per_out, device=in_index.device)).flatten()

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return f"{super().extra_repr()}, width={self.width}{activation}"


class _SlimConv(_SlimConvBase):
    def forward(
        self,
        x: Tensor,  # (B, c, *spatial) or (c, *spatial)
        residual: Tensor | None = None,  # the output's shape
    ) -> Tensor:  # (B, width, *spatial) or (width, *spatial)
        weight, bias = self.weight, self.bias
        groups = 1 if self.groups == 1 else self._active_groups(x.shape[-weight.dim() + 1])
        if self.in_index is not None:
            if self.groups == 1:
                weight = weight.index_select(1, self.in_index)
            else:
                outputs = self._group_outputs(self.in_index)
                weight = weight.index_select(0, outputs)
                bias = None if bias is None else bias.index_select(0, outputs)
        if self.out_index is not None:
            weight = weight.index_select(0, self.out_index)
            bias = None if bias is None else bias.index_select(0, self.out_index)
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)
        return slim_conv(
            x,
            weight,
            bias,
            self._width.shape[0],
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=groups,
            activation=self.activation,
            residual=residual,
        )


class _SlimConvTranspose(_SlimConvBase, nn.modules.conv._ConvTransposeNd):
    def forward(
        self,
        x: Tensor,  # (B, c, *spatial) or (c, *spatial)
        output_size: list[int] | None = None,  # as in torch: one of the sizes that stride allows
        residual: Tensor | None = None,  # the output's shape
    ) -> Tensor:  # (B, width, *spatial) or (width, *spatial)
        weight, bias = self.weight, self.bias
        spatial = weight.dim() - 2
        groups = 1 if self.groups == 1 else self._active_groups(x.shape[-spatial - 1])
        output_padding: Sequence[int] = self.output_padding
        if output_size is not None:
            stride, kernel, dilation = list(self.stride), list(self.kernel_size), list(self.dilation)
            padding = [p for p in self.padding if isinstance(p, int)]  # never a string here; torch types it as one
            output_padding = self._output_padding(x, output_size, stride, padding, kernel, spatial, dilation)
        if self.in_index is not None:
            weight = weight.index_select(0, self.in_index)
            if self.groups > 1 and bias is not None:
                bias = bias.index_select(0, self._group_outputs(self.in_index))
        if self.out_index is not None:
            weight = weight.index_select(1, self.out_index)
            bias = None if bias is None else bias.index_select(0, self.out_index)
        return slim_conv_transpose(
            x,
            weight,
            bias,
            self._width.shape[0],
            stride=self.stride,
            padding=self.padding,  # type: ignore[arg-type]
            output_padding=output_padding,
            dilation=self.dilation,
            groups=groups,
            activation=self.activation,
            residual=residual,
        )


class SlimConv1d(_SlimConv, nn.Conv1d):
    """``nn.Conv1d`` (same constructor, plus ``activation``) on its input's channels and the first ``width`` filters."""


class SlimConv2d(_SlimConv, nn.Conv2d):
    """``nn.Conv2d`` (same constructor, plus ``activation``) on its input's channels and the first ``width`` filters."""


class SlimConv3d(_SlimConv, nn.Conv3d):
    """``nn.Conv3d`` (same constructor, plus ``activation``) on its input's channels and the first ``width`` filters."""


class SlimConvTranspose1d(_SlimConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` (plus ``activation``) on its input's channels and the first ``width`` outputs."""


class SlimConvTranspose2d(_SlimConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` (plus ``activation``) on its input's channels and the first ``width`` outputs."""


class SlimConvTranspose3d(_SlimConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` (plus ``activation``) on its input's channels and the first ``width`` outputs."""
