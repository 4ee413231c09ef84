"""Slimmable Embedding."""

import torch.nn.functional as F
from torch import Tensor, nn

from slimkernels.nn._base import SlimModule


class SlimEmbedding(SlimModule, nn.Embedding):
    """``nn.Embedding`` that gives the first ``width`` features of each vector.

    Same constructor and state_dict keys as ``nn.Embedding``. The table is read through its strides; its gradient has
    full size with zeros outside the slice, or is sparse with full rows. ``max_norm`` limits the norm of the active
    features and, as in torch, rescales them in place.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *args, **kwargs) -> None:
        super().__init__(num_embeddings, embedding_dim, *args, **kwargs)
        self._init_width(embedding_dim)

    def forward(
        self,
        input: Tensor,  # (*) int64 or int32
    ) -> Tensor:  # (*, width)
        weight = self.weight if self.width == self.full_width else self.weight[:, : self.width]
        table = self.weight if self.sparse else weight
        if self.max_norm is not None and self.sparse:
            # Rescales the slice; the sparse gradient below needs the lookup in the whole table.
            F.embedding(input, weight.detach(), None, self.max_norm, self.norm_type)
        y = F.embedding(
            input,
            table,
            self.padding_idx,
            None if self.sparse else self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
        return y[..., : self.width] if self.sparse else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, width={self.width}"
