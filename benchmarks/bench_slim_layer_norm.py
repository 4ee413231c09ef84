"""``SlimLayerNorm`` at a width against nn.LayerNorm of that size and F.layer_norm on sliced parameters."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import row_norms
from slimkernels.nn import SlimLayerNorm


class Sliced(nn.LayerNorm):
    """The usual slicing code."""

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[-1]
        return F.layer_norm(x, (c,), self.weight[:c], self.bias[:c], self.eps)


cases = partial(row_norms.cases, SlimLayerNorm, Sliced, nn.LayerNorm)
