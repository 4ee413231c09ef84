"""WaveNet for real-time audio: stacked dilated 1d convolutions, as in neural amplifier modelling.

Source: van den Oord et al. (arXiv 1609.03499), in the causal feed-forward form of Wright et al. (Applied Sciences 10(3),
2020); slimmable: arXiv 2511.07470.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DILATIONS = tuple(2**i for i in range(10))


class WaveNetLayer(nn.Module):
    """Dilated convolution, conditioned on the network's input; tanh; a 1x1 convolution added to what came in."""

    def __init__(self, channels: int, kernel: int, dilation: int, last: bool):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel, dilation=dilation)
        self.mix = nn.Conv1d(1, channels, 1, bias=False)
        self.out = None if last else nn.Conv1d(channels, channels, 1)  # of the last layer the head alone gets anything
        self.history = (kernel - 1) * dilation

    def forward(self, h: Tensor, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the next layer and the head get, and the end of what was seen, which the next block needs."""
        seen = F.pad(h, (self.history, 0)) if past is None else torch.cat([past, h], -1)
        z = torch.tanh(self.conv(seen) + self.mix(x))
        return h if self.out is None else h + self.out(z), z, seen[..., -self.history :]


class WaveNet(nn.Module):
    """One channel of audio to one channel; causal, of any length.

    Args:
        channels: of all layers.
        dilations: of the layers; the receptive field is ``1 + (kernel - 1) * sum(dilations)`` samples.
        kernel: taps of each layer.
    """

    def __init__(self, channels: int = 16, dilations: Sequence[int] = DILATIONS, kernel: int = 3):
        super().__init__()
        self.enter = nn.Conv1d(1, channels, 1)
        self.histories = [(kernel - 1) * d for d in dilations]
        self.layers = nn.ModuleList(
            WaveNetLayer(channels, kernel, d, i == len(dilations) - 1) for i, d in enumerate(dilations)
        )
        self.head = nn.Conv1d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:  # (b, 1, samples) -> (b, 1, samples)
        h, skip = self.enter(x), None
        for layer in self.layers:
            h, z, _ = layer(h, x)
            skip = z if skip is None else skip + z
        return self.head(skip)

    def stream(
        self,
        x: Tensor,  # (b, 1, samples), a block of any length
        past: list[Tensor],  # what the last call returned, ``silence`` at the start
    ) -> tuple[Tensor, list[Tensor]]:  # (b, 1, samples), what the next call needs
        """The same for a block of a longer signal."""
        h, skip, seen = self.enter(x), None, []
        for i, layer in enumerate(self.layers):
            h, z, last = layer(h, x, past[i])
            skip = z if skip is None else skip + z
            seen.append(last)
        return self.head(skip), seen

    def silence(self, x: Tensor) -> list[Tensor]:
        """The ``past`` of a signal that begins with the block ``x``, at the width that the network has now."""
        channels = self.enter(x[..., :1]).shape[1]
        return [x.new_zeros(x.shape[0], channels, history) for history in self.histories]


def wavenet(width_mult: float = 1.0) -> WaveNet:
    return WaveNet(max(1, round(16 * width_mult)))
