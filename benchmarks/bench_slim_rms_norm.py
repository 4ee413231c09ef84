"""``SlimRMSNorm`` at a width against nn.RMSNorm of that size and F.rms_norm on sliced parameters."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import row_norms
from slimkernels.nn import SlimRMSNorm


class Sliced(nn.RMSNorm):
    """The usual slicing code."""

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[-1]
        return F.rms_norm(x, (c,), self.weight[:c], self.eps)


cases = partial(row_norms.cases, SlimRMSNorm, Sliced, nn.RMSNorm)
