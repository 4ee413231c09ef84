"""Slimmable Linear."""

from torch import Tensor, nn

from slimkernels.nn._base import SlimModule
from slimkernels.ops.slim_linear import check_blocks, slim_linear


class SlimLinear(SlimModule, nn.Linear):
    """``nn.Linear`` that runs on the first part of its inputs (as many as the input has) and outputs (``set_width``).

    Same constructor and state_dict keys as ``nn.Linear``; see ``slimkernels.ops.slim_linear`` for blocks, activation and
    residual.

    Args:
        in_blocks, out_blocks: equal parts of the input / output dimension, each cut to its first entries.
        activation: name of a fused activation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        in_blocks: int = 1,
        out_blocks: int = 1,
        activation: str = "none",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        check_blocks("SlimLinear", "in_features", in_features, in_features, "in_blocks", in_blocks)
        check_blocks("SlimLinear", "out_features", out_features, out_features, "out_blocks", out_blocks)
        self.in_blocks, self.out_blocks, self.activation = in_blocks, out_blocks, activation
        self._init_width(out_features)

    def _check_width(self, n: int) -> None:
        super()._check_width(n)
        check_blocks("SlimLinear", "width", n, self.full_width, "out_blocks", self.out_blocks)

    def forward(
        self,
        x: Tensor,  # (*, k)
        residual: Tensor | None = None,  # (*, n)
    ) -> Tensor:  # (*, n)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        in_blocks, out_blocks = self.in_blocks, self.out_blocks
        if self.in_index is not None:
            weight, in_blocks = weight.index_select(1, self.in_index), 1
        if self.out_index is not None:
            weight, out_blocks = weight.index_select(0, self.out_index), 1
            bias = None if bias is None else bias.index_select(0, self.out_index)
        return slim_linear(
            x,
            weight,
            bias,
            self.width,
            in_blocks=in_blocks,
            out_blocks=out_blocks,
            activation=self.activation,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, width={self.width}"
