"""NSNet2, the recurrent speech enhancer of the DNS challenge (Braun & Tashev, arXiv 2008.06412)."""

import torch
from torch import Tensor, nn

State = tuple[Tensor, Tensor]


class NSNet2(nn.Module):
    """Linear, two GRUs and three linear layers from log-power frames to a gain for each frequency bin.

    ``hidden`` and ``wide`` set the widths: ``NSNet2(200, 300)`` is the plain network at width 0.5.
    """

    def __init__(self, hidden: int = 400, wide: int = 600, bins: int = 161):
        super().__init__()
        self.fc_in = nn.Sequential(nn.Linear(bins, hidden), nn.ReLU())
        self.rnn1 = nn.GRU(hidden, hidden, batch_first=True)
        self.rnn2 = nn.GRU(hidden, hidden, batch_first=True)
        self.fc_out = nn.Sequential(
            nn.Linear(hidden, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, bins), nn.Sigmoid()
        )

    def forward(self, features: Tensor) -> Tensor:  # (b, frames, bins) -> (b, frames, bins), gains between 0 and 1
        return self.stream(features)[0]

    def stream(
        self,
        features: Tensor,  # (b, frames, bins), one frame is enough
        state: State | None = None,  # what the last call returned; None at the start
    ) -> tuple[Tensor, State]:  # (b, frames, bins), the next state
        """The same for a piece of a longer signal."""
        first, second = state if state is not None else (None, None)
        h, first = self.rnn1(self.fc_in(features), first)
        h, second = self.rnn2(h, second)
        return self.fc_out(h), (first, second)


def log_power(spectrum: Tensor) -> Tensor:  # complex, any shape
    """The features NSNet2 was trained on: log10 of the power, floored at 1e-12."""
    return torch.log10(torch.view_as_real(spectrum).square().sum(-1).clamp_min(1e-12))
